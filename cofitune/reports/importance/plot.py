"""The importance of every layer's units in one small picture: how it is spread, and which heads matter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cofitune.importance_file import ATTENTION_HEADS, Reliability, known_units
from cofitune.reports.figure import SERIES, Picture, draw
from cofitune.reports.importance.table import title_of

COLOURS = "cividis"  # alike to readers with and without colour blindness, and in grey
COLUMNS = 100  # a wide layer is shown in percent of its units
PANELS = 4  # side by side


def importance_picture(
    name: str, vectors: dict[str, Tensor], title: str = "", reliable: Mapping[str, Reliability] | None = None
) -> Picture:
    """A panel a unit kind: heads as they stand, of which there are few; other units sorted within each layer.

    Beside them each layer's mean over the unit kinds and, where it is known, the rank correlation of two halves of the
    data.

    Args:
        vectors: each unit kind → [L, units] in [0, 1].
        title: stands above, for a picture that stands alone.
        reliable: how far each unit kind's importance repeats itself.
    """
    halves = {kind: one.by_layer for kind, one in (reliable or {}).items() if kind in vectors}
    by_layer = torch.stack([vector.float().nanmean(dim=-1) for vector in vectors.values()]).mean(dim=0).tolist()

    def paint(figure: Any, narrow: bool) -> None:
        panels, last = _panels(figure, len(vectors), narrow)
        image: Any = None
        for number, (axes, (kind, vector)) in enumerate(zip(panels, vectors.items(), strict=True)):
            is_sorted = kind != ATTENTION_HEADS
            values = (by_rank(vector) if is_sorted else vector).float().numpy()
            extent = (0, 100, -0.5, len(values) - 0.5) if is_sorted else None
            image = axes.imshow(
                values, aspect="auto", cmap=COLOURS, vmin=0, vmax=1, origin="lower", interpolation="nearest",
                extent=extent,
            )  # fmt: skip
            axes.grid(visible=False)
            axes.set_title(f"{title_of(kind)}, {vector.shape[1]:,} a layer", loc="left")
            axes.set_xlabel("units, most important first (%)" if is_sorted else "head (index)")
            if narrow or number % PANELS == 0:
                axes.set_ylabel("layer (index)")
            for axis in (axes.xaxis, axes.yaxis):
                axis.get_major_locator().set_params(integer=True)
        side = {"location": "bottom", "shrink": 0.8} if narrow else {"location": "right", "shrink": 0.9}
        last.barh(range(len(by_layer)), by_layer, height=1.0, color=SERIES[6])
        known = [r for correlations in halves.values() for r in correlations if not math.isnan(r)]
        last.set_xlim(min(0.0, *known, 0.0), 1)  # halves of mere noise may contradict each other
        last.set_ylim(-0.5, len(by_layer) - 0.5)
        last.set_title("layer's mean", loc="left")
        last.set_xlabel("importance")
        for number, (kind, correlations) in enumerate(halves.items()):
            last.plot(correlations, range(len(correlations)), color=SERIES[number], label=f"halves, {title_of(kind)}")
        if halves:
            last.set_title("layer's mean; rank correlation of two halves", loc="left", fontsize=6)
            last.legend(fontsize=5, loc="lower right")
        last.yaxis.get_major_locator().set_params(integer=True)
        if title:
            figure.suptitle(title, fontsize=8)
        bar = figure.colorbar(image, ax=[*panels, last], label="importance (0: free, 1: held)", **side)
        bar.outline.set_visible(False)

    means = "; ".join(f"{title_of(kind)} {float(v.nanmean()):.2f}" for kind, v in vectors.items())
    caption = (
        "Importance of the units of each layer, from 0 (free to move) to 1 (held): attention heads as they stand, the "
        "others sorted within their layer, and each layer's mean. Layer 0 is the lowest."
    )
    heights = (2.6 * math.ceil(len(vectors) / PANELS), 1.9 * (len(vectors) + 1))
    return draw(name, caption, f"Heat maps, layers by units. Mean importance: {means}.", paint, heights)


def _panels(figure: Any, count: int, narrow: bool) -> tuple[list[Any], Any]:
    """The axes of so many kinds of units, and those of the layers' means: below one another, or four side by side."""
    if narrow:
        *panels, last = figure.subplots(count + 1, 1, squeeze=False).ravel()
        return panels, last
    rows, wide = math.ceil(count / PANELS), min(count, PANELS)
    grid = figure.add_gridspec(rows, wide + 1, width_ratios=[3] * wide + [1])
    return [figure.add_subplot(grid[n // wide, n % wide]) for n in range(count)], figure.add_subplot(grid[:, wide])


def by_rank(vector: Tensor) -> Tensor:
    """Sort each layer's units, the most important first, and take the mean of each hundredth of them.

    Args:
        vector: [L, units].

    Returns:
        [L, C], C being `COLUMNS`, or the units where there are fewer; NaN where a layer has fewer than C.
    """
    columns = min(COLUMNS, vector.shape[1])
    ordered = (known_units(row).sort(descending=True).values for row in vector.double())
    return torch.stack([torch.stack([p.mean() for p in row.tensor_split(columns)]) for row in ordered])
