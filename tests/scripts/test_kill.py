"""The kill test in short: `scripts/bench/kill` does thirty."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.processes

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    import kill

    yield kill
    sys.modules.pop("kill", None)


def test_a_killed_training_ends_with_the_bits_of_one_that_was_not(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["kill", "--kills", "2", "--out", str(tmp_path / "kill.md")])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    report = (tmp_path / "kill.md").read_text()
    assert ended.value.code == 0, report
    assert "are, bit for bit, those of the run that nobody killed" in report
