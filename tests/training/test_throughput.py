"""The FLOPs that a step needs, against torch's own count of what it does; and what devices can do."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from cofitune.data.batches import Plan, RehearsalMix, rank_micro_batches
from cofitune.data.chat import IGNORED, Example
from cofitune.model.anatomy import anatomy_of
from cofitune.model.region import freeze_outside, resolve_region
from cofitune.training.loss import rehearsal_loss, summed_loss, top_k_of
from cofitune.training.throughput import Meter, peak_flops, training_cost


def model() -> LlamaForCausalLM:
    """Eager attention: its products are plain ones, which the counter sees one by one."""
    config = LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=10, vocab_size=50, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("layers", "modules"),
    [
        ("all", ("all",)),
        ("25%-50%", ("up_proj", "down_proj")),
        ("50%-75%", ("mha",)),
        ("0-0", ("down_proj",)),
        ("3", ("gate_proj",)),
        ("1-2", ("q_proj",)),
        ("2", ("k_proj",)),
        ("2", ("v_proj",)),
        ("2", ("o_proj",)),
        ("1-3", ("v_proj", "down_proj")),
    ],
)
def test_a_step_costs_what_torch_counts(layers: str, modules: tuple[str, ...]) -> None:
    tiny = model()
    anatomy = anatomy_of(tiny)
    region = resolve_region(layers, modules, anatomy.num_layers)
    freeze_outside(tiny, set(region.parameter_names(anatomy)))
    tokens, prompt = 17, 6
    ids = torch.randint(0, 50, (1, tokens))
    labels = torch.where(torch.arange(tokens) < prompt, IGNORED, ids)
    with FlopCounterMode(display=False) as counter:
        summed_loss(tiny, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}).backward()
    counted = counter.get_total_flops() - _rotations(counter)
    assert training_cost(anatomy, region).flops(tokens, tokens**2, tokens - prompt) == counted


def _rotations(counter: FlopCounterMode) -> int:
    """Positions times frequencies, computed as a product once a forward; no part of a model's cost."""
    return sum(sum(flops.values()) for name, flops in counter.get_flop_counts().items() if name.endswith("rotary_emb"))


@pytest.mark.parametrize("kind", ["nll", "kl"])
def test_rehearsing_a_fifth_of_the_items_costs_at_most_three_tenths_more(kind: str) -> None:
    """Two items of ten: a quarter more than eight of equal length, whatever their loss; no pass through a base."""
    tiny = model()
    ids = torch.randint(0, 50, (16,)).tolist()
    stored = top_k_of(torch.randn(10, 50), 8) if kind == "kl" else None
    task = Example(ids, [IGNORED] * 6 + ids[6:])
    rehearsed = Example(ids, [IGNORED] * 6 + ids[6:], top_k=stored)
    costs = []
    for share, examples in ((None, [task] * 8), (0.2, [task] * 8 + [rehearsed] * 2)):
        plan = Plan(4, 2, 1, 8, 1, rehearsal=RehearsalMix(8, 2, share) if share else None)
        assert plan.rehearsal is None or plan.rehearsal.beside(8) == 2
        with FlopCounterMode(display=False) as counter:
            for number, batch in enumerate(rank_micro_batches(examples, range(len(examples)), plan, 0, 0)):
                loss = summed_loss(tiny, batch) if number < 2 else rehearsal_loss(tiny, batch, kind)
                loss.backward()
        costs.append(counter.get_total_flops())
    assert 1.2 < costs[1] / costs[0] <= 1.3


def test_a_kept_prefix_saves_the_forward_pass_of_its_layers_alone() -> None:
    anatomy = anatomy_of(model())
    region = resolve_region("2-3", ("up_proj",), anatomy.num_layers)
    whole, cached = training_cost(anatomy, region), training_cost(anatomy, region, cached=True)
    layer = 24 * 40 * 2 + 24 * 20 * 2 + 24 * 40 * 3
    assert whole.token - cached.token == 2 * 2 * layer
    assert whole.pair - cached.pair == 2 * 2 * (2 * 4 * 10)
    assert whole.supervised == cached.supervised


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, False, 312.0),
        ("NVIDIA A100-SXM4-80GB", torch.float32, False, 19.5),
        ("NVIDIA A100-SXM4-80GB", torch.float32, True, 156.0),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, False, 989.4),
        ("NVIDIA H100 PCIe", torch.bfloat16, False, 756.0),
        ("NVIDIA A10", torch.bfloat16, False, 125.0),
        ("NVIDIA A10G", torch.bfloat16, False, None),
        ("Some Other Device", torch.bfloat16, False, None),
    ],
)
def test_what_a_device_can_do_goes_by_its_name(name: str, dtype: torch.dtype, tf32: bool, tera: float | None) -> None:
    assert peak_flops(name, dtype, tf32) == (None if tera is None else tera * 1e12)


def test_mfu_is_needed_over_possible() -> None:
    anatomy = anatomy_of(model())
    region = resolve_region("all", ("all",), anatomy.num_layers)
    cost = training_cost(anatomy, region)
    meter = Meter(cost, cost, 4.0 * cost.flops(100, 5000, 30), "some device")
    assert meter.mfu(cost.flops(100, 5000, 30), seconds=0.5) == pytest.approx(0.5)
    assert Meter(cost, cost, None, "cpu").mfu(1, 0.5) is None
