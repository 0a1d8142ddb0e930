"""Every causal language model of transformers, tiny: two steps, an export, the same logits; and the table of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

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
