"""What comes along goes by its name; files still go by their paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from cofitune.config.load import load_config
from cofitune.config.shipped import find_shipped, shipped_folder, shipped_names
from cofitune.errors import ConfigError

TASK = "eval: {speciality: [{path: t.jsonl, kind: loss, name: mine}]}\n"


def write(folder: Path, text: str = "") -> Path:
    path = folder / "c.yaml"
    path.write_text(f"model: {{name: m}}\noutput_dir: o\n{text}", encoding="utf-8")
    return path


def test_a_suite_goes_by_its_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    by_name = load_config(write(tmp_path), ["eval.suite=quick", "eval.data=d"]).eval
    by_path = load_config(write(tmp_path), [f"eval.suite={shipped_folder()}/suites/quick.yaml", "eval.data=d"]).eval
    assert by_name == by_path and by_name.versatility.gen_kn


def test_methods_may_be_a_list_of_names_and_files(tmp_path: Path) -> None:
    compare = load_config(write(tmp_path), ["compare.methods=[full, cofitune, my/own.yaml]"]).compare
    assert compare.methods == {"full": "full", "cofitune": "cofitune", "own": "my/own.yaml"}
    assert find_shipped("method", "cofitune").name == "cofitune_rehearsal.yaml"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.suite=quik", "no suite is called 'quik'; did you mean 'quick'?"),
        ("compare.methods=[fulll]", "no method is called 'fulll'; did you mean 'full'?"),
        ("compare.methods={mine: lor}", "no method is called 'lor'; did you mean 'lora'?"),
        ("compare.methods=[full, a/full.yaml]", "two methods are called 'full'"),
    ],
)
def test_a_name_that_nothing_has_is_told_with_the_nearest(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path), [override])
    assert message in str(error.value)


def test_a_file_of_that_very_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick").write_text(TASK, encoding="utf-8")
    assert load_config(write(tmp_path), ["eval.suite=quick"]).eval.speciality[0].name == "mine"


def test_methods_and_suites_come_along() -> None:
    assert {"full", "lora", "cofitune_rehearsal"} <= set(shipped_names("method"))
    assert {"quick", "folder", "paper"} == set(shipped_names("suite"))
