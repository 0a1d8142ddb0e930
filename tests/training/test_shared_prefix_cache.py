"""The prefix that trials share: the same bits as without, and of the frozen layers only those that nobody has run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cofitune.data.batches import collate, count_positions, plan_steps, rank_micro_batches, step_indices
from cofitune.data.chat import IGNORED, Example
from cofitune.model.region import freeze_outside
from cofitune.training.engine import EngineSettings, checkpoint_layers, release, start_distributed, start_engine
from cofitune.training.layer_input import check_replay
from cofitune.training.loop import FitSettings, fit
from cofitune.training.loss import summed_loss
from cofitune.training.shared_base import SharedBase
from cofitune.training.shared_prefix_cache import DiskStore, MemoryStore, SharedPrefix, Store
from cofitune.zero import free_engine

pytestmark = pytest.mark.processes

STEPS, MICRO, ACCUMULATION, SEED, LAYERS = 5, 2, 2, 3, "model.layers"


@pytest.fixture(scope="module")
def held() -> SharedBase:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
    )  # fmt: skip
    return SharedBase(LlamaForCausalLM(config))


def items() -> list[Example]:
    """Seven: the second epoch begins in the second step, with batches of other shapes."""
    generator = torch.Generator().manual_seed(1)
    results = []
    for _ in range(7):
        length = int(torch.randint(5, 12, (1,), generator=generator))
        ids = torch.randint(1, 32, (length,), generator=generator).tolist()
        results.append(Example(ids, [IGNORED] * 3 + ids[3:]))
    return results


def train(held: SharedBase, first: int, stage: int, shared: SharedPrefix | None, keep: bool = True) -> Any:
    """Losses and gradient norms of a trial that begins at layer `first`, and how often each layer ran a forward."""
    start_distributed()
    model = held.instantiate()
    freeze_outside(model, {n for n, _ in model.named_parameters() if n.startswith(f"{LAYERS}.{first}.mlp")})
    checkpoint_layers(model, LAYERS, first)
    ran: Counter[int] = Counter()
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.register_forward_hook(lambda *_, number=number: ran.update([number]))
    settings = EngineSettings(
        zero_stage=stage, offload_optimizer="none", offload_param="none", raw={}, dtype=torch.float32,
        micro_batch=MICRO, accumulation=ACCUMULATION, learning_rate=5e-2, weight_decay=0.1, adam_betas=(0.9, 0.95),
        adam_epsilon=1e-8, max_grad_norm=1.0, lr_scheduler_type="constant", warmup_ratio=0, num_steps=STEPS,
    )  # fmt: skip
    engine = start_engine(model, settings)
    prefix = shared.of_training(model, LAYERS, first, keep) if shared else None
    if prefix and prefix.highest:
        item = collate(items()[:1], 0)
        check_replay(engine, prefix.highest, lambda: summed_loss(engine, item), "search.prefix_cache")
        assert engine.module.training
        ran.clear()
    seen: list[tuple[float, float]] = []
    fitting = FitSettings(plan_steps(7, MICRO, ACCUMULATION, 1, 1, STEPS), SEED, 0)
    fit(engine, items(), fitting, lambda record, _: seen.append((record.loss, record.grad_norm)), prefix=prefix)
    release(engine)
    free_engine(engine)
    return seen, dict(ran)


@pytest.mark.parametrize(("stage", "disk"), [(1, True), (3, False)])
def test_trials_share_what_lies_below_them_to_the_same_bits(
    held: SharedBase, stage: int, disk: bool, tmp_path: Path
) -> None:
    store: Store = DiskStore(tmp_path) if disk else MemoryStore()
    shared = SharedPrefix(store)
    forwards = STEPS * ACCUMULATION
    plan = plan_steps(7, MICRO, ACCUMULATION, 1, 1, STEPS)
    batches = [b for step in step_indices(plan, SEED) for b in rank_micro_batches(items(), step, plan, 0, 0)]
    different = len({str(batch["input_ids"].tolist()) for batch in batches})
    assert different < forwards, "an item alone comes twice"
    alone = {first: train(held, first, stage, None)[0] for first in (1, 2, 3)}
    assert alone[1] != alone[2] and alone[2][-1][0] < alone[2][0][0] - 0.01, "training moved"

    losses, ran = train(held, 2, stage, shared)
    assert losses == alone[2] and ran[0] == ran[1] == different, "the first has to run all"
    losses, ran = train(held, 3, stage, shared)
    assert losses == alone[3] and 0 not in ran and 1 not in ran and ran[2] == different, "from layer 2 on"
    losses, ran = train(held, 3, stage, shared)
    assert losses == alone[3] and set(ran) == {3}
    losses, ran = train(held, 2, stage, shared)
    assert losses == alone[2] and set(ran) == {2, 3}
    losses, ran = train(held, 1, stage, shared, keep=False)
    assert losses == alone[1] and ran[0] == forwards and shared.kept_layers == [2, 3], "no room: as without"
    assert not list(tmp_path.iterdir()), "the file has no name"
    assert held.changed() == []


def test_other_items_are_never_taken_for_those_that_were_kept(held: SharedBase) -> None:
    start_distributed()
    store = MemoryStore()
    shared = SharedPrefix(store)
    train(held, 2, 1, shared)
    plan = plan_steps(7, MICRO, ACCUMULATION, 1, 1, STEPS)
    prefix = shared.of_training(held.instantiate(), LAYERS, 2, keep=True)
    batches = rank_micro_batches(items(), next(step_indices(plan, SEED)), plan, 0, 0)
    assert [prefix.count_missing(batch) for batch in batches] == [[0], [0]]
    for name in ("input_ids", "attention_mask"):
        other = batches[1] | {name: batches[1][name].clone()}
        other[name][0, 0] += 1
        assert prefix.count_missing(other) == [1]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("flat", [False, True])
def test_the_size_that_is_told_beforehand_is_that_of_all_ranks_batches(world_size: int, flat: bool) -> None:
    examples = [Example(e.input_ids, e.labels, (len(e.input_ids),)) for e in items()] if flat else items()
    plan = plan_steps(7, MICRO, ACCUMULATION, world_size, 1, STEPS, flat)
    positions = sum(
        batch["input_ids"].numel()
        for indices in step_indices(plan, SEED)
        for rank in range(world_size)
        for batch in rank_micro_batches(examples, indices, plan, rank, 0)
    )
    assert count_positions(plan, [len(e.input_ids) for e in examples], SEED) == positions
