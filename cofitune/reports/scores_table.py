"""The table before/after of an evaluation, and its one sentence. Reads what `scores.json` holds, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

CATEGORIES = ("speciality", "gen_kn", "gen_rs", "instruct")
ABOUT = {"speciality": "", "gen_kn": "knowledge", "gen_rs": "reasoning", "instruct": "instructions"}
NONE = "–"


def scores_table(scores: Mapping[str, Any]) -> Table:
    """One row a category, its tasks below, then versatility and unified.

    Args:
        scores: the content of `scores.json`; `run` is None where only the base was scored.

    Returns:
        A table of 0–100 scores (0 is guessing) with the raw share of right answers in brackets; readable without
        colour in 80 columns, where task names are not long.
    """
    table = Table(
        title="score (share of right answers): 0 is guessing, 100 all right",
        title_style="",
        box=box.SIMPLE_HEAD,  # without vertical lines and with little padding: 80 columns hold it
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("task", overflow="fold")
    for name in ("metric", "items", "base", "run", "change"):
        table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    base, run = scores["base"], scores.get("run")
    for category in CATEGORIES:
        pair = base["categories"][category], run["categories"][category] if run else None
        table.add_row(category, ABOUT[category], "", *_three(*pair, bool(run)), style="bold")
        if pair[0] is None:
            table.add_row("  (no task)", "", "", "", "", "")
        for title, about in scores["tasks"].items():
            if about["category"] == category:
                table.add_row(Text(f"  {title}"), about["metric"], str(about["items"]), *_task(title, base, run))
        table.add_section()
    for name in ("versatility", "unified"):
        pair = base[name], run[name] if run else None
        table.add_row(name, "", "", *_three(*pair, bool(run)), style="bold")
    return table


def scores_sentence(scores: Mapping[str, Any]) -> str:
    """What training gained and what it cost, in one sentence."""
    base, run, changes = scores["base"], scores.get("run"), scores.get("changes")
    if not run or not changes:
        speciality, versatility = base["categories"]["speciality"], base["versatility"]
        return f"base: speciality {_number(speciality)}, versatility {_number(versatility)}"
    parts = f"speciality {_signed(changes['spec_gain'])}, versatility {_signed(changes['versatility'])}"
    details = [f"{name} {_signed(value)}" for name, value in changes["categories"].items() if value is not None]
    kept = changes["versatility_retained"]
    if kept is not None:
        details.append(f"{kept:.0f} % of versatility kept")
    return f"{parts}: {', '.join(details)}" if details else parts


def _task(title: str, base: Mapping[str, Any], run: Mapping[str, Any] | None) -> tuple[Text, Text, Text]:
    before = base["tasks"][title]
    after = run["tasks"][title] if run else None
    change = after["normalised"] - before["normalised"] if after else None
    return _with_raw(before), _with_raw(after) if after else Text(NONE), _coloured(change)


def _with_raw(task: Mapping[str, Any]) -> Text:
    return Text(f"{_number(task['normalised'])} ({task['raw']:.3f})")


def _three(before: float | None, after: float | None, ran: bool) -> tuple[Text, Text, Text]:
    change = after - before if ran and before is not None and after is not None else None
    return Text(_aligned(before)), Text(_aligned(after)), _coloured(change)


def _aligned(value: float | None) -> str:
    """A score whose decimals stand under those of the tasks, which are followed by ` (0.123)`."""
    return NONE if value is None else _number(value) + " " * len(" (0.000)")


def _coloured(change: float | None) -> Text:
    if change is None:
        return Text(NONE)
    style = "green" if change >= 0.05 else "red" if change <= -0.05 else ""
    return Text(_signed(change), style)


def _number(value: float | None) -> str:
    return "none (no task)" if value is None else f"{value:.1f}".replace("-", "−")


def _signed(change: float | None) -> str:
    """`+1.2`, `−0.3` or `0.0`: a change that rounds to nothing has no sign."""
    if change is None:
        return "none (no task)"
    text = f"{abs(change):.1f}"
    return text if text == "0.0" else ("+" if change > 0 else "−") + text
