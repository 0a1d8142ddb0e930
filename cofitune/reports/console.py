"""One way to print a line of text, and to begin a table: no command has to think of markup, colours or wrapping."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

Part = str | tuple[str, str]  # text, or text and its style
STOPPED = "stopped  at any moment: the same command continues"  # a line of the plan of what takes long


def stopped(overwrite: bool) -> str:
    """The line of a command that begins again wherever it is typed with `--overwrite`."""
    return STOPPED.replace("command", "command without --overwrite") if overwrite else STOPPED


def say(console: Console, *parts: Part, style: str = "") -> None:
    """Print a line as it is: brackets in a path are no markup, figures get no colours, long lines are not broken.

    Args:
        parts: the line's text; a pair is a text and its rich style, such as `("12", "bold")`.
        style: of the whole line.

    Example:
        >>> say(Console(), "steps: ", ("12", "bold"), " of 32 items")
        steps: 12 of 32 items
    """
    console.print(Text.assemble(*parts, style=style), highlight=False, soft_wrap=True)


def show_status(console: Console, text: str) -> AbstractContextManager[object]:
    """Around what takes a while: on a terminal `text` is shown meanwhile."""
    return console.status(Text(text)) if console.is_terminal else nullcontext()


def plain_table(
    title: str | Text | None = None, *, title_style: str | None = None, title_justify: JustifyMethod = "center"
) -> Table:
    """A table without vertical lines and with little padding, so that 80 columns hold it."""
    return Table(
        title=title,
        title_style=title_style,
        title_justify=title_justify,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
