"""A run's folders: whose they are, and when they are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cofitune.config.load import load_config
from cofitune.config.schema import Config
from cofitune.errors import UserError
from cofitune.recipes.folders import check_folder, environment, start_folder


@pytest.fixture
def config(tmp_path: Path) -> Config:
    path = tmp_path / "c.yaml"
    path.write_text(f"model: {{name: m}}\noutput_dir: {tmp_path / 'run'}\ndata: {{train: a.jsonl}}\n", encoding="utf-8")
    return load_config(path)


def change(config: Config, section: str, **update: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=update)})


def test_checking_writes_nothing(config: Config) -> None:
    assert check_folder(config, "train", overwrite=False) == config.run / "train"
    assert not config.run.exists()


def test_the_folder_holds_the_resolved_config_which_repeats_the_run(config: Config) -> None:
    folder = start_folder(config, "train", overwrite=False)
    assert folder == config.run / "train"
    for path in (folder / "config.yaml", config.run / "config.yaml"):
        assert load_config(path) == config
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    assert text.startswith("# cofitune ") and "torch" in text.splitlines()[0] and "# git: " in text


def test_the_same_config_may_go_on(config: Config) -> None:
    folder = start_folder(config, "train", overwrite=False)
    (folder / "kept").touch()
    assert start_folder(config, "train", overwrite=False) == folder
    assert (folder / "kept").exists()


def test_a_section_that_the_command_reads_may_not_differ(config: Config) -> None:
    start_folder(config, "train", overwrite=False)
    other = change(change(config, "train", learning_rate=1.0), "data", max_length=7)
    with pytest.raises(UserError) as caught:
        check_folder(other, "train", overwrite=False)
    assert "train.learning_rate is 4e-05 there and 1.0 here" in str(caught.value)
    assert "data.max_length is 512 there and 7 here" in str(caught.value)
    assert "--overwrite" in str(caught.value)
    with pytest.raises(UserError):
        start_folder(other, "train", overwrite=False)
    assert load_config(config.run / "train" / "config.yaml") == config


def test_many_differences_are_cut_short(config: Config) -> None:
    start_folder(config, "train", overwrite=False)
    other = change(config, "train", learning_rate=1.0, seed=2, weight_decay=0.5, max_steps=3)
    with pytest.raises(UserError, match="; …"):
        check_folder(other, "train", overwrite=False)


@pytest.mark.parametrize("section", ["importance", "eval", "search"])
def test_a_section_that_the_command_does_not_read_may_differ(config: Config, section: str) -> None:
    start_folder(config, "train", overwrite=False)
    updates: dict[str, dict[str, Any]] = {"importance": {"seed": 7}, "eval": {"batch_size": 1}, "search": {"beam": 3}}
    other = change(config, section, **updates[section])
    assert check_folder(other, "train", overwrite=False) == config.run / "train"


def test_the_region_may_change_its_kind(config: Config) -> None:
    start_folder(config, "train", overwrite=False)
    with pytest.raises(UserError, match="region is"):
        check_folder(config.model_copy(update={"region": "search"}), "train", overwrite=False)
    assert check_folder(config.model_copy(update={"region": "search"}), "eval", overwrite=False)


def test_commands_do_not_disturb_each_other(config: Config) -> None:
    start_folder(config, "importance", overwrite=False)
    start_folder(change(config, "importance", seed=7), "train", overwrite=False)
    assert check_folder(config, "importance", overwrite=False)


def test_overwrite_takes_away_what_is_ours_and_nothing_else(config: Config) -> None:
    folder = start_folder(config, "train", overwrite=False)
    own = [
        "delta.safetensors",
        "metrics.jsonl",
        "checkpoints/step-000003/random.safetensors",
        "adapter/adapter_config.json",
    ]
    theirs = [
        "law.jsonl",
        "notes/manifest.json",
        "checkpoints/step-final/manifest.json",
        "checkpoints/step-000003/why.md",
    ]
    for name in (*own, *theirs):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "adapter" / "link").symlink_to(config.run)
    beside = start_folder(config, "importance", overwrite=False)
    other = change(config, "train", seed=1)
    assert start_folder(other, "train", overwrite=True) == folder
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    assert left == {*theirs, "config.yaml"} and (folder / "adapter" / "link").is_symlink()
    assert load_config(folder / "config.yaml") == other
    assert beside.is_dir(), "only the command's own folder"


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_that_is_not_ours_is_refused(config: Config, overwrite: bool) -> None:
    (config.run / "train").mkdir(parents=True)
    (config.run / "train" / "law.jsonl").touch()
    with pytest.raises(UserError, match=r"run/train is no folder of ours: it holds law.jsonl"):
        check_folder(config, "train", overwrite)


@pytest.mark.parametrize("place", ["config.yaml", "train/config.yaml"])
def test_a_config_of_the_users_is_not_replaced(config: Config, place: str) -> None:
    (config.run / "train").mkdir(parents=True)
    (config.run / place).write_text("model: {name: m}\n")
    with pytest.raises(UserError, match=f"{place} is not ours and would be replaced"):
        check_folder(config, "train", overwrite=True)


def test_data_inside_the_folder_that_is_written_are_refused(config: Config, tmp_path: Path) -> None:
    inside = tmp_path / "run" / "train" / "a.jsonl"
    data = config.data.model_copy(update={"train": (config.data.train[0].model_copy(update={"path": str(inside)}),)})
    with pytest.raises(UserError, match=r"a.jsonl lies in .*run/train, which this command writes"):
        check_folder(config.model_copy(update={"data": data}), "train", overwrite=True)


def test_what_a_killed_process_left_is_taken_away(config: Config) -> None:
    folder = start_folder(config, "train", overwrite=False)
    left = folder / "checkpoints" / ".manifest.json.0123abcd.cofitune.tmp"
    left.parent.mkdir()
    left.touch()
    (config.run / ".config.yaml.0123abcd.cofitune.tmp").touch()
    start_folder(config, "train", overwrite=False)
    assert not left.exists() and {p.name for p in config.run.iterdir()} == {"config.yaml", "day.txt", "train"}


def test_a_place_that_is_no_folder_is_refused(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    blocked = config.model_copy(update={"output_dir": str(tmp_path / "file" / "run")})
    with pytest.raises(UserError, match=r"output_dir: .* cannot be written \(.*file is not a writable folder\)"):
        check_folder(blocked, "train", overwrite=False)


def test_a_relative_output_dir_is_checked_from_where_we_stand(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    relative = config.model_copy(update={"output_dir": "deep/run"})
    assert check_folder(relative, "train", overwrite=False) == Path("deep/run/train")
    start_folder(relative, "train", overwrite=False)
    assert (tmp_path / "deep" / "run" / "train" / "config.yaml").is_file()


def test_the_environment_is_two_lines() -> None:
    lines = environment()
    assert len(lines) == 2 and all("\n" not in line for line in lines)
    assert lines[0].startswith("cofitune ") and "transformers" in lines[0]
