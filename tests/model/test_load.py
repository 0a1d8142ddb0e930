"""Loading a base: what of its weights is a process's own memory, and what are pages that all ranks share."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cofitune.model.load import load_model


def own_bytes() -> int:
    """Anonymous memory of this process: what it shares with no other one."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.parametrize(("stored", "share"), [(torch.bfloat16, 0.0), (torch.float16, 1.0)])
def test_weights_of_another_dtype_are_a_copy_of_ones_own(tmp_path: Path, stored: torch.dtype, share: float) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=48000, **sizes)).to(stored)
    num_bytes = 2 * model.num_parameters()
    model.save_pretrained(tmp_path)
    del model
    load_model(str(tmp_path), torch.bfloat16)  # what the library itself takes, once
    before = own_bytes()
    loaded = load_model(str(tmp_path), torch.bfloat16)
    assert (own_bytes() - before) / num_bytes == pytest.approx(share, abs=0.1)
    assert loaded.dtype == torch.bfloat16
