"""What happens to a command: signals, a full disk, a folder that goes away or cannot be written, a second call."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from tests.forker import NAME, PR_SET_CHILD_SUBREAPER, prctl

KINDS = (
    "kill", "kill child", "term", "term child", "term twice", "full disk", "read-only", "deleted", "two at once",
)  # fmt: skip
SECONDS = 900  # in which a call must end, on a busy machine
SECONDS_TO_END = 60  # for the processes of a call whose parent has gone
LEAST, MOST = 1 << 12, 1 << 20  # bytes of a small disk: a few files of the run, or nearly all


class Disk:
    """A file system of its own for a run, where the system allows one; a plain folder elsewhere."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.is_own = os.geteuid() == 0 and _mount("-t", "tmpfs", "-o", "size=64m", "cofitune-faults", str(folder))
        self._covered: Path | None = None

    def shrink(self, rng: random.Random) -> str:
        """Leave only some room above what is there. Returns why it cannot be done, or nothing."""
        if not self.is_own:
            return "only root mounts a small file system"
        used = shutil.disk_usage(self.folder).used
        room = int(LEAST * (MOST / LEAST) ** rng.random())
        _mount("-o", f"remount,size={used + room}", str(self.folder))
        return ""

    def protect(self, folder: Path) -> str:
        """Let nothing be written below a folder. Returns why it cannot be done, or nothing."""
        if not self.is_own:
            return "only root mounts a folder read-only"
        self._covered = folder
        done = _mount("--bind", str(folder), str(folder)) and _mount("-o", "remount,ro,bind", str(folder))
        return "" if done else f"{folder} cannot be mounted read-only"

    def mend(self) -> None:
        """Take back what was done to it."""
        if self._covered:
            subprocess.run(["umount", str(self._covered)], check=True)
            self._covered = None
        if self.is_own:
            _mount("-o", "remount,size=64m", str(self.folder))

    def close(self) -> None:
        """Let go of it, with all that lies in it."""
        self.mend()
        if self.is_own:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def _mount(*words: str) -> bool:
    return subprocess.run(["mount", *words], capture_output=True, check=False).returncode == 0


def processes_below() -> list[psutil.Process]:
    """What runs below this process, but for those that only fork others."""
    below = psutil.Process().children(recursive=True)
    return [process for process in below if _lives(process)]


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.name() != NAME and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def adopt_orphans() -> None:
    """Become the parent of processes below whose own parent ends, so that none is lost sight of."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_what_is_left() -> list[str]:
    """Wait until a call's processes have ended; those that have not are named, and ended."""
    end = time.monotonic() + SECONDS_TO_END
    while (left := processes_below()) and time.monotonic() < end:
        time.sleep(0.1)
    names = []
    for process in left:
        try:
            names.append(" ".join(process.cmdline()[1:5]))
            process.kill()
        except psutil.Error:
            continue
    _reap()
    return names


def _reap() -> None:
    """Take note of adopted children that have ended."""
    for process in psutil.Process().children():
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(process.pid, os.WNOHANG)
        except (psutil.Error, ChildProcessError):
            continue


def send_signals(kind: str, process: subprocess.Popen[str], rng: random.Random) -> None:
    """SIGKILL or SIGTERM to a command or to one of its processes."""
    parent = psutil.Process(process.pid)
    children = [child for child in parent.children(recursive=True) if _lives(child)]
    victim = rng.choice(children) if "child" in kind and children else parent
    signum = signal.SIGKILL if "kill" in kind else signal.SIGTERM
    for _ in range(2 if kind == "term twice" else 1):
        try:
            victim.send_signal(signum)
        except psutil.Error:
            return
        time.sleep(rng.uniform(0, 0.3))


def mistakes_of(stderr: str, code: int) -> str:
    """What is wrong with how a broken command ended: a traceback, or a mistake said more than once."""
    if "Traceback" in stderr:
        return f"a traceback: {stderr[-1500:]}"
    said = [line for line in stderr.splitlines() if line.startswith("error: ")]
    if code == 2 and len(said) != 1:
        return f"{len(said)} messages: {stderr[-1500:]}"
    return ""


def typed(words: list[str]) -> list[str]:
    """A cofitune command as it is typed."""
    return [sys.executable, "-m", "cofitune", *words]


def wait(process: subprocess.Popen[str], seconds: float) -> bool:
    """Whether a process still runs after so many seconds."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


Call = Callable[[], "subprocess.CompletedProcess[str]"]


def call_again(call: Call) -> str:
    """Type the same command beside the one that runs; what is wrong with how it ends."""
    second = call()
    wrong = second.returncode not in (0, 2) or "Traceback" in second.stderr
    return f"the second call ended with {second.returncode}: {second.stderr[-1500:]}" if wrong else ""
