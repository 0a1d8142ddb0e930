"""Keys by their old names: read as the new ones, told in one line, refused beside the new one."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from cofitune import cli
from cofitune.config.load import load_config, load_resolved, overlay
from cofitune.config.renamed import RenamedKeyWarning
from cofitune.errors import ConfigError

OSF = {"kind": "osf", "target_modules": ["down_proj"]}


def write(folder: Path, **sections: Any) -> Path:
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump({"model": {"name": "base"}, "output_dir": "run", **sections}))
    return path


def test_old_keys_are_read_and_their_new_names_told(tmp_path: Path) -> None:
    path = write(tmp_path, train={"keep_last": 5}, adapter={**OSF, "kept": 0.25})
    with pytest.warns(RenamedKeyWarning) as told:
        config = load_config(path)
    assert config.train.save_total_limit == 5 and config.adapter and config.adapter.effective_rank == 0.25
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "keep_last" in text)
    assert f"{path}:{line}: train.keep_last is called train.save_total_limit now" in str(told[0].message)
    assert "adapter.kept is called adapter.effective_rank now" in str(told[1].message)


def test_a_run_of_an_earlier_version_is_read_without_a_word(tmp_path: Path) -> None:
    path = write(tmp_path, train={"keep_last": 5})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_resolved(path).train.save_total_limit == 5


def test_a_value_under_an_old_key_is_checked_at_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, train={"keep_last": 0})
    with pytest.warns(RenamedKeyWarning), pytest.raises(ConfigError, match=r"c\.yaml:\d+: train\.save_total_limit: "):
        load_config(path)


def test_both_names_of_one_setting_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, train={"keep_last": 5, "save_total_limit": 3})
    with pytest.raises(
        ConfigError, match=r"train\.keep_last is an old name of train\.save_total_limit, which is given"
    ):
        load_config(path)
    with pytest.raises(ConfigError, match=r"override 'train\.keep_last=5': train\.keep_last is an old name"):
        load_config(write(tmp_path), ["train.keep_last=5", "train.save_total_limit=3"])


@pytest.mark.parametrize(
    ("in_file", "override"), [("save_total_limit", "keep_last"), ("keep_last", "save_total_limit")]
)
def test_an_override_goes_before_the_file_by_either_name(tmp_path: Path, in_file: str, override: str) -> None:
    path = write(tmp_path, train={in_file: 5})
    with pytest.warns(RenamedKeyWarning):
        assert load_config(path, [f"train.{override}=3"]).train.save_total_limit == 3


@pytest.mark.parametrize("train", ["keep_last", ["keep_last"], 3])
def test_a_section_that_is_no_mapping_is_left_to_the_schema(tmp_path: Path, train: Any) -> None:
    path = write(tmp_path, train=train)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConfigError, match="train"):
            load_config(path)


def test_a_methods_sections_may_have_old_keys_and_stay_as_given(tmp_path: Path) -> None:
    config = load_config(write(tmp_path))
    given: dict[str, Any] = {"region": None, "adapter": {**OSF, "kept": 0.25}}
    with pytest.warns(RenamedKeyWarning, match=r"compare\.methods\.osf: adapter\.kept is called"):
        result = overlay(config, given, "compare.methods.osf", {})
    assert result.adapter and result.adapter.effective_rank == 0.25
    assert given["adapter"]["kept"] == 0.25
    (tmp_path / "osf.yaml").write_text(yaml.safe_dump(given))
    with pytest.warns(RenamedKeyWarning, match=r"osf\.yaml:2: adapter\.kept"):
        assert overlay(config, str(tmp_path / "osf.yaml"), "compare.methods.osf", {}) == result


def test_the_command_line_says_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, train={"keep_last": 5})
    monkeypatch.setattr(sys, "argv", ["cofitune", "train", str(path), "--dry-run"])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back what the command sets
    with pytest.raises(SystemExit):
        cli.main()
    lines = [line for line in capsys.readouterr().err.splitlines() if "keep_last" in line]
    assert len(lines) == 1 and lines[0].startswith(f"warning: {path}:") and "train.save_total_limit" in lines[0]
