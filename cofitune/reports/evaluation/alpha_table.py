"""The choice of alpha on the terminal. Reads `alpha.json` alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

Entry = Mapping[str, Any]
NONE = "–"


def alpha_table(content: Entry) -> Table:
    """A row an alpha, from the run down to the base: the development score, the gain kept, and the drift."""
    figure = "dev loss" if "loss" in content["points"][0] else "dev score"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("alpha", figure, "gain kept", "drift", ""):
        table.add_column(name, justify="right" if name else "left")
    for point in content["points"]:
        score = f"{point['score']:.1f}" if "score" in point else f"{point['loss']:.4f}"
        mark = "← chosen" if point["alpha"] == content["alpha"] else ""
        table.add_row(f"{point['alpha']:g}", _minus(score), _percent(point["kept"]), _nats(point["drift"]), mark)
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
    instead = "" if alpha == 1 else f" instead of {_nats(whole['drift'])}"
    return f"{lead}; drift {_nats(points[alpha]['drift'])}{instead} nats a token"


def _percent(share: float | None) -> str:
    return NONE if share is None else _minus(f"{100 * share:.1f} %")


def _nats(value: float | None) -> str:
    if value is None:
        return NONE
    text = f"{value:.3f}"
    return text.removeprefix("-") if float(text) == 0 else _minus(text)


def _minus(text: str) -> str:
    return text.replace("-", "−")
