"""What DeepSpeed is told."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cofitune.training.engine import EngineSettings, deepspeed_config

SETTINGS = EngineSettings(
    zero_stage=3, offload_optimizer="none", offload_param="none", raw={}, dtype=torch.bfloat16, micro_batch=2,
    accumulation=4, learning_rate=1e-4, weight_decay=0.1, adam_betas=(0.9, 0.95), adam_epsilon=1e-8, max_grad_norm=1.0,
    lr_scheduler_type="cosine", warmup_ratio=0.03, num_steps=101,
)  # fmt: skip


def test_bf16_accumulates_gradients_in_fp32() -> None:
    config = deepspeed_config(SETTINGS)
    assert config["bf16"] == {"enabled": True}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "data_types" not in deepspeed_config(replace(SETTINGS, dtype=torch.float32))


def test_raw_is_merged_last_section_by_section() -> None:
    raw = {"zero_optimization": {"sub_group_size": 10}, "wall_clock_breakdown": True}
    config = deepspeed_config(replace(SETTINGS, raw=raw))
    assert config["zero_optimization"] == {"stage": 3, "sub_group_size": 10}
    assert config["wall_clock_breakdown"] is True


def test_offload_goes_to_the_cpu() -> None:
    zero = deepspeed_config(replace(SETTINGS, offload_optimizer="cpu", offload_param="cpu"))["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "cpu"


@pytest.mark.parametrize(("ratio", "steps", "expected"), [(0.03, 101, 4), (0, 10, 0), (0.5, 3, 2)])
def test_the_warm_up_is_rounded_up_as_transformers_does(ratio: float, steps: int, expected: int) -> None:
    assert replace(SETTINGS, warmup_ratio=ratio, num_steps=steps).warmup_steps == expected
