"""The tests' own order: what a test is called, and where it lies."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent
LONGEST = 70


def test_a_tests_name_has_at_most_70_characters() -> None:
    named = re.compile(r"^ *(?:async )?def (test_\w+)", re.MULTILINE)
    too_long = [
        f"{path.relative_to(TESTS)}: {name}"
        for path in sorted(TESTS.rglob("test_*.py"))
        for name in named.findall(path.read_text())
        if len(name) > LONGEST
    ]
    assert not too_long


def test_tests_lie_in_the_folder_of_what_they_test() -> None:
    """Each folder of tests is one of cofitune/, or of the repository (scripts, docs)."""
    folders = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")}
    strange = [
        str(f)
        for f in sorted(folders)
        if not any((root / f).is_dir() for root in (REPOSITORY / "cofitune", REPOSITORY))
    ]
    assert not strange
