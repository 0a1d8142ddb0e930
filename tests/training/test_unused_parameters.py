"""A trained parameter that the loss does not depend on, under each stage."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cofitune.data.batches import plan_steps
from cofitune.data.chat import Example
from cofitune.errors import RegionError
from cofitune.model.region import freeze_outside
from cofitune.training.engine import EngineSettings, checkpoint_layers, release, start_distributed, start_engine
from cofitune.training.loop import FitSettings, fit
from cofitune.training.unused_parameters import check_unused_parameters

pytestmark = pytest.mark.processes

SETTINGS = EngineSettings(
    zero_stage=3, offload_optimizer="none", offload_param="none", raw={}, dtype=torch.float32, micro_batch=1,
    accumulation=1, learning_rate=1e-2, weight_decay=0.5, adam_betas=(0.9, 0.95), adam_epsilon=1e-8, max_grad_norm=1.0,
    lr_scheduler_type="constant", warmup_ratio=0.0, num_steps=1,
)  # fmt: skip
NAMES = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (1, 2)]


def _step(stage: int, idle: int | None) -> Any:
    """One step of a model of which one layer's FFN may answer with what it was asked. Returns the check."""
    start_distributed()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
    )
    if idle is not None:
        model.model.layers[idle].mlp.forward = lambda hidden: hidden
    freeze_outside(model, set(NAMES))
    checkpoint_layers(model, "model.layers", 1)
    engine = start_engine(model, replace(SETTINGS, zero_stage=stage))
    check = check_unused_parameters(model)
    settings = FitSettings(plan_steps(1, 1, 1, 1, 1, 1), 0, 0)
    fit(engine, [Example([1, 2, 3, 4], [1, 2, 3, 4])], settings, lambda *_: None)
    release(engine)
    return check


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_trained_parameter_without_part_in_the_loss_is_named(stage: int) -> None:
    with pytest.raises(RegionError, match=r"1 trained tensors take no part in the loss \(model.layers.2.mlp.up_proj"):
        _step(stage, idle=2)()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_nothing_is_said_where_all_take_part(stage: int) -> None:
    _step(stage, idle=None)()
