"""The commands as Python functions: a config in, a typed result out. A user error is raised and ends nothing.

`import cofitune` gives these functions; this module is imported when the first of them is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

from rich.console import Console

from cofitune.config import load
from cofitune.config.day import VARIABLE, begin_day
from cofitune.config.eval import KEEP
from cofitune.config.load import dump_config
from cofitune.config.schema import Config
from cofitune.executors.search import run_with_executor
from cofitune.launch import command, launcher
from cofitune.launch.interrupts import callers_handlers_outside_popen
from cofitune.results import (
    CompareResult,
    EvalResult,
    ExportResult,
    ImportanceResult,
    RehearseResult,
    ReportResult,
    SearchResult,
    TrainResult,
)
from cofitune.temporary import temporary_folder

AnyConfig = Config | Mapping[str, object] | str | Path
Overrides = Mapping[str, object] | Sequence[str]


def load_config(config: AnyConfig, overrides: Overrides = ()) -> Config:
    """Resolve and check a config.

    Args:
        config: a YAML file, its content as nested dictionaries, or a resolved config.
        overrides: `{"train.learning_rate": 1e-4}`, or `["train.learning_rate=1e-4"]` as on the command line.

    Raises:
        ConfigError: all mistakes together; a UserError.

    Example:
        >>> load_config({"model": {"name": "m"}, "output_dir": "runs/m"}, {"train.seed": 7}).train.seed
        7
    """
    if isinstance(config, Config):
        if not overrides:
            return config
        config = config.model_dump(mode="json")
    if isinstance(overrides, Mapping):
        overrides = [f"{key}={load.dump_value(value)}" for key, value in overrides.items()]
    return load.load_config(config, list(overrides))


def train(
    config: AnyConfig,
    overrides: Overrides = (),
    *,
    overwrite: bool = False,
    resume: bool = False,
    num_processes: int | None = None,
    hostfile: Path | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Train the region, with rehearsal and soft mask where asked for; everything else stays frozen.

    Args:
        config, overrides: as `load_config`.
        overwrite: begin anew where this has been trained before.
        resume: continue from the newest whole checkpoint; without one, from the beginning.
        num_processes: ranks on this machine; None: one a GPU, or one on the CPU. One runs in this process; several are
            processes of their own, as the command line starts them.
        hostfile: ranks on several machines, likewise.
        console: where to say what happens; `rich.console.Console(quiet=True)` says nothing.

    Raises:
        UserError: a mistake in the config or the data, or the training diverged.
        Stopped: a signal ended it; its state is saved.
    """
    resolved = load_config(config, overrides)
    with _called(resolved, num_processes, hostfile, console) as call:
        if call.in_ranks("train", {"--overwrite": overwrite, "--resume": resume}, resolved.train.stop_grace_seconds):
            return TrainResult.read(resolved.run)
        from cofitune.recipes.train import recipe

        recipe.train(resolved, overwrite=overwrite, resume=resume, console=call.console)
    return TrainResult.read(resolved.run)


def importance(
    config: AnyConfig,
    overrides: Overrides = (),
    *,
    overwrite: bool = False,
    num_processes: int | None = None,
    hostfile: Path | None = None,
    console: Console | None = None,
) -> ImportanceResult:
    """Compute the importance of attention heads, FFN neurons and FFN output channels. Arguments as of `train`."""
    resolved = load_config(config, overrides)
    with _called(resolved, num_processes, hostfile, console) as call:
        if not call.in_ranks("importance", {"--overwrite": overwrite}):
            from cofitune.recipes.importance import recipe

            recipe.importance(resolved, overwrite=overwrite, console=call.console)
    return ImportanceResult.read(resolved.run)


def rehearse(
    config: AnyConfig,
    overrides: Overrides = (),
    *,
    overwrite: bool = False,
    num_processes: int | None = None,
    hostfile: Path | None = None,
    console: Console | None = None,
) -> RehearseResult:
    """Let the base answer general prompts, to be trained on beside the task. Arguments as of `train`."""
    resolved = load_config(config, overrides)
    with _called(resolved, num_processes, hostfile, console) as call:
        from cofitune.recipes.rehearse import plan, recipe

        takes_all_gpus = plan.choose_engine(resolved.rehearsal.engine, call.asked_for_ranks) == "vllm"
        if takes_all_gpus or not call.in_ranks("rehearse", {"--overwrite": overwrite}):
            recipe.rehearse(resolved, overwrite=overwrite, console=call.console)
    return RehearseResult.read(resolved.run)


def evaluate(
    config: AnyConfig,
    overrides: Overrides = (),
    *,
    models: Sequence[str] = (),
    full_sft: str | None = None,
    require: Sequence[str] = (),
    overwrite: bool = False,
    num_processes: int | None = None,
    hostfile: Path | None = None,
    console: Console | None = None,
) -> EvalResult:
    """Score speciality and versatility of the base, the run and further models, side by side.

    Args:
        models: further models, each `[NAME=]PATH`, as `--model` takes them.
        full_sft: the model of full fine-tuning, likewise.
        require: requirements such as `versatility>=-1.0`; the result's `met` says whether they are met.
        config, overrides, overwrite, num_processes, hostfile, console: as of `train`.

    Raises:
        UserError: anything that the user can mend.
    """
    resolved = load_config(config, overrides).with_models(models, full_sft)
    with _called(resolved, num_processes, hostfile, console) as call:
        words = [word for text in require for word in ("--require", text)]
        from cofitune.recipes.evaluate import recipe

        takes_all_gpus = recipe.takes_all_gpus(resolved, call.asked_for_ranks)
        if takes_all_gpus or not call.in_ranks("eval", {"--overwrite": overwrite}, words=words):
            recipe.evaluate(resolved, require=require, overwrite=overwrite, console=call.console)
    return EvalResult.read(resolved.run)


def search(
    config: AnyConfig,
    overrides: Overrides = (),
    *,
    overwrite: bool = False,
    num_processes: int | None = None,
    hostfile: Path | None = None,
    console: Console | None = None,
) -> SearchResult:
    """Find the region with the best balance of speciality and versatility. Its trials run in processes of their own.

    Arguments as of `train`.
    """
    resolved = load_config(config, overrides)
    from cofitune.recipes.search import recipe

    with _called(resolved, num_processes, hostfile, console) as call:
        run = partial(recipe.search, resolved, overwrite=overwrite, console=call.console)
        run_with_executor(run, resolved.search, resolved.run / "search", num_processes, hostfile, call.console.out)
    return SearchResult.read(resolved.run)


def compare(
    config: AnyConfig,
    overrides: Overrides = (),
    *,
    overwrite: bool = False,
    num_processes: int | None = None,
    hostfile: Path | None = None,
    console: Console | None = None,
) -> CompareResult:
    """Train several methods at several rates and match them at equal speciality. Arguments as of `train`."""
    resolved = load_config(config, overrides)
    from cofitune.recipes.compare import recipe

    with _called(resolved, num_processes, hostfile, console) as call:
        run = partial(command.run_command, ranks=call.ranks, grace=resolved.train.stop_grace_seconds)
        recipe.compare(resolved, run_command=run, overwrite=overwrite, console=call.console, ranks=call.ranks.count)
    return CompareResult.read(resolved.run)


def export(
    run: str | Path,
    to: str | Path,
    *,
    base: str | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    alpha: float | Literal["auto"] = 1.0,
    keep: float = KEEP,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    public: bool = False,
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> ExportResult:
    """Write a trained run as a complete Hugging Face folder (cofitune/recipes/export.py).

    Args:
        push_to_hub: ORG/NAME of a repository that it is uploaded to, too; a private one, unless `public`.

    Raises:
        UserError: the run is not trained, its base is gone, `to` may not be replaced, or the hub refuses.
    """
    launcher.quiet_libraries()
    from cofitune.recipes import export as recipe
    from cofitune.recipes.push import HubTarget

    folder = recipe.export(
        Path(run),
        Path(to),
        base=base,
        dtype=dtype,
        alpha=alpha,
        keep=keep,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        hub=HubTarget(push_to_hub, public) if push_to_hub is not None else None,
        console=console,
    )
    return ExportResult.read(folder)


def report(run: str | Path, to: str | Path | None = None, *, console: Console | None = None) -> ReportResult:
    """Write one HTML page of a run, or of a folder of runs.

    Raises:
        UserError: there is no run, or one of its files is damaged.
    """
    from cofitune.recipes.report import recipe

    return ReportResult(recipe.report(Path(run), Path(to) if to else None, console=console))


def chat(
    model: str | Path,
    prompts: str | Sequence[str],
    *,
    base: str | None = None,
    alpha: float | Literal["auto"] = 1.0,
    only: Literal["base", "run"] | None = None,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 1234,
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> list[dict[str, str]]:
    """Answer prompts as the base and as the run.

    Args:
        model: a run's output_dir, a model folder, or a hub name.
        prompts: one or several; each is a conversation of its own.
        console: where to show the answers while they are written; None: nowhere.

    Returns:
        For each prompt the answers by who gave them, such as `{"base": …, "run": …}`.

    Raises:
        UserError: there is no such model, or a prompt cannot be asked.
    """
    launcher.quiet_libraries()
    from cofitune.recipes.chat import recipe

    exchanges = recipe.chat(
        str(model),
        [prompts] if isinstance(prompts, str) else list(prompts),
        base=base,
        alpha=alpha,
        only=only,
        options=recipe.ChatOptions(max_new_tokens, temperature, seed, system),
        trust_remote_code=trust_remote_code,
        console=console or Console(quiet=True),
    )
    return [one.answers for one in exchanges]


class _Call:
    """One call: how many ranks it asks for, and how they are started."""

    def __init__(
        self, config: Config, num_processes: int | None, hostfile: Path | None, console: Console | None
    ) -> None:
        self.console, self._config = console or Console(), config
        self._num_processes, self._hostfile = num_processes, hostfile

    @cached_property
    def ranks(self) -> launcher.Ranks:
        """Ranks of this machine, or of the hostfile's; a search on Ray never asks, its ranks are the cluster's.

        Raises:
            UserError: there are not so many.
        """
        return launcher.choose_ranks(self._num_processes, self._hostfile)

    @property
    def asked_for_ranks(self) -> bool:
        """Whether the caller named several ranks."""
        return launcher.asks_for_ranks(self._num_processes, self._hostfile)

    def in_ranks(
        self, name: str, flags: Mapping[str, bool], grace: int = command.SECONDS_TO_END, words: Sequence[str] = ()
    ) -> bool:
        """Run the command in ranks of their own where there are several, and say whether that was so.

        Raises:
            UserError, Stopped: as the command ended.
        """
        if self.ranks.count == 1 and not self.ranks.hosts:
            return False
        # every host must see the config
        with temporary_folder(".cofitune-", Path.cwd() if self.ranks.hosts else None) as folder:
            path = folder / "config.yaml"
            path.write_text(dump_config(self._config), encoding="utf-8")
            given = [flag for flag, is_given in flags.items() if is_given]
            arguments = [name, str(path), *given, *words, *self.ranks.options]
            command.run_aloud(arguments, lambda line: self.console.out(line, highlight=False), grace)
        return True


@contextmanager
def _called(
    config: Config, num_processes: int | None, hostfile: Path | None, console: Console | None
) -> Iterator[_Call]:
    """Make this process ready for a command, and afterwards what it was: no rank, and of no run's day."""
    names = ("RANK", "WORLD_SIZE", VARIABLE)
    before = {name: os.environ.get(name) for name in names}
    try:
        launcher.quiet_libraries()
        os.environ.pop(VARIABLE, None)
        begin_day(config.run)
        launcher.grant_grace(config.train.stop_grace_seconds)
        with callers_handlers_outside_popen():
            yield _Call(config, num_processes, hostfile, console)
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
