"""What importance costs, in the operations that torch counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from cofitune.importance.estimate import FISHER, KL_DROPOUT, gate_gradients
from cofitune.importance.gates import virtual_gates


@pytest.mark.parametrize(("estimator", "at_most"), [(KL_DROPOUT, 1.4), (FISHER, 0.7)])
def test_a_batch_costs_little_more_than_a_full_fine_tuning_step(estimator: str, at_most: float) -> None:
    """Two forwards and a backward to the gates, no weight gradients: 4/3 of a step; fisher has one forward: 2/3.

    Attention between positions has no weights and so costs twice a step's: short rows keep it at the 2 % that it has in
    a 7B model at 512 tokens.
    """
    config = LlamaConfig(
        hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4, vocab_size=512
    )
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, 512, (4, 32))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with FlopCounterMode(display=False) as step:
        model(**batch).loss.backward()
    dropout = 0.01 if estimator == KL_DROPOUT else 0.0
    with virtual_gates(model, dropout) as gates, FlopCounterMode(display=False) as counted:
        gate_gradients(model, gates, batch, 0, 0, estimator)
    share = counted.get_total_flops() / step.get_total_flops()
    assert at_most - 0.15 < share <= at_most, share
