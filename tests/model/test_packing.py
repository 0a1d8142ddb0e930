"""Which families pack: each of transformers' causal language models, tried under each attention kernel."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from cofitune.model.kind import OTHERS, UNTRAINED
from cofitune.model.packing import APART_BY_FLASH, APART_BY_MASK, APART_BY_VARLEN, refuses_packing
from tests.families import tiny_config
from tests.packs import build, kernels_without_leak, leak_of

ROOT = Path(__file__).parents[2]
FAMILIES = {kind.model_type: kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING}
NOT_TRIED = {"emu3", "gemma3n"}  # made tiny, one cannot be built; the other needs timm
TRIED = sorted(FAMILIES.keys() - {*OTHERS, *UNTRAINED, *NOT_TRIED})


@pytest.mark.parametrize("family", TRIED)
def test_a_family_packs_where_its_conversations_are_what_they_are_alone(family: str) -> None:
    listed = {
        "masks": family in APART_BY_MASK,
        "flash": family in APART_BY_FLASH,
        "varlen": family in APART_BY_VARLEN,
    }
    if not MODEL_FOR_CAUSAL_LM_MAPPING[FAMILIES[family]]._supports_attention_backend:
        assert not any(listed.values()), "those that do not attend by transformers' common interface are never packed"
        return
    clean = kernels_without_leak(FAMILIES[family])
    if "masks" not in clean:
        clean.discard("varlen")  # which only takes their place
    assert {kernel for kernel, is_listed in listed.items() if is_listed} == clean


def test_only_what_was_tried_packs() -> None:
    assert set(TRIED) >= APART_BY_MASK | APART_BY_FLASH


def test_the_page_names_the_families_that_pack() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").partition("## Packing")[2].partition("\n## ")[0]
    rows = [set(re.findall(r"`(\S+)`", line)) for line in page.splitlines() if line.startswith("| under")]
    both = APART_BY_MASK & APART_BY_FLASH
    assert rows == [both, APART_BY_MASK - both, APART_BY_FLASH - both]


def test_what_is_compared_shows_a_leak() -> None:
    """By hand: OPT makes its mask without the positions, and LFM2's convolution reaches over a pack's seams."""
    assert leak_of(build(tiny_config(FAMILIES["opt"])), flat=False) > 0.1
    assert leak_of(build(tiny_config(FAMILIES["lfm2"])), flat=True) > 0.01
    assert leak_of(build(tiny_config(FAMILIES["llama"])), flat=False) < 1e-5


@pytest.mark.parametrize(
    ("family", "flash", "reason"),
    [
        ("llama", False, None),
        ("llama", True, None),
        ("opt", False, "except under model.attn_implementation: flash_attention_2"),
        ("gpt_oss", True, None),
        ("llama4_text", True, "under FlashAttention model type llama4_text lets them see each other"),
        ("granitemoehybrid", False, "model type granitemoehybrid is not known to keep them apart"),
        ("mamba", False, "model type mamba is not known to keep them apart"),
    ],
)
def test_a_refusal_names_the_family_and_what_would_do(family: str, flash: bool, reason: str | None) -> None:
    result = refuses_packing(AutoConfig.for_model(family), flash)
    assert result is None if reason is None else reason in str(result)


def test_models_whose_code_is_their_own_are_not_packed() -> None:
    reason = refuses_packing(AutoConfig.for_model("llama"), flash=False, trust_remote_code=True)
    assert "code that we do not know" in str(reason)
