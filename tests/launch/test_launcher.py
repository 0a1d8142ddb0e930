"""What the launcher leaves behind when it is stopped, and what it makes of exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from cofitune import cli
from cofitune.config.load import load_config
from cofitune.errors import UserError
from cofitune.files import exclusive
from cofitune.launch import command, failures, launcher
from cofitune.ranks import VARIABLES, Rank, is_launched, this_rank
from tests.helpers import run_command


@pytest.mark.processes
def test_a_trial_that_outlives_its_search_still_holds_the_lock(tmp_path: Path) -> None:
    with exclusive(tmp_path / "search", "search"):
        orphan = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    with pytest.raises(UserError, match="another search is writing here"), exclusive(tmp_path / "search", "search"):
        pass
    orphan.communicate(b"\n")
    with exclusive(tmp_path / "search", "search"):
        pass


@pytest.mark.processes
def test_a_failed_proxy_says_the_last_thing_that_its_process_said(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"model: {{name: {tmp_path}/none}}\noutput_dir: {tmp_path}/run\n")
    config = load_config(tmp_path / "c.yaml")
    with pytest.raises(UserError, match=r"error: model\.name: .*none: no such folder \(exit 2; .*proxy\.log\)"):
        command.start_proxy(config, tmp_path / "proxy.json", launcher.ONE_PROCESS)


def test_a_proxy_that_does_not_end_in_time_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[str] = []

    class Deaf:
        """A process that continues when it is told to end; the search is interrupted as it waits for it."""

        def __init__(self, *_: object, **__: object) -> None:
            did.append("start")

        def wait(self, timeout: float | None = None) -> int:
            if timeout is None:
                raise KeyboardInterrupt
            raise subprocess.TimeoutExpired("proxy", timeout)

        def terminate(self) -> None:
            did.append("terminate")

        def kill(self) -> None:
            did.append("kill")

    (tmp_path / "c.yaml").write_text(f"model: {{name: {tmp_path}/none}}\noutput_dir: {tmp_path}/run\n")
    config = load_config(tmp_path / "c.yaml")
    monkeypatch.setattr(subprocess, "Popen", Deaf)
    with pytest.raises(KeyboardInterrupt):
        command.start_proxy(config, tmp_path / "proxy.json", launcher.ONE_PROCESS)
    assert did == ["start", "terminate", "kill"]


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


ExitCode = Callable[[dict[int, tuple[int, Exception | None]]], int]


@pytest.fixture
def exit_code_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExitCode:
    """Ranks that fail one after the other, as torch's launcher finds them: exit code, and what was raised."""

    def fail(ranks: dict[int, tuple[int, Exception | None]]) -> int:
        results = {}
        for rank, (code, error) in ranks.items():
            path = tmp_path / f"{rank}.json"
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
            if error is not None:
                failures.tell_parent(type(error), error, error.__traceback__)
            results[rank] = ProcessFailure(local_rank=rank, pid=rank, exitcode=code, error_file=str(path))
        return failures.tell_failures(results)

    return fail


def test_what_all_ranks_say_is_said_once(exit_code_of: ExitCode, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of({0: (2, UserError("no")), 1: (2, UserError("no"))}) == 2
    assert capsys.readouterr().err == "error: no\n"
    assert exit_code_of({0: (1, RuntimeError("ours")), 2: (1, RuntimeError("ours"))}) == 1
    assert capsys.readouterr().err == "ranks 0, 2: RuntimeError: ours\n"


def test_a_mistake_of_one_rank_hides_what_it_did_to_the_others(
    exit_code_of: ExitCode, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = RuntimeError("connection closed by peer")
    assert exit_code_of({0: (1, broken), 1: (2, UserError("no file here")), 2: (-signal.SIGTERM, None)}) == 2
    assert capsys.readouterr().err == "rank 1: error: no file here\n"


def test_a_killed_rank_is_named_with_its_exit_code(exit_code_of: ExitCode, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of({0: (143, None), 1: (-signal.SIGKILL, None)}) == 128 + signal.SIGKILL
    assert "rank 1: was killed from outside" in capsys.readouterr().err


@pytest.mark.processes
def test_a_crash_of_every_rank_shows_one_traceback(tmp_path: Path, tiny_model_folder: Path) -> None:
    """Two real ranks; torch's process group sets an excepthook of its own, which ours must outlive."""
    (tmp_path / "items.jsonl").write_text('{"instruction": "Say void", "output": "void"}\n')
    (tmp_path / "c.yaml").write_text(
        f"model: {{name: {tiny_model_folder}}}\ndata: {{train: {tmp_path}/items.jsonl}}\noutput_dir: {tmp_path}/run\n"
    )
    # Python reads this file at its start; it breaks the recipe in the ranks alone
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "def broken(*_): raise RuntimeError('ours')\n"
        "if 'RANK' in os.environ:\n"
        "    from cofitune.recipes.train import steps\n"
        "    steps.start_engine = broken\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "cofitune", "train", str(tmp_path / "c.yaml"), "--num-processes", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 1
    assert done.stderr.count("RuntimeError: ours") == 1, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["search", "export"])
def test_a_command_of_one_process_refuses_to_be_one_of_several(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert run_command(monkeypatch, command, "c.yaml", *(["--to", "x"] if command == "export" else [])) == 2
    assert f"cofitune {command} is one process" in capsys.readouterr().err


def test_hosts_and_a_number_of_ranks_are_not_asked_for_together(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=2\nb slots=1\n")
    assert launcher.choose_ranks(None, tmp_path / "hosts").count == 3
    with pytest.raises(UserError, match="give one"):
        launcher.choose_ranks(2, tmp_path / "hosts")


@pytest.mark.processes
@pytest.mark.interpreter
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
