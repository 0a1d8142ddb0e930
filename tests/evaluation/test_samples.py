"""A task's result on the disk: what was saved is read back, and an unfinished one is none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cofitune.errors import ArtifactError
from cofitune.evaluation import samples as samples_module
from cofitune.evaluation.metrics import METRICS
from cofitune.evaluation.samples import Sample, TaskResult, load_result, save_result

SAMPLES = (
    Sample(1, "Q?", 1, None, (-1.25, -0.5), 1, 1),
    Sample(3, "Frage\u2028?", ["ä", "b"], "ä\n", None, None, 0.5),
)
RESULT = TaskResult("t", "gen_kn", METRICS["acc"], 0.75, 0.25, SAMPLES, 1.5, {"acc_norm": 0.5})


def test_a_result_is_read_back_as_it_was(tmp_path: Path) -> None:
    save_result(RESULT, tmp_path / "a" / "t.jsonl")
    assert load_result(tmp_path / "a" / "t.jsonl") == RESULT
    assert len((tmp_path / "a" / "t.jsonl").read_text(encoding="utf-8").split("\n")) == 3


def test_an_interruption_between_the_files_leaves_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.jsonl"
    assert load_result(path) is None
    save_result(RESULT, path)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(samples_module, "write_checked_json", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_result(replace(RESULT, samples=SAMPLES[:1]), path)
    assert path.exists()
    assert load_result(path) is None  # the old figures must not stand beside the new samples


def test_samples_that_were_edited_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    save_result(RESULT, path)
    path.write_text(path.read_text(encoding="utf-8").replace("0.5", "1.0"), encoding="utf-8")
    with pytest.raises(ArtifactError, match="changed since it was written"):
        load_result(path)
    save_result(RESULT, path)
    beside = path.with_suffix(".json")
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"unknown": 1}))
    with pytest.raises(ArtifactError, match="damaged"):
        load_result(path)


@pytest.mark.parametrize(("old", "new"), [('"chance": 0.25', '"chance": 0.75'), ('"unit": "share"', '"unit": "nats"')])
def test_figures_that_were_changed_are_refused(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "t.jsonl"
    save_result(RESULT, path)
    beside = path.with_suffix(".json")
    text = beside.read_text()
    assert old in text
    beside.write_text(text.replace(old, new))
    with pytest.raises(ArtifactError, match="its checksum differs"):
        load_result(path)


def test_figures_of_an_older_version_have_no_checksum_and_are_read(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    save_result(RESULT, path)
    figures = json.loads(path.with_suffix(".json").read_text())
    del figures["checksum"]
    path.with_suffix(".json").write_text(json.dumps(figures))
    assert load_result(path) == RESULT
