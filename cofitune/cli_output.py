"""What every command says and where: `--json`, `-q`, `-v`, `--log-file`. One object a process, made anew by `main`."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.control import Control
from rich.table import Table

from cofitune.errors import UserError
from cofitune.launch.failures import NOT_MET, launched_by_us
from cofitune.ranks import this_rank

if TYPE_CHECKING:  # where the tested version of typer has click's classes; others have them elsewhere
    from typer._click import Parameter

LOG_WIDTH = 120  # columns of a log file


class Output:
    """Where a command talks, and the object that it prints in the end."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget what an earlier command in this process was told."""
        self._command, self._quiet, self.verbose = "", False, False
        self._log: Path | None = None
        self._result: dict[str, object] = {}
        self._when_done: Callable[[], dict[str, object]] | None = None
        self._stdout: int | None = None  # where the one object goes; everything else that is printed goes to stderr

    @property
    def is_json(self) -> bool:
        """Whether one object is wanted on stdout."""
        return self._stdout is not None

    def console(self) -> Console:
        """The console of a command: rank 0 alone talks."""
        is_first = this_rank().rank == 0
        if self._log is None or not is_first:
            return Console(quiet=self._quiet or not is_first, stderr=self.is_json)
        return _LoggingConsole(self._log, quiet=self._quiet, stderr=self.is_json)

    def on_done(self, result: Callable[[], dict[str, object]]) -> None:
        """Keep what gives the content of the one object, once the command has ended well."""
        self._when_done = result

    def plan(self, content: dict[str, object]) -> None:
        """Keep a dry run's plan, likewise."""
        self._result = {"dry_run": True, "plan": content}

    def error(self, message: str, problems: Sequence[str] = ()) -> None:
        """Keep a user error, likewise, each of several mistakes by itself, and write it into the log."""
        self._result = {"error": message} | ({"problems": list(problems)} if problems else {})
        if self._log is not None and this_rank().rank == 0:
            _append(self._log, f"error: {message}")

    def refuse(self, message: str, command: str) -> None:
        """Keep what the parser of the command line says, which ends before it has read every option."""
        if "--json" in sys.argv[1:]:
            self.take_stdout(self._command or command)
        self.error(message)

    def close(self, exit_code: int) -> None:
        """Print the object, and give stdout back. Ranks that this program started leave it to their parent."""
        if self._stdout is None:
            return
        sys.stdout.flush()
        os.dup2(self._stdout, 1)
        os.close(self._stdout)
        self._stdout = None
        if this_rank().rank == 0 and not launched_by_us():
            if self._when_done and exit_code in (0, NOT_MET):
                self._result = self._when_done()
            content = {"command": self._command, "exit_code": exit_code, **self._result}
            os.write(1, (json.dumps(content, ensure_ascii=False, default=str) + "\n").encode())

    def take_stdout(self, command: str) -> None:
        """Keep stdout for the one object; what libraries and other processes print goes to stderr, too."""
        self._command = command
        if self._stdout is None:
            sys.stdout.flush()
            self._stdout = os.dup(1)
            os.dup2(2, 1)

    def be_quiet(self) -> None:
        """Say nothing but errors."""
        self._quiet = True

    def be_verbose(self) -> None:
        """Let the libraries talk; they are imported later."""
        self.verbose = True
        os.environ["TRANSFORMERS_VERBOSITY"] = "info"
        warnings.simplefilter("default")
        logging.basicConfig(level=logging.INFO)

    def log_into(self, path: Path) -> None:
        """Write what is said into this file, too.

        Raises:
            UserError: it cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
        except OSError as error:
            raise UserError(f"--log-file {path}: cannot be written: {error.strerror}") from None
        self._log = path


class _LoggingConsole(Console):
    """A console that writes what is printed into a file, too; a progress bar's frames are left out."""

    def __init__(self, path: Path, *, quiet: bool, stderr: bool) -> None:
        super().__init__(quiet=quiet, stderr=stderr)
        self._path, self._is_quiet = path, quiet

    def print(self, *objects: object, **options: Any) -> None:
        """Print, and add the same as plain text to the log. `out` comes here, too."""
        super().print(*objects, **options)
        if not any(isinstance(one, Control) for one in objects):
            with self._path.open("a", encoding="utf-8") as file:
                plain = Console(file=file, width=LOG_WIDTH, color_system=None, force_terminal=False)
                if not all(isinstance(one, Table) for one in objects):
                    plain.print(time.strftime("%Y-%m-%d %H:%M:%S "), end="", highlight=False)
                plain.print(*objects, **options)


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


OUTPUT = Output()


@cache
def shared_parameters() -> tuple[Parameter, ...]:
    """The options that every command has; each tells `OUTPUT` where it is given."""
    return tuple(typer.main.get_command(_SHARED).params)


def _on_json(context: typer.Context, value: bool) -> None:
    if value:
        OUTPUT.take_stdout(context.command_path.split("cofitune ", 1)[-1])


def _on_quiet(value: bool) -> None:
    if value:
        OUTPUT.be_quiet()


def _on_verbose(value: bool) -> None:
    if value:
        OUTPUT.be_verbose()


def _on_log_file(value: Path | None) -> None:
    if value is not None:
        OUTPUT.log_into(value)


_SHARED = typer.Typer(add_completion=False)


@_SHARED.command()
def _shared(
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", callback=_on_json, expose_value=False, help="Print one JSON object on stdout, the rest on stderr."
        ),
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", callback=_on_quiet, expose_value=False, help="Say nothing but errors."),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", callback=_on_verbose, expose_value=False,
            help="Say what the libraries say, and where an error arose.",
        ),
    ] = False,
    log_file: Annotated[
        Path | None,
        typer.Option(callback=_on_log_file, expose_value=False, help="Write what is said into this file, too."),
    ] = None,
) -> None:  # fmt: skip
    """Nothing: other commands take these options over."""
