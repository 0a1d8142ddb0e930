"""What the launcher leaves behind when it is stopped, and what it makes of exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cofitune import cli, launch
from cofitune.config.load import load_config
from cofitune.errors import UserError
from cofitune.ranks import Rank, is_launched, this_rank
from cofitune.search.store import exclusive
from cofitune.search.trial import TrialError


def test_a_trial_that_outlives_its_search_still_holds_the_lock(tmp_path: Path) -> None:
    with exclusive(tmp_path / "search"):
        orphan = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    with pytest.raises(UserError, match="another search is writing here"), exclusive(tmp_path / "search"):
        pass
    orphan.communicate(b"\n")
    with exclusive(tmp_path / "search"):
        pass


def test_a_failed_trial_says_the_last_thing_that_its_process_said(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"model: {{name: {tmp_path}/none}}\noutput_dir: {tmp_path}/run\n")
    config = load_config(tmp_path / "c.yaml")
    with pytest.raises(TrialError, match=r"error: model\.name: .*none: no such folder \(exit 2; .*trial\.log\)"):
        launch.start_trial(config, tmp_path / "run", train=True, num_processes=1)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"WORLD_SIZE": "4"}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, Rank(3, 1, 4)),
    ],
)
def test_a_rank_is_one_only_by_all_three_variables(
    variables: dict[str, str], expected: Rank | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_launched() == (expected is not None)
    assert this_rank() == (expected or Rank())


def test_help_and_a_mistake_in_the_config_need_no_torch(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: {nam: x}\n")
    code = (
        "import sys; from cofitune import cli\n"
        f"sys.argv = ['cofitune', 'train', {str(tmp_path / 'c.yaml')!r}]\n"
        "try: cli.main()\n"
        "except SystemExit as stop: assert stop.code == 2, stop.code\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "model.nam: unknown key; did you mean 'name'?" in done.stderr


def test_a_bug_of_ours_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(cli, "load_config", broken)
    monkeypatch.setattr(sys, "argv", ["cofitune", "train", "c.yaml"])
    with pytest.raises(RuntimeError, match="ours"):
        cli.main()
