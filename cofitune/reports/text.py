"""Numbers, durations and plurals as every report writes them."""

from __future__ import annotations

import math

from cofitune.model.layouts import GROUPS
from cofitune.model.region import Region

NONE = "–"


def number(value: float | None, digits: int = 1) -> str:
    """`12.3` or `−0.4`: with a true minus sign, which what rounds to nothing has not; a dash where there is none.

    Example:
        >>> number(-0.44), number(-0.04), number(None)
        ('−0.4', '0.0', '–')
    """
    if value is None:
        return NONE
    text = f"{abs(value):.{digits}f}"
    return text if value >= 0 or float(text) == 0 else "−" + text


def signed(change: float | None, digits: int = 1) -> str:
    """`+1.2`, `−0.3` or `0.0`: a change that rounds to nothing has no sign."""
    if change is None:
        return "none (no task)"
    text = f"{abs(change):.{digits}f}"
    return text if float(text) == 0 else ("+" if change > 0 else "−") + text


def region_text(region: Region | None) -> str:
    """`8-15 × up+down`: a region in few columns; groups by their names."""
    if region is None:
        return "the base"
    for name, modules in GROUPS.items():
        if set(region.modules) == set(modules):
            return f"{region.layers_text} × {name}"
    return f"{region.layers_text} × {'+'.join(m.removesuffix('_proj') for m in region.modules)}"


def weights_text(count: int) -> str:
    """A number of weights in few columns."""
    return f"{count / 1e6:.1f} M" if count >= 100_000 else f"{count:,}"


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: room - 1] + "…"


def many(count: int, what: str) -> str:
    """A count with its noun: `1 trial`, `2,000 steps`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def clock(seconds: float) -> str:
    """`0:04:10`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def duration(seconds: float) -> str:
    """About how long, for a plan: `40 s`, `0:12:10`, `3:24:00`."""
    if seconds < 120:
        return f"{math.ceil(seconds)} s"
    unit = 10 if seconds < 3600 else 60
    return clock(unit * round(seconds / unit))
