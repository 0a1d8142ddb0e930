"""Suites: whose tasks stand where, from which folder they start, and whose line a mistake is in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cofitune.config.load import dump_config, load_config
from cofitune.errors import ConfigError

SUITE = """
eval:
  speciality: [{path: law/test.jsonl, kind: generate}]
  versatility:
    gen_kn:
      - {path: mmlu/test.jsonl, kind: multiple_choice, limit: 100}
      - {harness: arc_easy, dataset_path: arc_easy}
    instruct: {path: /elsewhere/ifeval.jsonl, kind: ifeval}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "suite.yaml").write_text(SUITE)
    return tmp_path


def load(text: str, *overrides: str) -> Any:
    Path("c.yaml").write_text("model: {name: some/model}\noutput_dir: runs/x\n" + text)
    return load_config("c.yaml", list(overrides))


def paths(tasks: Any) -> list[str]:
    return [task.path or task.dataset_path for task in tasks]


def test_a_suites_tasks_start_from_the_data_folder(place: Path) -> None:
    config = load("eval: {suite: suite.yaml, data: my/data, batch_size: 4}\n")
    assert paths(config.eval.speciality) == ["my/data/law/test.jsonl"]
    assert paths(config.eval.versatility.gen_kn) == ["my/data/mmlu/test.jsonl", "my/data/arc_easy"]
    assert paths(config.eval.versatility.instruct) == ["/elsewhere/ifeval.jsonl"]
    assert (config.eval.batch_size, config.eval.suite, config.eval.data) == (4, None, None)
    (place / "again.yaml").write_text(dump_config(config))
    (place / "suite.yaml").unlink()
    assert load_config("again.yaml") == config  # the resolved config needs the suite no more


def test_what_the_config_names_itself_is_kept(place: Path) -> None:
    own = "{path: mine.jsonl, kind: generate, metric: f1}"
    config = load(f"eval: {{suite: suite.yaml, data: d, speciality: {own}, versatility: {{gen_kn: {own}}}}}\n")
    assert paths(config.eval.speciality) == ["d/mine.jsonl"]
    assert paths(config.eval.versatility.gen_kn) == ["d/mine.jsonl"]
    assert paths(config.eval.versatility.instruct) == ["/elsewhere/ifeval.jsonl"]


def test_overrides_name_the_suite_and_change_its_tasks(place: Path) -> None:
    config = load(
        "", "eval.speciality.0.limit=7", "eval.data=d", "eval.suite=suite.yaml", "search.eval.suite=suite.yaml"
    )
    assert (config.eval.speciality[0].limit, config.eval.speciality[0].path) == (7, "d/law/test.jsonl")
    assert paths(config.search.eval.speciality) == ["law/test.jsonl"]


def test_mistakes_are_in_the_suites_lines(place: Path) -> None:
    broken = SUITE.replace("limit: 100", "limits: 100").replace("kind: ifeval", "kind: ifval") + "train: {}\n"
    (place / "suite.yaml").write_text(broken)
    with pytest.raises(ConfigError) as caught:
        load("eval: {suite: suite.yaml}\n")
    first, second, third = caught.value.problems
    assert first == "suite.yaml:9: train: a suite holds one section, eval"
    assert second.startswith("suite.yaml:6: eval.versatility.gen_kn.0.limits: unknown key; did you mean 'limit'?")
    assert third.startswith("suite.yaml:8: eval.versatility.instruct.kind: must be")


def test_a_suite_that_is_none_is_told(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"suit\.yaml: no such config file; did you mean 'suite\.yaml'\?"):
        load("eval: {suite: suit.yaml}\n")
    with pytest.raises(ConfigError, match=r"eval\.suite: must be a text"):
        load("eval: {suite: [suite.yaml]}\n")
    (place / "suite.yaml").write_text("speciality: []\n")
    with pytest.raises(ConfigError, match=r"suite\.yaml:1: speciality: a suite holds one section, eval"):
        load("eval: {suite: suite.yaml}\n")
    (place / "suite.yaml").write_text("eval: {suite: suite.yaml}\n")
    with pytest.raises(ConfigError, match=r"suite\.yaml:1: a suite names no other suite"):
        load("eval: {suite: suite.yaml}\n")
