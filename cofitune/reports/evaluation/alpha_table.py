"""The choice of alpha on the terminal. Reads `alpha.json` alone."""

from __future__ import annotations

from rich.table import Table

from cofitune.reports.console import plain_table
from cofitune.reports.shape import Entry
from cofitune.reports.text import NONE, number


def alpha_table(content: Entry) -> Table:
    """A row an alpha, from the run down to the base: the development score, the gain kept, and the drift."""
    figure = "dev loss" if "loss" in content["points"][0] else "dev score"
    table = plain_table()
    for name in ("alpha", figure, "gain kept", "drift", ""):
        table.add_column(name, justify="right" if name else "left")
    for point in content["points"]:
        score = number(point["score"]) if "score" in point else number(point["loss"], 4)
        mark = "← chosen" if point["alpha"] == content["alpha"] else ""
        table.add_row(f"{point['alpha']:g}", score, _percent(point["kept"]), number(point["drift"], 3), mark)
    return table


def alpha_sentence(content: Entry) -> str:
    """What the choice keeps of the gain, and what it saves in drift against the run itself."""
    points = {point["alpha"]: point for point in content["points"]}
    alpha, whole = content["alpha"], points[1.0]
    if alpha == 1:
        below = points[max(a for a in points if a < 1)]
        lead = (
            f"alpha 1, the run itself: {below['alpha']:g} keeps only {_percent(below['kept'])} of the gain, and "
            f"{_percent(content['keep'])} are asked for"
        )
    else:
        lead = f"alpha {alpha:g} keeps {_percent(points[alpha]['kept'])} of the gain"
    if whole["drift"] is None:
        return f"{lead}; drift is unknown: {content['drift']['unknown']}"
    instead = "" if alpha == 1 else f" instead of {number(whole['drift'], 3)}"
    return f"{lead}; drift {number(points[alpha]['drift'], 3)}{instead} nats a token"


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{number(100 * share)} %"
