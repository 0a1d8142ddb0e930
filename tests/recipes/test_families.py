"""Families of transformers, tiny: two steps, an export, and the same logits. Some by default, all where asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from tests.families import try_family

ALL = {kind.model_type: kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING}
# heads and neurons that are known, of four layers; of models whose layers differ, or whose FFN are experts
SOME = {"starcoder2": (4, 4), "lfm2": (2, 4), "olmoe": (4, 0)}
ASKED = ALL if os.environ.get("COFITUNE_FAMILIES") == "all" else SOME

pytestmark = pytest.mark.processes


@pytest.mark.parametrize("family", ASKED)
def test_a_family_trains_and_exports(family: str, tmp_path: Path, tiny_tokenizer: Any, table_line: Any) -> None:
    result = try_family(ALL[family], tmp_path, tiny_tokenizer)
    known = f"attention in {result.attention}, FFN in {result.ffn} of {result.layers} layers"
    table_line("families", f"{family}: {result.trained or 'refused'}; {known}. {result.reason}")
    if family in SOME:
        assert result.trained == "modules" and (result.attention, result.ffn) == SOME[family], result.reason
    assert result.trained or result.reason
