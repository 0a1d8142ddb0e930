"""Importance as a picture: layer × units, as they stand and sorted, one row of panels a unit kind."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from cofitune.files import write_atomically
from cofitune.reports.importance_table import TITLES

EXTRA = "plots"
COLOURS = "cividis"  # alike to readers with and without colour blindness, and in grey
DOTS_AN_INCH = 110


def can_draw() -> bool:
    """Whether matplotlib, the extra `plots`, is installed."""
    return find_spec("matplotlib") is not None


def draw_importance(folder: Path, vectors: dict[str, Tensor], title: str) -> tuple[Path, Path]:
    """Write importance.png and importance.svg; the same vectors give the same bytes.

    Args:
        vectors: each unit kind → [L, units] in [0, 1].

    Returns:
        The two files.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.6 * len(vectors)), dpi=DOTS_AN_INCH, layout="constrained")
    panels = figure.subplots(len(vectors), 2, squeeze=False)
    image: Any = None
    for row, (kind, vector) in zip(panels, vectors.items(), strict=True):
        ordered = vector.sort(dim=-1, descending=True).values
        for axes, values, what in zip(row, (vector, ordered), ("as they stand", "sorted in each layer"), strict=True):
            image = axes.imshow(
                values.float().numpy(), aspect="auto", cmap=COLOURS, vmin=0, vmax=1, origin="lower",
                interpolation="nearest",
            )  # fmt: skip
            axes.set_title(f"{TITLES[kind]}, {what}", fontsize=9)
            axes.set_xlabel("unit (index)" if values is vector else "unit (rank by importance)", fontsize=8)
            axes.set_ylabel("layer (index)", fontsize=8)
            axes.tick_params(labelsize=7)
    figure.colorbar(image, ax=panels, label="importance (0: free, 1: held)", shrink=0.6)
    figure.suptitle(title, fontsize=10)
    return save_figure(figure, folder, "importance")


def save_figure(figure: Any, folder: Path, name: str) -> tuple[Path, Path]:
    """Write a figure as PNG and SVG, without dates and chance ids: the same figure gives the same bytes."""
    import matplotlib

    files = folder / f"{name}.png", folder / f"{name}.svg"
    with matplotlib.rc_context({"svg.hashsalt": "cofitune", "svg.fonttype": "none"}):
        for file, metadata in zip(files, ({"Software": None}, {"Date": None}), strict=True):
            write_atomically(
                file,
                lambda to, f=file, m=metadata: figure.savefig(to, format=f.suffix[1:], metadata=m),  # type: ignore[misc]
            )
    return files
