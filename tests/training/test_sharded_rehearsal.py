"""Rehearsal on two real ranks under DeepSpeed against one plain PyTorch loop that passes every item on its own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from cofitune.data.batches import count_supervised, rank_micro_batches, step_indices
from cofitune.data.chat import Example
from cofitune.model.anatomy import anatomy_of
from tests.helpers import run_ranks
from tests.training import rehearsal_cases as cases
from tests.training import sharded_cases as sharded

pytestmark = pytest.mark.processes

TITLE = (
    "rehearsal on two ranks against one plain loop: as the table without, then kind, weight; largest relative "
    "difference of a displacement, of a loss"
)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Start two ranks once; they run every case and write what came out."""
    folder = tmp_path_factory.mktemp("rehearsal")
    run_ranks("training.rehearsal_cases", folder)
    return folder


def _rate(step: int) -> float:
    """Cosine with linear warm-up, step counted from 0, as transformers defines it."""
    warmup = int(0.2 * sharded.STEPS)
    if step < warmup:
        return 5e-3 * step / warmup
    return 5e-3 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (sharded.STEPS - warmup)))


def _loss_of(model: Any, item: Example) -> tuple[Tensor, int]:
    """One item's summed loss and its tokens that carry it; where probabilities are stored, over the k + 1 classes."""
    logits, targets = model(torch.tensor([item.input_ids])).logits[0, :-1], torch.tensor(item.labels[1:])
    count = int((targets != -100).sum())
    if item.top_k is None:
        return cross_entropy(logits, targets, reduction="sum", ignore_index=-100), count
    q = logits[targets != -100].double().softmax(-1)
    chosen = torch.zeros_like(q, dtype=torch.bool).scatter(-1, item.top_k.indices.long(), True)
    p, p_rest = item.top_k.log_probs.double().exp(), item.top_k.rest.double().exp()
    of_chosen = (p * (p / q.gather(-1, item.top_k.indices.long())).log()).sum()
    of_rest = (p_rest * (p_rest / q.masked_fill(chosen, 0).sum(-1)).log()).sum()
    return (of_chosen + of_rest).float(), count


def _items(case: Any, indices: list[int]) -> Iterator[tuple[int, Example]]:
    """A step's items, and of each whether it is the task's (0) or the rehearsal's (1)."""
    task, rehearsed = cases.parts_of(case)
    for index in indices:
        which = int(index >= len(task))
        for item in (*task, *rehearsed)[index]:
            yield which, item


def _reference(case: Any, weight: float) -> tuple[dict[str, Tensor], dict[str, Tensor], list[list[float]]]:
    """The obvious loop: weights before and after, and of each step the task's loss and the rehearsal's."""
    model = sharded.tiny_model()
    anatomy = anatomy_of(model)
    names = sharded.region_of(case).parameter_names(anatomy)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = {n: p for n, p in model.named_parameters() if n in names}
    factors = {n: f.shaped(trained[n]).expand_as(trained[n]) for n, f in sharded.factors_of(case, anatomy).items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=5e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.3)
    losses = []
    for step, indices in enumerate(step_indices(cases.plan_of(case), sharded.SEED)):
        sums, counts = [torch.zeros(()), torch.zeros(())], [0, 0]
        for which, item in _items(case, indices):
            loss, count = _loss_of(model, item)
            sums[which] = sums[which] + loss
            counts[which] += count
        task, rehearsal = (total / count for total, count in zip(sums, counts, strict=True))
        losses.append([task.item(), rehearsal.item()])
        optimizer.zero_grad()
        gradients = torch.autograd.grad(task + weight * rehearsal, list(trained.values()))
        for (name, parameter), gradient in zip(trained.items(), gradients, strict=True):
            parameter.grad = gradient * factors[name] if case.mask == "gradient" and name in factors else gradient
        torch.nn.utils.clip_grad_norm_(trained.values(), case.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = _rate(step)
        old = {n: p.detach().clone() for n, p in trained.items()}
        optimizer.step()
        if case.mask == "update":
            with torch.no_grad():
                for name, factor in factors.items():
                    trained[name].copy_(old[name] + factor * (trained[name] - old[name]))
    return start, {n: p.detach() for n, p in model.named_parameters()}, losses


def _off(got: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """The largest relative difference of a trained tensor's displacement."""
    moved = [n for n in start if not torch.equal(expected[n], start[n])]
    assert moved
    for name in moved:
        assert (expected[name] - start[name]).norm() > 1e-3 * start[name].norm(), f"{name} hardly moved"
    return max(float((got[n] - expected[n]).norm() / (expected[n] - start[n]).norm()) for n in moved)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.name)
def test_rehearsal_on_two_ranks_equals_one_plain_loop(
    case: Any, two_ranks: Path, table_line: Callable[[str, str], None]
) -> None:
    start, expected, losses = _reference(case, case.weight)
    got = load_file(two_ranks / f"{case.name}.safetensors")
    records = json.loads((two_ranks / f"{case.name}.json").read_text())
    off = _off(got, expected, start)
    pairs = [
        (message, loss)
        for r, step in zip(records, losses, strict=True)
        for message, loss in zip((r["loss"], r["rehearsal_loss"]), step, strict=True)
    ]
    off_losses = max(abs(message / loss - 1) for message, loss in pairs)
    table_line(TITLE, f"{case.row()}  {off:.1e}  {off_losses:.1e}")
    assert off <= 1e-4
    assert off_losses <= 1e-5
    names = set(sharded.region_of(case).parameter_names(anatomy_of(sharded.tiny_model())))
    assert all(torch.equal(got[n], start[n]) for n in start.keys() - names)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.name)
def test_each_loss_counts_its_own_tokens_over_all_ranks(case: Any, two_ranks: Path) -> None:
    records = json.loads((two_ranks / f"{case.name}.json").read_text())
    steps, task = list(step_indices(cases.plan_of(case), sharded.SEED)), len(cases.parts_of(case)[0])
    for record, indices in zip(records, steps, strict=True):
        counts = [0, 0]
        for which, item in _items(case, indices):
            counts[which] += item.num_supervised
        assert [record["supervised_tokens"], record["rehearsal_tokens"]] == counts
    seen = [sum(i < task for i in step) for step in steps]
    assert [r["epoch"] for r in records] == [pytest.approx(sum(seen[: n + 1]) / task) for n in range(len(seen))]


@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.name)
def test_in_each_case_a_rank_is_sometimes_without_rehearsal(case: Any) -> None:
    """What makes the global counts necessary: the comparison above would prove little without."""
    plan, examples = cases.plan_of(case), cases.examples_of(case)
    silent = []
    for indices in step_indices(plan, sharded.SEED):
        for rank in range(sharded.WORLD):
            batches = rank_micro_batches(examples, indices, plan, rank, 0)
            silent += [not count_supervised(batch) for batch in batches[plan.accumulation :]]
    assert any(silent) and not all(silent)
    assert case.accumulation == 2 and case.weight != 1
    assert plan.rehearsal_micro_batches == (2 if case.share > 0.2 else 1)


@pytest.mark.parametrize("kind", ["nll", "kl"])
def test_a_wrong_weight_would_be_found(kind: str, two_ranks: Path) -> None:
    """The comparison can fail: against a reference whose weight is a tenth off, it does."""
    case = next(c for c in cases.CASES if c.name == f"rehearsal_{kind}_stage_3")
    start, wrong, _ = _reference(case, case.weight * 1.1)
    assert _off(load_file(two_ranks / f"{case.name}.safetensors"), wrong, start) > 1e-3
