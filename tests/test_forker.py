"""A forked process is what the same command is as an interpreter of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from tests import forker

pytestmark = pytest.mark.processes

TELL = """
import json, os, signal, sys, cofitune
about = {"argv": sys.argv, "folder": os.getcwd(), "parent": os.getppid(), "own session": os.getsid(0) == os.getpid()}
about |= {"name": os.environ.get("NAME"), "input": sys.stdin.read(), "main": __name__, "unread": "GONE" in os.environ}
about |= {"encoding": sys.stdout.encoding, "errors": sys.stdout.errors, "packages": "/packages" in sys.path}
about |= {"customized": hasattr(sys, "customized"), "hangs up": signal.getsignal(signal.SIGHUP) is signal.SIG_DFL}
about |= {"open": os.path.realpath("/proc/self/fd/" + sys.argv[1]).endswith("/lock")}
print(json.dumps(about))
print("to stderr", file=sys.stderr)
sys.exit(3)
"""


def tell(folder: Path, what: list[str], descriptor: int, **options: Any) -> tuple[dict[str, Any], str, int]:
    (folder / "sitecustomize.py").write_text("import sys\nsys.customized = True\n")
    packages = os.pathsep.join(["/packages", str(folder)])
    own = {"NAME": "Wert ü", "PYTHONPATH": packages, "PYTHONIOENCODING": "iso8859-1:replace"}
    environment = {name: value for name, value in os.environ.items() if name != "GONE"} | own
    done = subprocess.run(
        [sys.executable, *what, str(descriptor)],
        cwd=folder, env=environment, input="line\n", capture_output=True, text=True, check=False, **options,
    )  # fmt: skip
    return json.loads(done.stdout), done.stderr, done.returncode


@pytest.mark.parametrize(("inherits", "what"), [(True, ["-c", TELL]), (False, ["-c", TELL]), (False, ["tell.py"])])
def test_it_has_what_an_interpreter_has(
    inherits: bool, what: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GONE", "1")
    (tmp_path / "tell.py").write_text(TELL)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if inherits else signal.SIG_DFL)
    with (tmp_path / "lock").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        options = {"close_fds": not inherits, "start_new_session": inherits}
        forked = tell(tmp_path, what, file.fileno(), **options)
        monkeypatch.setattr(forker, "ENABLED", [False])
        assert forked == tell(tmp_path, what, file.fileno(), **options)
    signal.signal(signal.SIGHUP, before)
    about, stderr, code = forked
    assert (stderr, code) == ("to stderr\n", 3)
    assert (about["encoding"], about["errors"], about["packages"]) == ("iso8859-1", "replace", True)
    assert about["customized"] and about["hangs up"] != inherits
    assert about["parent"] == os.getpid() and about["own session"] == about["open"] == inherits


def test_signals_end_it_and_what_it_starts_is_forked_too() -> None:
    inner = "import cofitune, time\nprint('up', flush=True)\ntime.sleep(60)"
    outer = f"import cofitune, subprocess, sys\nsubprocess.run([sys.executable, '-c', {inner!r}])"
    process = subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    below = psutil.Process(process.pid).children()
    assert [child.name() == forker.NAME for child in below].count(True) == 1 and len(below) == 2
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=300) == -signal.SIGTERM
    assert process.stdout.read() == "", "nobody is left who has it open"
    process.stdout.close()
    psutil.wait_procs(below, timeout=300)
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in below)


@pytest.mark.parametrize("arguments", [["-c", "print(1)"], ["-I", "-m", "cofitune"], ["script.py"]])
def test_other_commands_are_left_alone(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text("print(1)")
    assert forker._understood({"args": [sys.executable, *arguments], "env": None, "cwd": None}) is None
