"""Every causal language model of transformers, tiny: two steps, an export, the same logits; and the table of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    Gemma3Config,
    Gemma4Config,
    GenerationConfig,
    Llama4Config,
    Mistral3Config,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
)

from tests.conftest import build_tokenizer
from tests.families import Outcome, try_family

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import models_table

FAMILIES, TABLE = models_table.FAMILIES, models_table.documented()
WITH_IMAGES = {
    Mistral3Config: "attention, FFN",
    Qwen2_5_VLConfig: "attention, FFN",
    Qwen3VLConfig: "attention, FFN",
    Qwen3VLMoeConfig: "attention, experts",
    Gemma3Config: "attention, FFN",
    Gemma4Config: "attention, FFN",
    Llama4Config: "attention, FFN in some layers",
}
Tried = tuple[Outcome, Path]


@pytest.fixture(autouse=True, scope="module")
def _nothing_beside() -> Iterator[None]:
    """Leave out what transformers does beside: it spells configs out for a log, and starts threads to read weights."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (PretrainedConfig, GenerationConfig):
            patch.setattr(kind, "__repr__", object.__repr__)
        patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
        yield


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Callable[[type[PretrainedConfig]], Tried]:
    """Call with a config class: what became of its family, tried once, and the folder where."""
    known: dict[type[PretrainedConfig], Tried] = {}
    tokenizer = build_tokenizer()

    def find(kind: type[PretrainedConfig]) -> Tried:
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind.model_type)
            known[kind] = try_family(kind, folder, tokenizer), folder
        return known[kind]

    return find


def test_the_table_has_the_families_of_the_installed_transformers() -> None:
    assert set(TABLE) == set(FAMILIES), "run scripts/models_table.py"
    assert models_table.render(TABLE) in models_table.PAGE.read_text(encoding="utf-8"), "run scripts/models_table.py"


@pytest.mark.processes
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_does_as_the_table_says(family: str, tried: Callable[[type[PretrainedConfig]], Tried]) -> None:
    result, _ = tried(FAMILIES[family])
    assert (result.trained, result.known if result.trained else result.reason) == TABLE.get(family)


@pytest.mark.processes
@pytest.mark.parametrize(("kind", "known"), WITH_IMAGES.items())
def test_of_a_model_with_images_the_text_model_trains(
    kind: type[PretrainedConfig], known: str, tried: Callable[[type[PretrainedConfig]], Tried]
) -> None:
    result, folder = tried(kind)
    assert result.trained and result.known == known, result.reason
    before, after = (load_file(folder / name / "model.safetensors") for name in ("model", "out"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any("visi" in name or "visual" in name for name in moved)
    assert any("visi" in name or "visual" in name for name in before)
