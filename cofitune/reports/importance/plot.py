"""Importance as a picture: layer × units as they stand, sorted, and each layer's mean; a row of panels a unit kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from cofitune.importance_file import ATTENTION_HEADS, FFN_NEURONS, FFN_OUTPUTS
from cofitune.reports.figure import save_figure

COLOURS = "cividis"  # alike to readers with and without colour blindness, and in grey
BARS = "#7d7c78"  # the middle of those colours
DOTS_AN_INCH = 100
NAMES = {ATTENTION_HEADS: "heads", FFN_NEURONS: "FFN neurons", FFN_OUTPUTS: "FFN outputs"}


def draw_importance(folder: Path, vectors: dict[str, Tensor], title: str) -> tuple[Path, Path]:
    """Write importance.png and importance.svg; the same vectors give the same bytes.

    Args:
        vectors: each unit kind → [L, units] in [0, 1].

    Returns:
        The two files.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.6 * len(vectors)), dpi=DOTS_AN_INCH, layout="constrained")
    panels = figure.subplots(len(vectors), 3, squeeze=False, sharey="row", width_ratios=(4, 4, 1))
    image: Any = None
    for (left, middle, right), (kind, vector) in zip(panels, vectors.items(), strict=True):
        ordered = vector.sort(dim=-1, descending=True).values
        name = f"{NAMES[kind]} ({vector.shape[1]:,} a layer)"
        for axes, values, what in ((left, vector, "as they stand"), (middle, ordered, "sorted in each layer")):
            image = axes.imshow(
                values.float().numpy(), aspect="auto", cmap=COLOURS, vmin=0, vmax=1, origin="lower",
                interpolation="nearest",
            )  # fmt: skip
            axes.set_title(f"{name}, {what}", fontsize=9)
        left.set_xlabel("unit (index)", fontsize=8)
        left.set_ylabel("layer (index)", fontsize=8)
        middle.set_xlabel("unit (rank by importance)", fontsize=8)
        means = vector.float().mean(dim=-1).tolist()
        right.barh(range(len(means)), means, height=1.0, color=BARS)
        right.set_xlim(0, 1)
        right.set_title("layer's mean", fontsize=9)
        right.set_xlabel("importance", fontsize=8)
        for axes in (left, middle, right):
            axes.tick_params(labelsize=7)
    bar = figure.colorbar(image, ax=panels, label="importance (0: free, 1: held)", shrink=0.5, aspect=30, pad=0.01)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=10)
    return save_figure(figure, folder, "importance")
