"""The estimate of what a step keeps for its backward pass, against the bytes that autograd really keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from cofitune.model.anatomy import anatomy_of, read_anatomy
from cofitune.model.region import freeze_outside, resolve_region
from cofitune.training import fit_device
from cofitune.training.activations import Activations
from cofitune.training.engine import checkpoint_layers
from cofitune.training.fit_device import SHARE, choose_checkpointed, choose_stage
from cofitune.training.fused import fuse_operations
from cofitune.training.loss import summed_loss
from cofitune.training.memory import Footprint
from cofitune.training.peft import insert_adapter, plan_adapter
from tests.helpers import run_ranks
from tests.training.test_engine import SETTINGS

LAYERS, ROWS, TOKENS = 5, 4, 32
SMALL = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
GROUPED = {"intermediate_size": 160, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
# what transformers writes in operations that the formulas do not follow one by one
ROUGH = {"gpt2": (1.0, 1.2), "gpt_neox": (0.9, 1.3), "olmo2": (0.88, 1.05)}


@contextmanager
def kept_bytes(model: nn.Module) -> Iterator[list[int]]:
    """Inside, the bytes of every storage that is kept for the backward pass, parameters left out; summed at the end."""
    own, kept, result = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}, [0]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield result
    result[0] = sum(count for count, _ in kept.values())


def _made(family: str, modules: tuple[str, ...], dtype: torch.dtype = torch.float32) -> tuple[Any, Activations]:
    torch.manual_seed(0)
    wide = {} if family == "gpt2" else {"intermediate_size": 160} if family == "gpt_neox" else GROUPED
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL, **wide)).to(dtype).eval()
    anatomy = anatomy_of(model)
    region = resolve_region("1-2", modules, LAYERS, anatomy.modules)
    freeze_outside(model, set(region.parameter_names(anatomy)))
    fuse_operations(model, anatomy.layout.layers, region.first)
    return model, Activations(anatomy, region, dtype.itemsize, ROWS * TOKENS)


def _kept(model: nn.Module, rows: int = ROWS) -> int:
    ids = torch.randint(0, 300, (rows, TOKENS))
    with kept_bytes(model) as result:
        summed_loss(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()})
    return result[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "olmo2", "phi3", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("modules", [("up_proj", "down_proj"), ("all",), ("q_proj",)], ids="-".join)
def test_what_is_kept_is_what_was_estimated(family: str, modules: tuple[str, ...], dtype: torch.dtype) -> None:
    model, estimate = _made(family, modules, dtype)
    low, high = ROUGH.get(family, (0.96, 1.03))
    assert low <= estimate.kept(0) / _kept(model) <= high


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "olmo2", "phi3", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("modules", [("up_proj", "down_proj"), ("all",), ("q_proj",)], ids="-".join)
def test_what_is_kept_under_stage_3_is_what_was_estimated(
    family: str, modules: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There linear layers keep their inputs though their weights are frozen.

    Of Phi-3, attention's result is laid out like its queries on a CPU, and o_proj's input is a copy of it.
    """
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    model, estimate = _made(family, modules)
    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    low, high = ROUGH.get(family, (0.94 if family == "phi3" else 0.96, 1.03))
    assert low <= replace(estimate, keeps_inputs=True).kept(0) / _kept(model) <= high


def test_a_run_knows_which_linear_layers_its_stage_gives_it() -> None:
    raw = {"zero_optimization": {"memory_efficient_linear": False}}
    found = [
        _run(**c).activations.keeps_inputs
        for c in ({"zero_stage": 2}, {"zero_stage": 3}, {"raw": raw, "zero_stage": 3})
    ]
    assert found == [False, True, False]


def test_a_gate_that_trains_alone_needs_up_too() -> None:
    model, estimate = _made("llama", ("gate_proj",))
    assert estimate.kept(0) == pytest.approx(_kept(model), rel=0.01)


@pytest.mark.parametrize("count", range(LAYERS))
def test_each_checkpointed_layer_keeps_its_input_alone(count: int) -> None:
    model, estimate = _made("llama", ("up_proj", "down_proj"))
    model.train()  # else nothing is checkpointed
    checkpoint_layers(model, estimate.anatomy.layout.layers, estimate.region.first, count)
    assert _kept(model) == pytest.approx(estimate.kept(count), rel=0.02)


@pytest.mark.parametrize("modules", [("up_proj", "down_proj"), ("all",), ("q_proj",)], ids="-".join)
@pytest.mark.parametrize(
    ("kind", "dropout"), [("lora", 0.0), ("lora", 0.1), ("dora", 0.0), ("dora", 0.1), ("osf", 0.0)]
)
def test_what_an_adapter_keeps_is_what_was_estimated(kind: str, dropout: float, modules: tuple[str, ...]) -> None:
    """Over enough tokens for what is there for a moment, as DoRA's product, to be little beside it."""
    rows = 16 * ROWS
    model, estimate = _made("llama", modules)
    adapter = plan_adapter(kind, estimate.region, estimate.anatomy, r=8, alpha=8, dropout=dropout, effective_rank=0.5)
    insert_adapter(model, adapter, 0)
    model.train()
    expected = replace(estimate, adapter=adapter, tokens=rows * TOKENS).kept(0)
    assert 0.98 <= expected / _kept(model, rows) <= 1.06


def _run(**changes: Any) -> Footprint:
    _, estimate = _made("llama", ("up_proj", "down_proj"))
    settings = replace(SETTINGS, **{"zero_stage": 2, "dtype": torch.float32, "micro_batch": 64, **changes})
    return Footprint(estimate.anatomy, estimate.region, settings, 2, 512, 0)


def test_the_fewest_layers_that_fit_are_checkpointed() -> None:
    run = _run()
    needed = [replace(run, checkpointed=count).memory.device for count in range(run.depth + 1)]
    assert needed == sorted(needed, reverse=True) or needed[1] > needed[0], "one alone may save less than it takes"
    for room in (needed[0] / SHARE + 1, needed[2] / SHARE + 1, needed[4] / SHARE + 1, 1):
        fitting = [count for count, n in enumerate(needed) if n <= SHARE * room]
        assert choose_checkpointed(run, int(room)) == min(fitting, default=run.depth)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "falcon_h1", "jamba", "mamba"])
def test_all_layers_are_checkpointed_where_the_formulas_do_not_fit(family: str) -> None:
    run = _run()
    assert run.activations.is_known and choose_checkpointed(run, 10**15) == 0
    config = AutoConfig.for_model(family, **SMALL, **({} if family == "mamba" else GROUPED))
    other = replace(run, anatomy=read_anatomy(config))
    assert not other.activations.is_known and choose_checkpointed(other, 10**15) == other.depth


def test_all_layers_are_checkpointed_where_attention_keeps_its_scores() -> None:
    run = replace(_run(), fused=False)
    assert choose_checkpointed(run, 10**15) == run.depth
    fused = {f: read_anatomy(AutoConfig.for_model(f, **SMALL)).fuses_attention for f in ("llama", "gpt2", "bloom")}
    assert fused == {"llama": True, "gpt2": True, "bloom": False}


def test_stage_2_is_chosen_where_whole_weights_fit() -> None:
    run = _run()
    needed = run.memory.device
    assert choose_stage(run, int(needed / SHARE) + 2) == 2
    assert choose_stage(run, int(needed / SHARE) - 2) == 3
    assert choose_stage(_run(offload_param="cpu"), 10**15) == 3, "weights are taken off the device by stage 3 alone"


def test_a_plan_for_several_ranks_gives_each_its_part_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(fit_device, "free_memory", lambda: 12 * 2**30)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert [fit_device.device_bytes(ranks) for ranks in (1, 4)] == [12 * 2**30, 3 * 2**30]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert fit_device.device_bytes(4) == 6 * 2**30, "the others are on another host"


@pytest.mark.processes
def test_ranks_decide_by_the_smallest_of_their_devices(tmp_path: Path) -> None:
    run_ranks("training.fit_cases", tmp_path)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == [str(10**12)] * 2
