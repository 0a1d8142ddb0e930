"""The commands around a run: init, config, convert, list, env. Options and help; nothing else."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from cofitune.cli_group import Commands
from cofitune.cli_options import ConfigPath, Overrides, TrustRemoteCode, check_dtype
from cofitune.cli_output import OUTPUT
from cofitune.config.json_schema import Of, json_schema
from cofitune.config.load import read_config
from cofitune.launch.launcher import require_single_process

config_app = typer.Typer(
    cls=Commands, no_args_is_help=True, help="Show a config as it is read, check it, or write its JSON Schema."
)


@config_app.command()
def show(
    config: ConfigPath,
    overrides: Overrides = None,
    given: Annotated[bool, typer.Option("--given", help="Leave out what is at its default.")] = False,
) -> None:
    """Print the resolved config as YAML, each value with its file and line, its override, or `default`."""
    loaded = read_config(config, overrides)
    from cofitune.recipes.config.show import origins, show_config

    OUTPUT.console().out(show_config(loaded, given), end="", highlight=False)
    OUTPUT.on_done(lambda: {"config": loaded.config.model_dump(mode="json"), "origins": origins(loaded)})


@config_app.command()
def validate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check a config: keys and values, the model's config.json, the region, the data files and the tasks.

    All mistakes are told together. No weights are loaded, and nothing is written.
    """
    loaded = read_config(config, overrides)
    from cofitune.recipes.config.validate import validate as recipe

    found = recipe(loaded, OUTPUT.console())
    OUTPUT.on_done(lambda: {"valid": True, "ok": found.good, "missing": found.missing})


@config_app.command()
def schema(
    of: Annotated[Of, typer.Option(help="config; method: a file of compare.methods; suite: a file of eval.suite.")] = (
        "config"
    ),
) -> None:
    """Print the JSON Schema of a config: name it in a YAML's first line, and an editor completes and checks keys."""
    content = json_schema(of)
    OUTPUT.console().out(json.dumps(content, indent=1, ensure_ascii=False), highlight=False)
    OUTPUT.on_done(lambda: {"of": of, "schema": content})


def init(
    model: Annotated[str | None, typer.Option(help="Folder or hub name of the model to start from.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Training items: a file, a folder, or a data set on the hub.")
    ] = None,
    general: Annotated[
        str | None, typer.Option(help="General prompts to rehearse. Default: the model writes its own.")
    ] = None,
    test: Annotated[
        str | None, typer.Option(help="Test items of the task. Default: a file beside the data that is named so.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(metavar="NAME", help="Names the config and the run. Default: by the data's file.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(metavar="7b|13b|small|slurm", help="Begin with this (`cofitune list templates`).")
    ] = None,
    to: Annotated[Path | None, typer.Option(metavar="FILE", help="The config to write. Default: NAME.yaml.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Look at the model, the data and this machine, and write a config to begin with.

    On a terminal it asks for what is missing.
    """
    from cofitune.recipes.init import recipe

    options = recipe.InitOptions(model, data, general, test, task, template, to)
    files = recipe.init(options, overwrite=overwrite, ask=_question(), console=OUTPUT.console())
    OUTPUT.on_done(lambda: {"config": str(files[0]), "files": [str(file) for file in files]})


def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model or an adapter: a folder or a hub name.")],
    to: Annotated[Path, typer.Option(help="The folder to write.")],
    base: Annotated[
        str | None, typer.Option(help="An adapter's base. Default: as adapter_config.json names it.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of MODEL on the hub.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16. Default: float32 where it is stored so, else bfloat16.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a base as plain weights in one dtype: fp8 and mxfp4 dequantised, an adapter merged.

    The other commands stand on such a folder.
    """
    require_single_process("convert")
    check_dtype(dtype)
    from cofitune.recipes import convert as recipe

    folder = recipe.convert(
        model,
        to,
        base=base,
        revision=revision,
        dtype=dtype,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        console=OUTPUT.console(),
    )
    OUTPUT.on_done(lambda: {"folder": str(folder)})


def list_(
    what: Annotated[str, typer.Argument(metavar="models|methods|suites|tasks|templates", help="Which names to list.")],
    word: Annotated[
        str | None, typer.Argument(metavar="WORD", help="tasks: those of lm-evaluation-harness with this in the name.")
    ] = None,
) -> None:
    """List the names that a config may use: models, methods, suites, tasks, templates."""
    from cofitune.recipes import listing

    asked = listing.as_what(what)
    rows = listing.list_names(asked, word)
    _print_rows(rows)
    if word is None:
        OUTPUT.console().out(f"\n{listing.USED[asked]}", highlight=False)
    OUTPUT.on_done(lambda: {"list": asked, "names": [{"name": name, "about": about} for name, about in rows]})


def env() -> None:
    """Print versions, devices and paths for a bug report; no keys and no tokens."""
    from cofitune.recipes.environment import describe

    rows = describe()
    _print_rows(rows)
    OUTPUT.on_done(lambda: {"environment": dict(rows)})


def _question() -> Callable[[str], str] | None:
    """What asks on a terminal; None where there is none."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return None
    return lambda text: str(typer.prompt(text, default="", show_default=False))


def _print_rows(rows: list[tuple[str, str]]) -> None:
    """Two columns; on a terminal the second is broken to its width, elsewhere a row is a line."""
    console = OUTPUT.console()
    if not console.is_terminal:
        width = max(len(name) for name, _ in rows)
        console.out("\n".join(f"{name:<{width}}  {about}" for name, about in rows), highlight=False)
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table, highlight=False)
