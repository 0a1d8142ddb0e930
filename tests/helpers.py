"""What many tests do: type a command, start ranks, write a config, and read what a run left."""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import yaml

from tests import forker

REPOSITORY = Path(__file__).parents[1]
WORDS = ["court", "contract", "void", "seller", "buyer", "tenant", "lease", "landlord", "capital", "France", "Paris"]
REPLACED = "model.layers.1.mlp.up_proj.weight"  # by `replaced_run`


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """Write one row a line; a string is written as it stands, so that a test may write a broken line."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


@contextmanager
def at_most_bytes(count: int) -> Iterator[None]:
    """Let no file of this process grow beyond so many bytes: writing fails in the middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_config(config: dict[str, Any]) -> Path:
    """Write the config as config.yaml beside its output folder."""
    path = Path(config["output_dir"]).parent / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run_command(patch: pytest.MonkeyPatch, *words: object) -> int:
    """Type `cofitune WORDS` in this process and return its exit code."""
    from cofitune import cli

    patch.setattr(sys, "argv", ["cofitune", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def run_train(patch: pytest.MonkeyPatch, config: dict[str, Any], *arguments: str) -> int:
    """Type `cofitune train` with this config in this process and return its exit code."""
    return run_command(patch, "train", write_config(config), *arguments)


def interrupt_after(patch: pytest.MonkeyPatch, step: int, signum: int = signal.SIGTERM) -> None:
    """Have the signal come while that optimizer step's loss is computed."""
    from cofitune.training import loop

    count, real = [0], loop._take_step

    def counting(*arguments: Any) -> Any:
        count[0] += 1
        if count[0] == step:
            os.kill(os.getpid(), signum)
        return real(*arguments)

    patch.setattr(loop, "_take_step", counting)


def train_interrupted(patch: pytest.MonkeyPatch, config: dict[str, Any], *arguments: str, after: int = 4) -> Path:
    """Train until a SIGTERM ends it after a step; returns the folder of checkpoints."""
    with patch.context() as inner:
        interrupt_after(inner, after)
        assert run_train(inner, config, *arguments) == 143
    return Path(config["output_dir"]) / "train" / "checkpoints"


class SharedRuns:
    """Trainings that several tests need: each is run once, where it is asked for first.

    Two tests share a run where their configs are the same but for output_dir. Read what is shared, do not write.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, Path] = {}

    def whole(self, patch: pytest.MonkeyPatch, config: dict[str, Any]) -> Path:
        """The run of this config that nothing interrupted."""
        return self._run(config, 0, lambda changed: run_train(patch, changed) == 0)

    def interrupted(self, patch: pytest.MonkeyPatch, config: dict[str, Any], after: int = 4) -> Path:
        """Copy a run that a SIGTERM ended after a step to the config's output_dir; returns the checkpoints' folder."""
        run = self._run(config, after, lambda changed: train_interrupted(patch, changed, after=after).exists())
        shutil.copytree(run, config["output_dir"])
        return Path(config["output_dir"]) / "train" / "checkpoints"

    def _run(self, config: dict[str, Any], after: int, train: Callable[[dict[str, Any]], bool]) -> Path:
        key = json.dumps([config | {"output_dir": ""}, after], sort_keys=True)
        if key not in self._made:
            run = self._folder / str(len(self._made)) / "run"
            run.parent.mkdir()
            assert train(config | {"output_dir": str(run)})
            self._made[key] = run
        return self._made[key]


def replaced_run(folder: Path, base: Path) -> Path:
    """A run as training leaves it: one matrix of the tiny model replaced."""
    import torch

    from cofitune.model.weight_files import fingerprint
    from cofitune.training.delta import write_delta

    tensor = torch.randn(48, 32, generator=torch.Generator().manual_seed(1))
    about = {
        "base": str(base), "base_fingerprint": fingerprint(str(base)), "revision": None, "template": "chat",
        "trust_remote_code": False, "dtype": "float32",
    }  # fmt: skip
    (folder / "train").mkdir(parents=True)
    write_delta(folder / "train", {REPLACED: tensor}, about)
    return folder


def read_delta(run: Path | str) -> dict[str, Any]:
    """The trained tensors of a run."""
    from safetensors.torch import load_file

    return load_file(Path(run) / "train" / "delta.safetensors")


def read_metrics(run: Path | str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return read_jsonl(Path(run) / "train" / "metrics.jsonl")


def read_manifest(run: Path | str) -> dict[str, Any]:
    """A training's manifest.json."""
    from cofitune.files import read_json

    return dict(read_json(Path(run) / "train" / "manifest.json", "manifest"))


def same_tensors(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether both have the same names and the same values, to the bit."""
    import torch

    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def outside_ranks() -> dict[str, str]:
    """The environment of a process that is no rank: a training in this process has made one of it."""
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def children_of(pid: int) -> list[psutil.Process]:
    """All processes below this one, the eldest first, but for those that only fork others (tests/forker.py)."""
    below = [process for process in psutil.Process(pid).children(recursive=True) if process.name() != forker.NAME]
    return sorted(below, key=lambda process: process.create_time())


def freeze_imports() -> None:
    """Hide what is there already from the garbage collector: DeepSpeed has it look at everything for each engine.

    It halves what a tiny training takes.
    """
    gc.collect()
    gc.freeze()


def run_ranks(module: str, *arguments: object, ranks: int = 2, timeout: float = 600) -> None:
    """Start `python -m tests.MODULE ARGUMENTS` on real ranks of this machine, and wait.

    Every case of a test file runs in one such start: a rank imports torch and DeepSpeed for longer than a case takes.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, "-W", "ignore", *launcher, "-m", f"tests.{module}", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=outside_ranks(), capture_output=True, text=True, timeout=timeout, check=False
    )
    if done.returncode:
        pytest.fail(f"the ranks failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
