"""The frontiers as a picture: versatility against speciality, and instruction following apart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cofitune.files import write_atomically
from cofitune.reports.figure import can_draw
from cofitune.reports.importance.plot import DOTS_AN_INCH

__all__ = ["can_draw", "draw_frontiers"]

# Okabe and Ito's colours, told apart by readers with any kind of colour vision; markers differ besides
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
MARKERS = "osD^vP*X<>hp"
PANELS = {"versatility": "versatility (points)", "instruct": "instruction following (points)"}
TITLES = {"versatility": "the methods' frontiers", "instruct": "instruction following along the same frontiers"}


def draw_frontiers(folder: Path, content: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write frontier.png and frontier.svg; the same content gives the same bytes.

    Every point is drawn, those of its method's frontier filled and joined, the others hollow.

    Args:
        content: of compare.json.

    Returns:
        The two files.
    """
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), dpi=DOTS_AN_INCH, layout="constrained")
    panels = figure.subplots(1, len(PANELS), squeeze=False)[0]
    for axes, (score, label) in zip(panels, PANELS.items(), strict=True):
        _panel(axes, content, score)
        axes.set_title(TITLES[score], fontsize=9)
        axes.set_xlabel("speciality (points: 0 is guessing, 100 all right)", fontsize=9)
        axes.set_ylabel(label, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    partial = content["partial"]
    message = f"partial: {partial['done']} of {partial['runs']} runs; " if partial else ""
    figure.suptitle(f"{message}each point a rate and an alpha, filled where its method has no better one", fontsize=10)
    files = folder / "frontier.png", folder / "frontier.svg"
    with matplotlib.rc_context({"svg.hashsalt": "cofitune", "svg.fonttype": "none"}):
        for file, metadata in zip(files, ({"Software": None}, {"Date": None}), strict=True):
            write_atomically(
                file,
                lambda to, f=file, m=metadata: figure.savefig(to, format=f.suffix[1:], metadata=m),  # type: ignore[misc]
            )
    return files


def _panel(axes: Any, content: Mapping[str, Any], score: str) -> None:
    base = content["base"]
    for number, method in enumerate(content["methods"]):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        own = {p["id"]: p for p in content["points"] if p["method"] == method}
        line = [base if name == "base" else own[name]["scores"] for name in content["frontiers"][method]]
        known = [entry for entry in line if entry[score] is not None]
        axes.plot([e["speciality"] for e in known], [e[score] for e in known], color=colour, linewidth=1, alpha=0.7)
        for filled in (True, False):
            points = [
                p["scores"] for p in own.values() if p["on_frontier"] == filled and p["scores"][score] is not None
            ]
            axes.scatter(
                [p["speciality"] for p in points], [p[score] for p in points], s=28, marker=marker, edgecolors=colour,
                facecolors=colour if filled else "none", linewidths=1, label=method if filled else None,
            )  # fmt: skip
    if base[score] is not None:
        axes.scatter([base["speciality"]], [base[score]], s=70, marker="s", facecolors="none", edgecolors="#555555")
        axes.annotate("base", (base["speciality"], base[score]), textcoords="offset points", xytext=(7, 5), fontsize=8)
