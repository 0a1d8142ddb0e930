"""The threat model names its tests, and they exist."""

from __future__ import annotations

import re

from tests.docs.documents import ROOT


def test_each_line_of_the_threat_model_names_a_test_that_exists() -> None:
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| what")]
    named = [re.findall(r"`(tests/[\w/]+\.py)`: (test_\w+)", row) for row in rows]
    assert len(rows) > 15
    for row, places in zip(rows, named, strict=True):
        assert len(places) == 1, row
        (path, name) = places[0]
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), row
