"""Sharded equals unsharded: two real ranks under DeepSpeed against one plain PyTorch loop, every case of the mask."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cofitune.data.batches import step_indices
from cofitune.model.anatomy import anatomy_of
from tests.helpers import run_ranks
from tests.plain import mean_loss
from tests.training import sharded_cases as cases

pytestmark = pytest.mark.processes

TITLE = (
    "two ranks against one plain loop: ZeRO stage, offload, accumulation, checkpointing, mask, prefix cache; "
    "largest relative difference of a displacement, of a loss"
)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Start two ranks once; they run every case and write what came out."""
    folder = tmp_path_factory.mktemp("sharded")
    cases.tiny_model().save_pretrained(folder / "model")
    run_ranks("training.sharded_cases", folder)
    return folder


def _schedule(step: int) -> float:
    """Cosine with linear warm-up, step counted from 0, as transformers defines it."""
    warmup = int(0.2 * cases.STEPS)
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (cases.STEPS - warmup)))


def _start(case) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    """The base's weights in the precision that the case trains in."""
    model = cases.model_of(case).to(cases.settings_of(case).dtype)
    return {n: p.detach() for n, p in model.named_parameters()}


def _reference(case, roll: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:  # type: ignore[no-untyped-def]
    """The obvious loop: one process, one item at a time, whole weights, the mask written out as a matrix a weight."""
    model = cases.model_of(case)
    anatomy = anatomy_of(model)
    names = cases.region_of(case).parameter_names(anatomy)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = {n: p for n, p in model.named_parameters() if n in names}
    factors = {
        n: f.shaped(trained[n]).expand_as(trained[n]).roll(roll, f.axis)
        for n, f in cases.factors_of(case, anatomy).items()
    }
    biases = [p for n, p in trained.items() if n.endswith(".bias")]
    matrices = [p for n, p in trained.items() if not n.endswith(".bias")]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=5e-3, betas=(0.9, 0.95), eps=1e-8)
    examples = cases.tiny_examples()
    losses = []
    for step, indices in enumerate(step_indices(cases.plan_of(case), cases.SEED)):
        loss = mean_loss(model, (examples[i] for i in indices))
        losses.append(loss.item())
        optimizer.zero_grad()
        for parameter, gradient in zip(
            trained.values(), torch.autograd.grad(loss, list(trained.values())), strict=True
        ):
            parameter.grad = gradient
        if case.mask == "gradient":
            for name, factor in factors.items():
                trained[name].grad.mul_(factor)
        if case.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained.values(), case.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * _schedule(step)
        old = {n: p.detach().clone() for n, p in trained.items()}
        optimizer.step()
        if case.mask == "update":
            with torch.no_grad():
                for name, factor in factors.items():
                    trained[name].copy_(old[name] + factor * (trained[name] - old[name]))
    return start, {n: p.detach() for n, p in model.named_parameters()}, losses


@pytest.mark.parametrize("case", [c for c in cases.CASES if not c.bf16], ids=lambda c: c.name)
def test_two_ranks_equal_one_plain_loop(case, two_ranks: Path, table_line: Callable[[str, str], None]) -> None:  # type: ignore[no-untyped-def]
    start, expected, losses = _reference(case)
    got = load_file(two_ranks / f"{case.name}.safetensors")
    message = json.loads((two_ranks / f"{case.name}.json").read_text())
    names = cases.region_of(case).parameter_names(anatomy_of(cases.model_of(case)))
    off = {}
    for name in names:
        moved, should = got[name] - start[name], expected[name] - start[name]
        off[name] = float((moved - should).norm() / should.norm())
        assert should.norm() > 1e-3 * start[name].norm(), f"{name} hardly moved: the comparison would prove nothing"
    off_losses = max(abs(a / b - 1) for a, b in zip(message["losses"], losses, strict=True))
    table_line(TITLE, f"{case.row()}  {max(off.values()):.1e}  {off_losses:.1e}")
    assert max(off.values()) <= 1e-4, max(off, key=lambda name: off[name])
    assert off_losses <= 1e-5


@pytest.mark.parametrize("case", [c for c in cases.CASES if not c.bf16], ids=lambda c: c.name)
def test_the_validation_loss_is_a_plain_loops_and_changes_no_training(case, two_ranks: Path) -> None:  # type: ignore[no-untyped-def]
    """That it goes on as before is shown by every other test here: each case has validated in its middle."""
    model = cases.model_of(case)
    model.load_state_dict(load_file(two_ranks / f"{case.name}.safetensors"))
    with torch.no_grad():
        loss = mean_loss(model, cases.tiny_examples()[: cases.VALIDATION])
    message = json.loads((two_ranks / f"{case.name}.json").read_text())["validation"]
    assert message == {"step": cases.STEPS, "validation_loss": pytest.approx(loss.item(), rel=1e-5)}


@pytest.mark.parametrize("case", [c for c in cases.CASES if c.prefix_cache], ids=lambda c: c.name)
def test_the_frozen_layers_run_in_the_first_epoch_alone(case, two_ranks: Path) -> None:  # type: ignore[no-untyped-def]
    message = json.loads((two_ranks / f"{case.name}.json").read_text())
    plan = cases.plan_of(case)
    steps_an_epoch = math.ceil(plan.num_examples / plan.per_step)
    assert message["frozen_forwards"] == steps_an_epoch * case.accumulation < plan.num_steps * case.accumulation


@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.name)
def test_nothing_outside_the_region_changes(case, two_ranks: Path) -> None:  # type: ignore[no-untyped-def]
    start = _start(case)
    got = load_file(two_ranks / f"{case.name}.safetensors")
    message = json.loads((two_ranks / f"{case.name}.json").read_text())
    names = set(cases.region_of(case).parameter_names(anatomy_of(cases.model_of(case))))
    frozen = start.keys() - names
    assert message["before"].keys() == frozen
    assert message["before"] == message["after"]
    assert all(torch.equal(got[n], start[n]) for n in frozen)


@pytest.mark.parametrize("case", [c for c in cases.CASES if c.mask == "update"], ids=lambda c: c.name)
def test_units_of_importance_1_do_not_move_under_update_masks_and_decay(case, two_ranks: Path) -> None:  # type: ignore[no-untyped-def]
    model = cases.model_of(case)
    start = _start(case)
    got = load_file(two_ranks / f"{case.name}.safetensors")
    held = 0
    for name, factor in cases.factors_of(case, anatomy_of(model)).items():
        zero = factor.shaped(start[name]).expand_as(start[name]) == 0
        assert torch.equal(got[name][zero], start[name][zero]), name
        assert not torch.equal(got[name][~zero], start[name][~zero]), name
        held += int(zero.sum())
    assert held > 0


def test_gradient_mode_leaves_weight_decay_to_move_units_of_importance_1(two_ranks: Path) -> None:
    """Documents what the paper's equation does under AdamW (docs/method.md, defects); update mode does not."""
    case = next(c for c in cases.CASES if c.name == "gradient")
    model = cases.tiny_model()
    start = dict(model.named_parameters())
    got = load_file(two_ranks / "gradient.safetensors")
    decay = math.prod(1 - 5e-3 * _schedule(step) * 0.3 for step in range(cases.STEPS))
    for name, factor in cases.factors_of(case, anatomy_of(model)).items():
        zero = factor.shaped(start[name]).expand_as(start[name]) == 0
        torch.testing.assert_close(got[name][zero], start[name][zero] * decay, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.name)
def test_the_collected_tensors_answer_as_the_trained_engine(case, two_ranks: Path) -> None:  # type: ignore[no-untyped-def]
    """What the delta and the export are made of: a plain model with these tensors gives the engine's own logits."""
    model = cases.model_of(case).to(cases.settings_of(case).dtype)
    model.load_state_dict(load_file(two_ranks / f"{case.name}.safetensors"))
    with torch.no_grad():
        got = model(input_ids=torch.arange(20)[None]).logits
    assert torch.equal(got, load_file(two_ranks / f"{case.name}.logits.safetensors")["logits"])


@pytest.mark.parametrize("roll", [1, -1])
def test_a_mask_one_unit_off_would_be_found(roll: int, two_ranks: Path) -> None:
    """The comparison can fail: against a reference whose mask lies one row (or column) off, it does."""
    case = next(c for c in cases.CASES if c.name == "update")
    start, wrong, _ = _reference(case, roll)
    got = load_file(two_ranks / "update.safetensors")
    for name in cases.factors_of(case, anatomy_of(cases.tiny_model())):
        moved, should = got[name] - start[name], wrong[name] - start[name]
        assert (moved - should).norm() > 1e-2 * should.norm(), name
