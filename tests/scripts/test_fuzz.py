"""Spoilt inputs in short: `scripts/bench/fuzz` gives thousands."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
INPUTS = {
    "config": 120, "overrides": 120, "data": 80, "questions": 80, "models": 12,
    "reports": 60, "hostfiles": 200, "raw": 40,
}  # fmt: skip


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCH))
    import fuzz

    yield fuzz
    for name in ("fuzz", "fuzz_files", "fuzz_inputs"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("target", list(INPUTS))
def test_spoilt_inputs_are_taken_or_refused_with_a_message(fuzz: Any, tmp_path: Path, target: str) -> None:
    outcomes = fuzz.run(fuzz.Fuzz(1, tmp_path), INPUTS[target], tmp_path / "log.jsonl", [target])
    wrong = [outcome for outcome in outcomes if outcome.result in ("traceback", "hang")]
    assert not wrong, wrong[0].about
    assert {outcome.result for outcome in outcomes} == {"taken", "refused"}


def test_a_flipped_bit_in_our_own_files_is_found_or_harmless(fuzz: Any, tmp_path: Path) -> None:
    import fuzz_files

    outcomes = fuzz.run(fuzz.Fuzz(1, tmp_path), 200, tmp_path / "log.jsonl", ["files"])
    wrong = [outcome for outcome in outcomes if outcome.result not in ("taken", "refused")]
    assert not wrong, wrong[0].about
    assert {path.name for path in (tmp_path / "files").iterdir()} == set(fuzz_files.KINDS)
    assert sum(outcome.result == "refused" for outcome in outcomes) > 150


def test_an_input_follows_from_its_seed_and_number(fuzz: Any) -> None:
    import fuzz_inputs

    texts = [fuzz_inputs.config_text(random.Random(f"0:config:{number}")) for number in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_traceback_and_a_hang_are_found_and_what_is_done_is_not_repeated(
    fuzz: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def reader(_folder: Path, rng: random.Random) -> None:
        asked.append(len(asked))
        if len(asked) == 1:
            raise KeyError("ours")
        while len(asked) == 2:
            rng.random()

    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    tried = fuzz.Fuzz(0, tmp_path)
    tried.targets["config"] = reader
    log = tmp_path / "log.jsonl"
    outcomes = fuzz.run(tried, 3, log, ["config"])
    assert [outcome.result for outcome in outcomes] == ["traceback", "hang", "taken"]
    assert "KeyError: 'ours'" in outcomes[0].about and "--only config:0" in fuzz.report(outcomes, 0)
    assert len(fuzz.run(tried, 4, log, ["config"])) == 4 and len(asked) == 4
    assert [json.loads(line)["number"] for line in log.read_text().splitlines()] == [0, 1, 2, 3]
