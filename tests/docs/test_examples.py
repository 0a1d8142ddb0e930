"""The examples of docstrings give what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import cofitune

PACKAGE = Path(cofitune.__file__).parent
NEED_A_MODEL = {"cofitune.evaluation.score"}
WITH_EXAMPLES = sorted(
    "cofitune." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if "\n        >>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", sorted({*WITH_EXAMPLES} - NEED_A_MODEL))
def test_an_example_gives_what_it_says(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed
