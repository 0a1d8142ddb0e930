"""The memory estimate, against sums written out by hand for LLaMA 7B on eight ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from cofitune.model.anatomy import Anatomy, read_anatomy
from cofitune.model.region import resolve_region
from cofitune.training.engine import EngineSettings
from cofitune.training.fit_device import SHARE, base_may_stay
from cofitune.training.memory import Footprint, Memory
from cofitune.training.peft import plan_adapter

SETTINGS = EngineSettings(
    zero_stage=3, offload_optimizer="none", offload_param="none", raw={}, dtype=torch.bfloat16, micro_batch=16,
    accumulation=2, learning_rate=4e-5, weight_decay=0.1, adam_betas=(0.9, 0.95), adam_epsilon=1e-8, max_grad_norm=1.0,
    lr_scheduler_type="cosine", warmup_ratio=0.03, num_steps=100,
)  # fmt: skip
ALL, TRAINED = 6_738_415_616, 721_420_288
LAYER = 4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096  # attention, FFN, two norms
WORKING_SET = (2 * LAYER + 32000 * 4096) * 2


@pytest.fixture(scope="module")
def llama_7b() -> Anatomy:
    return read_anatomy(
        LlamaConfig(
            vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
        )
    )


def _estimate(anatomy: Anatomy, **changes: object) -> Memory:
    region = resolve_region("25%-50%", ["up_proj", "down_proj"], 32)
    settings = replace(SETTINGS, **changes)  # type: ignore[arg-type]
    return Footprint(anatomy, region, settings, world_size=8, max_length=512, checkpointed=24).memory


def test_stage_3_shards_all_that_is_trained_and_all_weights(llama_7b: Anatomy) -> None:
    memory = _estimate(llama_7b)
    assert memory.weights == ALL * 2 // 8 + WORKING_SET
    assert memory.gradients == TRAINED * 4 // 8
    assert memory.optimizer == TRAINED * 12 // 8
    inputs_of_layers = 24 * 16 * 512 * 4096 * 2  # from layer 8 up, one a layer, in bf16
    one_layer = 16 * 512 * (2 * 4096 * 2 + 5 * 4096 * 2 + 4 * 11008 * 2)  # norms, attention, FFN
    assert inputs_of_layers + one_layer < memory.activations < 1.5 * (inputs_of_layers + one_layer)
    assert memory.host_loading == ALL * 2 and memory.host_offloaded == 0
    a_rank = TRAINED // 8
    assert a_rank < 10**8, "one inner step takes a rank's whole share: its gradient and its old values, in fp32"
    assert memory.buffers == 10**8 * 2 + 2 * a_rank * 4
    parts = memory.weights, memory.gradients, memory.optimizer, memory.buffers, memory.activations
    assert memory.device == sum(parts)


def test_a_base_that_stays_for_other_trials_costs_a_copy_of_what_trains(llama_7b: Anatomy) -> None:
    region = resolve_region("25%-50%", ["up_proj", "down_proj"], 32)
    for stage, copies in ((2, 1), (3, 0)):
        alone = Footprint(llama_7b, region, replace(SETTINGS, zero_stage=stage), 8, max_length=512, checkpointed=24)
        needed = replace(alone, shared_base=True).memory
        assert needed == replace(alone.memory, weights=alone.memory.weights + copies * TRAINED * 2)
        fits, fills = int(needed.device / SHARE) + 2, int(needed.device / SHARE) - 2
        assert [base_may_stay(alone, room) for room in (fits, fills)] == [stage < 3, False]
    adapter = plan_adapter("lora", region, llama_7b, r=8, alpha=8, dropout=0.0, effective_rank=0.5)
    beside = replace(alone, settings=replace(SETTINGS, zero_stage=2), adapter=adapter)
    assert replace(beside, shared_base=True).memory == beside.memory, "an adapter's weights are none of the base's"


@pytest.mark.parametrize(("stage", "share_of_gradients"), [(1, 1), (2, 8)])
def test_lower_stages_keep_whole_weights(llama_7b: Anatomy, stage: int, share_of_gradients: int) -> None:
    memory = _estimate(llama_7b, zero_stage=stage)
    assert memory.weights == ALL * 2
    assert memory.gradients == TRAINED * 4 // share_of_gradients
    assert memory.optimizer == TRAINED * 12 // 8


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_states_lie_once_on_the_host(llama_7b: Anatomy, stage: int) -> None:
    memory = _estimate(llama_7b, zero_stage=stage, offload_optimizer="cpu")
    assert memory.gradients == memory.optimizer == 0
    assert memory.buffers == 10**8 * 2, "the gradient bucket stays on the device"
    assert memory.host_offloaded == TRAINED * (4 + 12)


def test_offloaded_weights_leave_the_gathered_layers_on_the_device(llama_7b: Anatomy) -> None:
    memory = _estimate(llama_7b, offload_optimizer="cpu", offload_param="cpu")
    assert memory.weights == WORKING_SET
    assert memory.host_offloaded == TRAINED * (4 + 12) + ALL * 2


def test_fp32_has_no_separate_master_weights(llama_7b: Anatomy) -> None:
    assert _estimate(llama_7b, dtype=torch.float32).optimizer == TRAINED * 8 // 8


def test_moments_of_8_bits_take_a_byte_each(llama_7b: Anatomy) -> None:
    assert _estimate(llama_7b, optimizer="adamw_8bit").optimizer == TRAINED * (4 + 2) // 8


def test_one_card_holds_7b_with_buffers_of_one_inner_step(llama_7b: Anatomy) -> None:
    """DeepSpeed's own sub-groups of 1e9 would copy all trained weights' gradients and old values at once."""
    region = resolve_region("25%-50%", ["up_proj", "down_proj"], 32)
    raw = {"zero_optimization": {"sub_group_size": 10**9, "reduce_bucket_size": 5 * 10**8}}
    ours, theirs = (
        Footprint(llama_7b, region, replace(SETTINGS, micro_batch=1, raw=r), 1, 2048, 24).memory for r in ({}, raw)
    )
    assert ours.buffers == 10**8 * 2 + 2 * 10**8 * 4
    assert theirs.buffers == 5 * 10**8 * 2 + 2 * TRAINED * 4


def test_weights_in_another_dtype_are_on_the_host_once_a_rank(llama_7b: Anatomy) -> None:
    def loading(copies: int, **changes: object) -> int:
        region = resolve_region("25%-50%", ["up_proj"], 32)
        settings = replace(SETTINGS, **changes)  # type: ignore[arg-type]
        run = Footprint(llama_7b, region, settings, world_size=8, max_length=512, checkpointed=24, converting=copies)
        return run.memory.host_loading

    assert loading(8, zero_stage=2) == 8 * loading(1, zero_stage=2) == 8 * ALL * 2
    assert loading(8) == ALL * 2, "under ZeRO-3 rank 0 alone reads a big model"
