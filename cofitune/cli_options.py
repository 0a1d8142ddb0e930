"""Options and arguments that several commands have, and what they may be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cofitune.config.eval import as_alpha
from cofitune.errors import UserError

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The config, shared by all commands.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, such as train.learning_rate=1e-4.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that the base's folder brings along.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop; nothing is written.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what this command wrote before.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the newest whole checkpoint; without one, from the beginning.")
]
NumProcesses = Annotated[
    int | None, typer.Option(min=1, help="Ranks on this machine. Default: one a GPU, or one on the CPU.")
]
HostFile = Annotated[
    Path | None, typer.Option(help="Ranks on several machines, through ssh: a file with `NAME slots=N` a line.")
]


def check_dtype(dtype: str | None) -> None:
    """Refuse a dtype that weights are not written in.

    Raises:
        UserError: it is another one.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"--dtype {dtype}: must be float32 or bfloat16")


def read_alpha(text: str) -> float | Literal["auto"]:
    """How much of a training stays, from 0 to 1, or auto.

    Raises:
        UserError: it is neither.
    """
    try:
        return as_alpha(text)
    except ValueError as error:
        raise UserError(f"--alpha {error}") from None
