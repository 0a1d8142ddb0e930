"""A line is printed as it is, whatever it holds."""

from __future__ import annotations

import io

from rich.console import Console

from cofitune.reports.console import say


def _said(*parts: str | tuple[str, str], colours: bool = False) -> str:
    file = io.StringIO()
    say(Console(file=file, width=20, force_terminal=colours, color_system="standard" if colours else None), *parts)
    return file.getvalue()


def test_brackets_and_emoji_codes_in_a_path_are_no_markup() -> None:
    path = "runs/[bold]law[/bold]/a:warning:b[red]"
    assert _said(f"→ {path}") == f"→ {path}\n"
    assert _said(("still missing:", "yellow"), f" {path}") == f"still missing: {path}\n"


def test_a_long_line_is_not_broken() -> None:
    line = "a line of more than twenty columns with 12 words and a /path/of/its/own"
    assert _said(line) == line + "\n"


def test_only_what_has_a_style_is_coloured() -> None:
    assert _said("steps: ", ("12", "bold"), " of 32 items", colours=True) == "steps: \x1b[1m12\x1b[0m of 32 items\n"
