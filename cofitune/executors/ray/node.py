"""A trial on a node of a Ray cluster: what travels there, what is done there, and what travels back.

Nothing here needs a shared file system but the data and the model, which must lie at the same place on every node. The
trial itself lives in the node's temporary folder (`TMPDIR`), and only what the search reads of it goes back.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from cofitune import __version__
from cofitune.errors import UserError
from cofitune.files import write_atomically
from cofitune.launch.launcher import Ranks
from cofitune.recipes.folders import PACKAGES, package_version
from cofitune.recipes.trial.executor import Measured, TrialRequest, TrialResult

HANDED_ON = ("eval/cache/**/*",)  # the base's answers
BROUGHT_BACK = ("trial.*", "train/*.json*", "train/*.yaml", "eval/**/*")
WEIGHTS = ".safetensors"
SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True)
class RemoteTrial:
    """A request as it travels to a node.

    Attributes:
        search: names the folder that holds this search's trials on a node.
        request: as `TrialRequest.to_json` gave it.
        cwd: what its relative paths start from.
        needs: absolute paths of data and model, as they are where the search runs.
        begin: nothing of the trial is to be found on the node; what there is was left by a lost attempt.
        ranks: on how many it trains.
        environment: variables that go along.
        files: path below the trial's folder → content.
    """

    search: str
    request: dict[str, object]
    cwd: str
    needs: tuple[str, ...]
    begin: bool
    ranks: int
    environment: dict[str, str]
    files: dict[str, bytes]

    @property
    def id(self) -> str:
        """The trial's."""
        return str(self.request["id"])


@dataclass(frozen=True)
class Report:
    """What a node answers: a `TrialResult` as JSON, and the files, in which `folder` was the trial's folder there."""

    host: str
    folder: str
    result: Mapping[str, object] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


RunHere = Callable[[TrialRequest, int], TrialResult]


def run_errand(errand: RemoteTrial, run_here: RunHere | None = None) -> Report:
    """Run one request on this node, in processes that end with it: until then Ray counts its GPUs as taken.

    A trial that pauses leaves its state here, for the part that follows; one that ends leaves nothing.

    Args:
        run_here: runs a request on so many ranks of this machine; default: a worker of the local executor.
    """
    host, folder = socket.gethostname(), _trial_folder(errand)
    try:
        request = _make_ready(errand, folder)
    except UserError as error:
        return Report(host, str(folder), {"error": str(error)})
    if errand.begin:
        shutil.rmtree(folder, ignore_errors=True)
    write_files(folder, errand.files)
    paused = False
    try:
        result = (run_here or _run_here)(request, errand.ranks)
        paused = request.stop_step is not None and result.error is None
        if result.error:
            result = replace(result, error=f"on {host}: {result.error}")
        return Report(host, str(folder), result.to_json(), read_files(folder, BROUGHT_BACK))
    finally:
        if not paused:
            shutil.rmtree(folder, ignore_errors=True)


def measure_errand(errand: RemoteTrial) -> Measured:
    """Take the time of a few steps of a trial on this node, and of a few items.

    Raises:
        UserError: it failed; the message says why.
    """
    from cofitune.executors.local import measure_trial

    request = _make_ready(errand, _trial_folder(errand))
    _keep_open_files()
    return measure_trial(request, _ranks(errand.ranks))


def forget_search(search: str) -> None:
    """Remove what paused or lost trials of a search have left on this node."""
    shutil.rmtree(search_folder(search), ignore_errors=True)


def tell_versions() -> dict[str, str]:
    """What this node would run a trial with."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"Python": python, "cofitune": __version__} | {name: package_version(name) for name in PACKAGES}


def search_folder(search: str) -> Path:
    """Where a search's trials lie on this node."""
    return Path(tempfile.gettempdir()) / search


def needed_paths(request: TrialRequest) -> tuple[str, ...]:
    """Absolute paths of the files and folders that a trial reads; names on the hub are none."""
    config = request.config
    sections = config.data.model_dump(), config.eval.model_dump(exclude={"models"}), config.train.model_dump()
    results = [config.model.name, *(text for section in sections for text in _paths_in(section))]
    return tuple(dict.fromkeys(str(Path(text).absolute()) for text in results if Path(text).exists()))


def read_files(folder: Path, patterns: tuple[str, ...]) -> dict[str, bytes]:
    """The contents of the files below `folder` that match, weights left out, by their paths below it."""
    results = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    return {str(path.relative_to(folder)): path.read_bytes() for path in results if path.suffix != WEIGHTS}


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write what `read_files` gave. `eval/scores.json` comes last: where it is, all is there."""
    for name in sorted(files, key=lambda name: (name == "eval/scores.json", name)):
        write_atomically(folder / name, lambda to, name=name: to.write_bytes(files[name]))  # type: ignore[misc]


def _trial_folder(errand: RemoteTrial) -> Path:
    """Where the trial lives on this node."""
    return search_folder(errand.search) / errand.id


def _make_ready(errand: RemoteTrial, folder: Path) -> TrialRequest:
    """Let this process be as the search's: its variables, the folder that it was typed in. Returns the request here.

    Raises:
        UserError: this node has not the data or the model.
    """
    missing = [path for path in errand.needs if not Path(path).exists()]
    if missing:
        must = "data and model must lie at the same place on every node that takes trials"
        raise UserError(f"{socket.gethostname()} has not {', '.join(missing)}: {must}")
    _own_folder(search_folder(errand.search))
    os.environ.update(errand.environment)
    if Path(errand.cwd).is_dir():  # else there are no relative paths: what they name would be missing
        os.chdir(errand.cwd)
    return TrialRequest.from_json(errand.request, folder)


def _own_folder(folder: Path) -> None:
    """Make a folder that nobody else can look into or has put there.

    Raises:
        UserError: it is another user's.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise UserError(f"{socket.gethostname()}: {folder} belongs to another user; set TMPDIR there")


def _run_here(request: TrialRequest, ranks: int) -> TrialResult:
    """Run a request in a worker of the local executor.

    It is waited for by a thread: Ray ends a task by an exception in the main one, which must be awake to meet it.
    """
    from cofitune.executors.local import local_executor

    _keep_open_files()
    try:
        with ThreadPoolExecutor(1) as waiter, local_executor(_ranks(ranks)) as execute:
            result = waiter.submit(lambda: next(iter(execute([request]))))
            try:
                while not result.done():
                    wait([result], timeout=SECONDS_BETWEEN_LOOKS)
            except KeyboardInterrupt:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ray says it again, while the worker is being ended
                raise
            return result.result()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _ranks(count: int) -> Ranks:
    return Ranks(count, (), ("--num-processes", str(count)))


def _keep_open_files() -> None:
    """Let no child have this process' open files: Ray tells that a worker was lost by the end of its connection."""
    for number in (int(path.name) for path in list(Path("/proc/self/fd").iterdir())):
        with suppress(OSError):  # the folder's own is closed again
            if number > 2:
                os.set_inheritable(number, False)


def _paths_in(value: object) -> Iterator[str]:
    """The strings of a section's settings that may be paths."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("path", "dataset_path", "drift_data") and isinstance(inner, str):
                yield inner
            else:
                yield from _paths_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _paths_in(inner)
