"""`eval.drift`, and tasks of kind drift: what a config may say of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cofitune.config.load import load_config
from cofitune.config.schema import Config
from cofitune.errors import ConfigError


def load(folder: Path, given: str) -> Config:
    path = folder / "c.yaml"
    path.write_text(f"model: {{name: m}}\noutput_dir: run\neval: {{{given}}}\n")
    return load_config(path)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("drift: run/rehearsal", [("drift", "run/rehearsal", None)]),
        ("drift: [a, {path: b, name: other, limit: 5}]", [("drift", "a", None), ("other", "b", 5)]),
        ("drift: {path: a, kind: drift, metric: drift}", [("drift", "a", None)]),
    ],
)
def test_a_folder_alone_is_a_task(tmp_path: Path, given: str, expected: list[tuple[str, str, int | None]]) -> None:
    tasks = load(tmp_path, given).eval.drift
    assert [(t.title, t.path, t.limit) for t in tasks] == expected
    assert {(t.kind, t.scored_by) for t in tasks} == {("drift", "drift")}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("drift: {path: a, prompt: continuation}", r"eval\.drift.*prompt: not with kind drift"),
        ("drift: {path: a, max_new_tokens: 5, stop: x}", r"max_new_tokens, stop: not with kind drift"),
        ("drift: {path: a, on_bad_item: drop}", r"on_bad_item: not with kind drift"),
        ("drift: {path: a, metric: f1}", r"metric f1 does not fit kind drift \(accepted: drift, kl\)"),
        ("drift: {path: a, kind: generate}", r"of kind drift, not of kind generate"),
        ("drift: {harness: arc_easy}", r"eval\.drift"),
        ("drift: {path: a, answer_field: x}", r"answer_field: not with kind drift"),
    ],
)
def test_what_drift_does_not_read_is_refused_by_name(tmp_path: Path, given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, given)
