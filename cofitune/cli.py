"""The command line: options, help and exit codes; nothing else. No torch is imported before a command runs."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import cache, partial
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console

from cofitune import __version__, cli_setup, cli_trained
from cofitune.cli_group import Commands
from cofitune.cli_options import ConfigPath, DryRun, HostFile, NumProcesses, Overrides, Overwrite, Resume
from cofitune.cli_output import OUTPUT
from cofitune.config.day import begin_day
from cofitune.config.load import load_config
from cofitune.config.renamed import RenamedKeyWarning
from cofitune.config.schema import Config
from cofitune.errors import ConfigError, RepairWarning, Stopped, UserError, refused_by_machine
from cofitune.executors import local
from cofitune.executors.search import run_with_executor
from cofitune.launch import command, failures, launcher
from cofitune.launch.hostfile import Place
from cofitune.launch.interrupts import outside_popen
from cofitune.launch.parent import end_with_parent
from cofitune.launch.slurm import adopt_task
from cofitune.ranks import this_rank
from cofitune.results import (
    CompareResult,
    EvalResult,
    ImportanceResult,
    RehearseResult,
    Result,
    SearchResult,
    TrainResult,
)

NOTES_SAID: set[str] = set()

app = typer.Typer(
    name="cofitune",
    help="Teach a large language model a speciality without making it forget.",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def search(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    num_processes: NumProcesses = None,
    hostfile: HostFile = None,
    repeat: Annotated[
        str | None,
        typer.Option(metavar="N|auto", help="Seeds for the leading regions, to see how sure the winner is."),
    ] = None,
) -> None:
    """Find the region (layer range × modules) with the best balance of speciality and versatility."""
    launcher.require_single_process("search")
    seeds = [f"search.repeat={repeat}"] if repeat else []
    resolved = _load(config, [*(overrides or []), *seeds])
    _tell(SearchResult.read, resolved, dry_run)
    from cofitune.recipes.search import recipe

    console = OUTPUT.console()
    run = partial(recipe.search, resolved, overwrite=overwrite, dry_run=dry_run, console=console, on_plan=OUTPUT.plan)
    run_with_executor(run, resolved.search, resolved.run / "search", num_processes, hostfile, console.out)


@app.command()
def importance(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    num_processes: NumProcesses = None,
    hostfile: HostFile = None,
) -> None:
    """Compute the importance of attention heads, FFN neurons and FFN output channels."""
    resolved = _load(config, overrides)
    _tell(ImportanceResult.read, resolved, dry_run)
    from cofitune.recipes.importance import recipe

    def check(ranks: int) -> object:
        return recipe.check(resolved, overwrite, ranks)

    if launcher.launch_ranks_if_needed(num_processes, hostfile, dry_run, check):
        return
    ranks = launcher.choose_ranks(num_processes, hostfile).count if dry_run else 1
    recipe.importance(
        resolved, overwrite=overwrite, dry_run=dry_run, console=OUTPUT.console(), ranks=ranks, on_plan=OUTPUT.plan
    )


@app.command()
def rehearse(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    num_processes: NumProcesses = None,
    hostfile: HostFile = None,
) -> None:
    """Let the base answer general prompts; training on these answers, too, keeps its abilities (train.rehearsal)."""
    resolved = _load(config, overrides)
    _tell(RehearseResult.read, resolved, dry_run)
    from cofitune.recipes.rehearse import plan as planning
    from cofitune.recipes.rehearse import recipe

    asked_for_ranks = launcher.asks_for_ranks(num_processes, hostfile)
    takes_all_gpus = planning.choose_engine(resolved.rehearsal.engine, asked_for_ranks) == "vllm"
    if not takes_all_gpus and launcher.launch_ranks_if_needed(
        num_processes, hostfile, dry_run, lambda _: planning.plan_rehearse(resolved, overwrite)
    ):
        return
    ranks = launcher.choose_ranks(num_processes, hostfile).count if dry_run else 1
    recipe.rehearse(
        resolved, overwrite=overwrite, dry_run=dry_run, console=OUTPUT.console(), ranks=ranks, on_plan=OUTPUT.plan
    )


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    num_processes: NumProcesses = None,
    hostfile: HostFile = None,
) -> None:
    """Train the region, with rehearsal and soft mask where asked for; everything else stays frozen."""
    resolved = _load(config, overrides)
    _tell(TrainResult.read, resolved, dry_run)
    from cofitune.recipes.train import recipe

    def check(ranks: int) -> object:
        return recipe.check(resolved, overwrite=overwrite, resume=resume, ranks=ranks)

    launcher.grant_grace(resolved.train.stop_grace_seconds)
    if launcher.launch_ranks_if_needed(num_processes, hostfile, dry_run, check):
        return
    ranks = launcher.choose_ranks(num_processes, hostfile).count if dry_run else 1
    recipe.train(
        resolved,
        overwrite=overwrite,
        resume=resume,
        dry_run=dry_run,
        console=OUTPUT.console(),
        ranks=ranks,
        on_plan=OUTPUT.plan,
    )


@app.command(name="eval")
def evaluate(
    config: ConfigPath,
    overrides: Overrides = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH",
            help="A further model: run, folder or hub name; RUN@0.7 keeps 0.7 of its training, RUN@auto as much as "
            "`export --alpha auto`. May be repeated.",
        ),
    ] = None,
    full_sft: Annotated[
        str | None, typer.Option(metavar="[NAME=]PATH", help="The model of full fine-tuning, the other yardstick.")
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[MODEL:]SCORE>=POINTS",
            help="Exit 3 unless a change against the base is at least (>=) or at most (<=) this: versatility>=-1.0, "
            "speciality>=+10; SCORE.low is the lower end of its 95 % interval. May be repeated.",
        ),
    ] = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    num_processes: NumProcesses = None,
    hostfile: HostFile = None,
) -> None:
    """Score speciality and versatility of the base, the run and further models, side by side.

    Exit codes: 0 done, 2 a mistake of yours, 3 a requirement is not met.
    """
    resolved = _load(config, overrides).with_models(model or (), full_sft)
    _tell(EvalResult.read, resolved, dry_run)
    from cofitune.recipes.evaluate import recipe

    requested, console = require or (), OUTPUT.console()

    def check(ranks: int) -> object:
        return recipe.check(resolved, overwrite, requested, console)

    takes_all_gpus = recipe.takes_all_gpus(resolved, launcher.asks_for_ranks(num_processes, hostfile))
    if not takes_all_gpus and launcher.launch_ranks_if_needed(num_processes, hostfile, dry_run, check):
        # rank 0 has said everything; all is known now, and only the verdict is read off here
        overwrite, console = False, Console(quiet=True)
    done = recipe.evaluate(
        resolved,
        require=requested,
        overwrite=overwrite,
        dry_run=dry_run,
        console=console,
        rank=this_rank(),
        on_plan=OUTPUT.plan,
    )
    if not done.met and not failures.launched_by_us():
        raise typer.Exit(failures.NOT_MET)


@app.command()
def compare(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    num_processes: NumProcesses = None,
    hostfile: HostFile = None,
) -> None:
    """Train several methods at several rates and match them at equal speciality: what each forgets for it."""
    launcher.require_single_process("compare")
    resolved = _load(config, overrides)
    _tell(CompareResult.read, resolved, dry_run)
    from cofitune.recipes.compare import recipe

    ranks = launcher.choose_ranks(num_processes, hostfile)
    run_command = partial(command.run_command, ranks=ranks, grace=resolved.train.stop_grace_seconds)
    recipe.compare(
        resolved,
        run_command=run_command,
        overwrite=overwrite,
        dry_run=dry_run,
        console=OUTPUT.console(),
        ranks=ranks.count,
        on_plan=OUTPUT.plan,
    )


app.command()(cli_trained.export)
app.command()(cli_trained.chat)
app.command()(cli_trained.report)
app.add_typer(cli_setup.config_app, name="config")
app.command()(cli_setup.init)
app.command()(cli_setup.convert)
app.command(name="list")(cli_setup.list_)
app.command()(cli_setup.env)


@app.command(name="_worker", hidden=True)
def worker(num_processes: NumProcesses = None, hostfile: HostFile = None) -> None:
    """What carries out the trials of a search, one after the other. `cofitune search` starts it."""
    if not launcher.launch_ranks_if_needed(num_processes, hostfile, False, lambda _: None):
        local.serve()


@app.command(name="_proxy", hidden=True)
def proxy(config: ConfigPath, to: Path, num_processes: NumProcesses = None, hostfile: HostFile = None) -> None:
    """The gradient statistics of a search's proxy, on a trial's ranks. `cofitune search` starts it."""
    resolved = _load(config) if this_rank().rank == 0 else None  # on another host the file may not be there
    if launcher.launch_ranks_if_needed(num_processes, hostfile, False, lambda _: None):
        return
    from cofitune.recipes.search import gradient_statistics as recipe

    recipe.take_statistics(resolved, to)


@app.command(
    name="_host", hidden=True, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
def host(place: str, arguments: list[str]) -> None:
    """One host of `--hostfile`: start its ranks. `cofitune` on another host starts it through ssh."""
    raise SystemExit(launcher.run_place(Place.parse(place), arguments))


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Teach a large language model a speciality without making it forget."""
    if version:
        Console().print(f"cofitune {__version__}", highlight=False)
        raise typer.Exit


@cache
def _commands() -> Callable[[], Any]:
    """All commands with their options: typer would read every signature anew at each call."""
    return typer.main.get_command(app)


def main() -> None:
    """Run the command line: a user's mistake is one message and exit code 2, anything else a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that knows ASCII alone gets the others as \\uXXXX
            stream.reconfigure(errors="backslashreplace")
    adopt_task(os.environ)
    launcher.quiet_libraries()
    warnings.showwarning = partial(_show_warning, warnings.showwarning)
    end_with_parent()
    signal.signal(signal.SIGTERM, outside_popen(_end))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background job's may be ignored
        signal.signal(signal.SIGINT, outside_popen(signal.default_int_handler))
    OUTPUT.begin()
    NOTES_SAID.clear()
    code = 1  # a traceback's
    try:
        _commands()()
    except (UserError, OSError) as error:
        mistake = error if isinstance(error, UserError) else refused_by_machine(error)
        if mistake is None:
            raise
        if OUTPUT.verbose:
            traceback.print_exc()
        OUTPUT.error(str(mistake), mistake.problems if isinstance(mistake, ConfigError) else ())
        failures.say_mistake(mistake)
        sys.exit(code := failures.USER_ERROR)
    except Stopped as stopped:
        OUTPUT.error(str(stopped))
        if this_rank().rank == 0:
            print(stopped, file=sys.stderr)
        sys.exit(code := 128 + stopped.signum)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1 if end.code else 0
        raise
    finally:
        # what is left to do on exit must not be interrupted by a traceback
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        OUTPUT.close(code)
        if failures.launched_by_us():
            sys.excepthook = failures.tell_parent  # only now: torch's process group has put one of its own there


def _end(signum: int, _frame: FrameType | None) -> None:
    """End by SIGTERM in good order, so that children are ended too; a second one must not interrupt that."""
    signal.signal(signum, lambda *_: None)
    sys.exit(128 + signum)


def _show_warning(usual: Callable[..., None], message: Warning | str, category: type[Warning], *place: Any) -> None:
    """Say in one line, once for all ranks, that a key has its old name or a cache was damaged; others as usual."""
    if issubclass(category, RepairWarning):
        # Python forgets what it has shown as soon as a library changes a filter
        if this_rank().rank == 0 and str(message) not in NOTES_SAID:
            NOTES_SAID.add(str(message))
            print(f"note: {message}", file=sys.stderr)
    elif not issubclass(category, RenamedKeyWarning):
        usual(message, category, *place)
    elif this_rank().rank == 0 and not failures.launched_by_us():
        print(f"warning: {message}", file=sys.stderr)


def _load(path: Path, overrides: list[str] | None = None) -> Config:
    """Read the config; the day on which its run began is this process's, too."""
    config = load_config(path, overrides)
    begin_day(config.run)
    return config


def _tell(read: Callable[[Path], Result], config: Config, dry_run: bool) -> None:
    """What `--json` prints, once the command has ended: read from what lies in the run's folder then."""
    if not dry_run:  # which has told its plan
        OUTPUT.on_done(lambda: read(config.run).to_dict())
