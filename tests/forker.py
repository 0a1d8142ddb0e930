"""Start Python processes by a fork of one that has imported the libraries already, instead of importing them again.

A `cofitune` imports torch, transformers and DeepSpeed for seven seconds, and the tests start more than a hundred. Here
`subprocess.Popen` is changed so that the Python commands of the tests are forked from a process that is clean and has
all imports: the forker. The new process is a real child of who called Popen, with the pid, the signals, the exit code,
the open files and the environment that it would have; what it starts by Popen in turn is forked, too.

The forker forks twice and the process between ends. The system then makes the caller the new process' parent, for the
caller has asked to be the reaper of orphans below it. That needs a forker below each caller, so that each process that
is no rank gets one of its own, by a fork.
"""

from __future__ import annotations

import array
import atexit
import ctypes
import gc
import importlib
import inspect
import io
import json
import multiprocessing.context
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 15, 36  # of Linux' prctl
SCRIPT = "script"  # where others have -m or -c
NAME = "test-forker"  # as `ps` and psutil show it
MODULES = (
    "cofitune.cli", "cofitune.recipes.alpha.recipe", "cofitune.recipes.compare.recipe",
    "cofitune.recipes.evaluate.recipe", "cofitune.recipes.export", "cofitune.recipes.importance.recipe",
    "cofitune.recipes.rehearse.recipe", "cofitune.recipes.report.recipe", "cofitune.recipes.search.recipe",
    "cofitune.recipes.search.proxy", "cofitune.recipes.train.recipe", "cofitune.recipes.trial.runner",
    "cofitune.evaluation.harness.model", "torch.distributed.run", "transformers.models.llama.modeling_llama",
    "deepspeed", "lm_eval.models.huggingface", "lm_eval.evaluator", "datasets",
    # what DeepSpeed imports at its first engine, torch at the first start of ranks, and what all of that imports
    "setuptools", "distutils.ccompiler", "deepspeed.ops.op_builder.all_ops", "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer", "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend",
    "pydantic.type_adapter", "rich.status", "encodings.utf_8_sig",
)  # fmt: skip
READ_ON_IMPORT = ("HF_", "OMP_", "PYTHON", "TRANSFORMERS_", "LC_", "LANG", "CUDA_", "LD_", "TORCH_COMPILE")
ENABLED = [True]  # whether processes are forked: a test may want interpreters that import by themselves
HEEDED = {"PYTHONPATH", "PYTHONIOENCODING"}  # by `_run`
HANDED_ON = (signal.SIGHUP, signal.SIGQUIT)  # a program that is started goes on ignoring what its parent ignored


class Forker:
    """The caller's end: asks for processes, one after the other."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._lock = threading.Lock()

    def start(self, request: dict[str, Any], files: dict[int, int]) -> int:
        """Start what the request says and return its pid.

        Args:
            files: for each descriptor of the new process, which of the caller's it is.
        """
        with self._lock:
            prctl(PR_SET_CHILD_SUBREAPER, 1)
            try:
                body = json.dumps({**request, "parent": os.getpid(), "files": list(files)}).encode()
                header = len(body).to_bytes(8, "big")
                self._line.sendmsg([header], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files.values()))])
                self._line.sendall(body)
                return int.from_bytes(_read(self._line, 8), "big")
            finally:
                prctl(PR_SET_CHILD_SUBREAPER, 0)


def prctl(option: int, value: Any) -> None:
    """Change this process, as Linux' call of that name does."""
    if ctypes.CDLL(None).prctl(option, value, 0, 0, 0):
        raise OSError("prctl failed")


def install(forker: Forker | None = None) -> None:
    """From now on, fork what Popen is asked for where it is one of the commands that `_understood` knows.

    Args:
        forker: what forks. Default: one that is started where it is needed first.
    """
    popen: Any = subprocess.Popen
    real = popen._execute_child
    signature = inspect.signature(real)
    ours: list[Forker | None] = [forker]

    def execute_child(self: Any, *positional: Any, **named: Any) -> None:
        given = signature.bind(self, *positional, **named).arguments
        request = _understood(given) if ENABLED[0] else None
        if request is None:
            real(self, *positional, **named)
            return
        started = ours[0] = ours[0] or _begin()
        ends = (given["p2cread"], given["c2pwrite"], given["errwrite"])
        files = {number: number if end == -1 else end for number, end in enumerate(ends)}
        if not given["close_fds"]:
            files |= {number: number for number in _inheritable()}
        self.pid = started.start(request, files)
        self._child_created = True
        self._close_pipe_fds(*ends[:1], given["p2cwrite"], given["c2pread"], ends[1], given["errread"], ends[2])

    popen._execute_child = execute_child


def _understood(given: dict[str, Any]) -> dict[str, Any] | None:
    """What is to run, for a Python command that a fork can run; None for any other."""
    args = given["args"]
    if isinstance(args, str | bytes | os.PathLike) or given.get("shell"):
        return None
    words = [os.fsdecode(word) for word in args]
    unusual = (given.get("preexec_fn"), given.get("pass_fds"), given.get("gid"), given.get("uid"), given.get("gids"))
    if not words or words[0] != sys.executable or any(unusual) or given.get("process_group", -1) != -1:
        return None
    flags: list[str] = []
    words = words[1:]
    while words and words[0] in ("-u", "-W"):
        taken = 1 if words[0] == "-u" else 2
        flags, words = flags + words[:taken], words[taken:]
    folder = Path(given["cwd"] or Path.cwd())
    if words and words[0].endswith(".py") and (folder / words[0]).is_file():
        script = (folder / words[0]).resolve()
        if not script.is_relative_to(REPOSITORY) and "cofitune" not in script.read_text("utf-8"):
            return None
        words = [SCRIPT, *words]
    if len(words) < 2 or words[0] not in ("-m", "-c", SCRIPT) or flags not in ([], ["-u"], ["-W", "ignore"]):
        return None
    kind, what, *arguments = words
    if kind != SCRIPT and not any(name in what for name in ("cofitune", "torch.distributed.run", "lm_eval", "tests.")):
        return None
    environment = {os.fsdecode(k): os.fsdecode(v) for k, v in (given["env"] or os.environ).items()}
    names = {n for n in (*environment, *os.environ) if n.startswith(READ_ON_IMPORT)} - HEEDED
    if any(environment.get(name) != os.environ.get(name) for name in names):
        return None
    return {
        "kind": kind, "what": what, "arguments": arguments, "flags": flags, "environment": environment,
        "folder": str(folder), "new_session": bool(given["start_new_session"]),
        "ignored": [number for number in HANDED_ON if signal.getsignal(number) is signal.SIG_IGN],
    }  # fmt: skip


def _inheritable() -> list[int]:
    numbers = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 -- the folder's own descriptor is gone afterwards
        try:
            if int(name) > 2 and os.get_inheritable(int(name)):
                numbers.append(int(name))
        except OSError:
            continue
    return numbers


def _begin() -> Forker:
    """Start the first forker of this process: the only one that imports."""
    ours, theirs = socket.socketpair()
    wanted, ENABLED[0] = ENABLED[0], False
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    subprocess.Popen(
        [sys.executable, "-m", "tests.forker", str(theirs.fileno())],
        pass_fds=[theirs.fileno()], cwd=REPOSITORY, env=environment,
    )  # fmt: skip
    ENABLED[0] = wanted
    theirs.close()
    return Forker(ours)


def _read(line: socket.socket, count: int) -> bytes:
    read = b""
    while len(read) < count:
        part = line.recv(count - len(read))
        if not part:
            raise EOFError
        read += part
    return read


def _serve(line: socket.socket) -> dict[str, Any]:
    """Fork what is asked for until who asks is gone. Returns in each forked process, with its request."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        if int(name) > 2 and int(name) != line.fileno():
            try:
                os.close(int(name))
            except OSError:
                continue
    prctl(PR_SET_NAME, NAME.encode())
    prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    for signum in (signal.SIGINT, signal.SIGTERM):  # which a group of processes gets, and is for the others
        signal.signal(signum, signal.SIG_IGN)
    while True:
        try:
            header, got, _, _ = socket.recv_fds(line, 8, 250)
            request = json.loads(_read(line, int.from_bytes(header + _read(line, 8 - len(header)), "big")))
        except (EOFError, OSError):
            os._exit(0)
        if not header:
            os._exit(0)
        between = os.fork()
        if between:
            for number in got:
                os.close(number)
            os.waitpid(between, 0)
            continue
        if os.fork():
            os._exit(0)
        while os.getppid() != request["parent"]:
            time.sleep(0.0005)
        if request["new_session"]:  # now, so that what this process starts is in it, too
            os.setsid()
        line.sendall(os.getpid().to_bytes(8, "big"))
        line.close()
        _put_in_place(request["files"], got)
        return dict(request)


def _put_in_place(numbers: list[int], got: list[int]) -> None:
    """Give each received descriptor the number that it is to have."""
    above = max([*numbers, *got]) + 1
    high: list[int] = []
    for descriptor in got:
        high.append(os.dup2(descriptor, above + len(high)))
        os.close(descriptor)
    for number, descriptor in zip(numbers, high, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)


def _open_streams(unbuffered: bool) -> None:
    """Open the three standard streams on what their descriptors are now, as a new Python does."""
    given, _, mistakes = os.environ.get("PYTHONIOENCODING", "").partition(":")
    encoding, strict = given or "utf-8", mistakes or "strict"
    sys.stdin = sys.__stdin__ = open(0, encoding=encoding, errors=strict, closefd=False)  # type: ignore[misc]  # noqa: SIM115
    for name, number, errors in (("stdout", 1, strict), ("stderr", 2, "backslashreplace")):
        binary = os.fdopen(number, "wb", closefd=False)
        line_buffered = number == 2 or os.isatty(number)
        stream = io.TextIOWrapper(
            binary, encoding=encoding, errors=errors, line_buffering=line_buffered, write_through=unbuffered
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _run(request: dict[str, Any]) -> None:
    """Be the process that was asked for."""
    prctl(PR_SET_NAME, b"python")
    prctl(PR_SET_PDEATHSIG, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number in HANDED_ON:
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else signal.SIG_DFL)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    _open_streams("-u" in request["flags"])
    if "-W" in request["flags"]:
        warnings.simplefilter("ignore")
    packages = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [folder for folder in packages if folder and folder not in sys.path]
    for folder in packages:
        if folder and Path(folder, "sitecustomize.py").is_file():  # which Python runs at its start
            runpy.run_path(str(Path(folder, "sitecustomize.py")))
    if request["kind"] == "-c":
        sys.argv, sys.path[0] = ["-c", *request["arguments"]], ""
        exec(compile(request["what"], "<string>", "exec"), {"__name__": "__main__"})
        return
    sys.argv, sys.path[0] = [request["what"], *request["arguments"]], request["folder"]
    if request["kind"] == SCRIPT:
        contexts: Any = multiprocessing.context  # a process that it spawns need not import anything anew, either
        contexts._concrete_contexts["spawn"] = contexts._concrete_contexts["fork"]
        sys.path[:1] = [str(Path(request["what"]).resolve().parent), str(REPOSITORY)]
        runpy.run_path(request["what"], run_name="__main__")
        return
    runpy.run_module(request["what"], run_name="__main__", alter_sys=True)


def _run_to_its_end(request: dict[str, Any]) -> int:
    """Run it and return its exit code, as Python would."""
    try:
        _run(request)
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException as error:  # noqa: BLE001 -- as an interpreter would
        sys.excepthook(type(error), error, error.__traceback__)
        return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _end(code: int) -> None:
    """End as Python does, but for taking thousands of modules apart, which takes longer than many a test."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code & 255)


def _prepare() -> None:
    """Do once what each process would do for itself: a rank trains a tiny model in 0.4 s of a core, in place of 1.8."""
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from cofitune import cli
    from cofitune.zero import skip_cpu_communication_op, skip_muon_compilation

    os.fsync = lambda fd: None  # a tiny training waits for the disk twenty times
    cli._commands()
    skip_muon_compilation()
    skip_cpu_communication_op()  # DeepSpeed asks the compiler what it can build
    get_checkpoint_conversion_mapping("llama")  # it compiles a thousand patterns and keeps them
    # to name its caller, torch reads the source of all functions above, and goes through every module for those of
    # files that it does not find, of which there are some here
    dynamic_rendezvous.get_method_name = lambda depth=2: sys._getframe(depth).f_code.co_name
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False  # torch would take its libraries of operators apart


def main() -> None:
    """Import, then fork whenever asked."""
    line = socket.socket(fileno=int(sys.argv[1]))
    from cofitune.launch.launcher import quiet_libraries

    before = dict(os.environ)
    with warnings.catch_warnings():
        quiet_libraries()
        for module in MODULES:
            importlib.import_module(module)
        _prepare()
    os.environ.clear()
    os.environ.update(before)
    gc.collect()
    gc.freeze()
    request = _serve(line)
    while "RANK" not in request["environment"]:
        ours, theirs = socket.socketpair()
        if os.fork():
            theirs.close()
            install(Forker(ours))
            break
        ours.close()
        request = _serve(theirs)
    _end(_run_to_its_end(request))


if __name__ == "__main__":
    main()
