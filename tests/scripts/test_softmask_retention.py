"""The study of masks where training forgets: whole on a tiny model, and what its report makes of the runs."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scipy import stats

from tests.helpers import read_jsonl, run_command, write_jsonl

ROOT = Path(__file__).parents[2]
WORDS = ["court", "contract", "tenant", "lease", "seller", "buyer", "void", "notice", "reason", "landlord"]


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "bench"))
    before = set(sys.modules)
    yield importlib.import_module("softmask_retention")
    for name in set(sys.modules) - before:
        if Path(str(getattr(sys.modules[name], "__file__", "") or "")).parent == ROOT / "scripts" / "bench":
            del sys.modules[name]


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """The demo's files, a few items each."""
    for folder in ("demo", "data/replay"):
        (tmp_path / folder).mkdir(parents=True)
    items = [{"instruction": "Say it.", "input": WORDS[i % 10], "output": WORDS[i % 7]} for i in range(40)]
    for part in ("train", "dev", "test"):
        write_jsonl(tmp_path / "demo" / f"ledger_{part}.jsonl", items if part == "train" else items[:6])
    asked = [
        {"key": i, "prompt": f"Name {word}.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
        for i, word in enumerate(WORDS[:3])
    ]
    for name in ("instruct", "instruct_other"):
        write_jsonl(tmp_path / "demo" / f"{name}.jsonl", asked)
    write_jsonl(tmp_path / "demo" / "general_prompts.jsonl", [{"prompt": f"What is a {word}?"} for word in WORDS])
    write_jsonl(tmp_path / "data" / "replay" / "train.jsonl", items[:8])
    return tmp_path / "demo"


def test_the_study_runs_resumes_and_reports(
    study: ModuleType, tiny_model_folder: Path, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = demo.parent
    places = ["--data", here / "data", "--demo", demo, "--model", tiny_model_folder, "--work", here / "work"]
    sizes = ["--steps=4", "--every=2", "--rate=1e-2", "--target=0.01", "--importance-items=6", "--prompts=8"]
    wanted = ["--out", here / "out", "--masks", "fisher", "columns", "--seeds=1"]
    typed: list[object] = []

    def in_this_process(*words: object) -> None:
        typed.append(words[0])
        assert run_command(monkeypatch, *words) == 0

    def run(*words: str) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["softmask_retention.py", *map(str, [*places, *sizes, *wanted]), *words])
        study.main()
        return read_jsonl(here / "out" / "softmask-retention.jsonl")

    monkeypatch.setattr(study, "cofitune", in_this_process)
    first = run("--part=1/2")
    assert typed == ["rehearse", "importance", "importance"]
    assert "**Partial: 3 of 6 runs.**" in (here / "out" / "softmask-retention.md").read_text()
    lines = run()
    assert lines[: len(first)] == first and len(lines) == 6, "a run that is there is not made again"
    by_run = {(line["run"]["mask"], line["run"]["control"]): line for line in lines}
    assert by_run["none", "none"]["mean_factor"] == 1
    for mask in ("fisher", "columns"):
        own, dealt = by_run[mask, "the mask"], by_run[mask, "shuffled"]
        assert own["mean_factor"] == pytest.approx(dealt["mean_factor"], abs=1e-6) and own["mean_factor"] < 1
        assert own["curve"] != dealt["curve"], "the factors lie on other units"
    assert all(line["curve"][0][1] > line["dev_loss"] and line["kl"] > 0 for line in lines), "it learns, and moves"
    report = (here / "out" / "softmask-retention.md").read_text()
    assert "Partial" not in report and "| columns | shuffled | 1 |" in report


def test_each_mask_has_its_two_controls(study: ModuleType) -> None:
    runs = [(run.mask, run.control) for run in study.runs_of(list(study.MASKS), 1)]
    assert len(runs) == len(set(runs))
    for mask in study.MASKS:
        assert {(mask, "the mask"), (mask, "shuffled"), (study.SERVED_BY[mask], "one factor")} <= set(runs)


def test_the_divergence_is_read_off_at_the_target(study: ModuleType) -> None:
    assert study.at_target([0.3, 0.1], [1.0, 2.0], 0.2) == pytest.approx(1.5)
    assert study.at_target([0.3, 0.25], [1.0, 2.0], 0.2) == 2.0, "never reached: the last look"


def _line(kl: float, followed: list[float]) -> dict[str, Any]:
    return {"kl": kl, "items": {"instruct_like": followed, "instruct_unlike": followed}}


def test_a_difference_is_paired_by_seed(study: ModuleType) -> None:
    own = {0: _line(0.10, [1, 0]), 1: _line(0.30, [1, 1]), 2: _line(0.22, [0, 0])}
    other = {0: _line(0.20, [0, 0]), 1: _line(0.42, [1, 0]), 2: _line(0.30, [0, 0])}
    mean, half = study.difference(own, other, "KL to the base")
    expected = stats.ttest_rel([0.10, 0.30, 0.22], [0.20, 0.42, 0.30]).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((expected.low, expected.high))
    assert study.difference(own, other, "instruct")[0] == pytest.approx(100 / 3)
    assert math.isinf(study.difference({0: own[0]}, {0: other[0]}, "instruct")[1]), "one seed claims nothing"


def test_the_words_follow_the_interval(study: ModuleType) -> None:
    near, far = ({seed: _line(kl + seed / 100, [1, 0]) for seed in range(3)} for kl in (0.2, 0.4))
    table = {("none", "none"): far, ("fisher", "the mask"): near, ("fisher", "shuffled"): near}
    message = study.answers(table)
    assert "to no mask -0.200 (± 0.000), **better**; to shuffled +0.000 (± 0.000), not told apart." in message
    assert json.dumps(message)
