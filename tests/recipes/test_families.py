"""Every causal language model of transformers, tiny: two steps, an export, the same logits; and the table of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    Gemma3Config,
    Gemma4Config,
    Llama4Config,
    Mistral3Config,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
)

from tests.families import try_family

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import models_table

FAMILIES, TABLE = models_table.FAMILIES, models_table.documented()


def test_the_table_has_the_families_of_the_installed_transformers() -> None:
    assert set(TABLE) == set(FAMILIES), "run scripts/models_table.py"
    assert models_table.render(TABLE) in models_table.PAGE.read_text(encoding="utf-8"), "run scripts/models_table.py"


@pytest.mark.processes
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_does_as_the_table_says(family: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    result = try_family(FAMILIES[family], tmp_path, tiny_tokenizer)
    assert (result.trained, result.known if result.trained else result.reason) == TABLE.get(family)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("kind", "known"),
    [
        (Mistral3Config, "attention, FFN"),
        (Qwen2_5_VLConfig, "attention, FFN"),
        (Qwen3VLConfig, "attention, FFN"),
        (Qwen3VLMoeConfig, "attention, experts"),
        (Gemma3Config, "attention, FFN"),
        (Gemma4Config, "attention, FFN"),
        (Llama4Config, "attention, FFN in some layers"),
    ],
)
def test_of_a_model_with_images_the_text_model_trains(
    kind: Any, known: str, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    result = try_family(kind, tmp_path, tiny_tokenizer)
    assert result.trained and result.known == known, result.reason
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any("visi" in name or "visual" in name for name in moved)
    assert any("visi" in name or "visual" in name for name in before)
