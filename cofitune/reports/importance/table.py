"""The importance of every layer as a table of 80 columns, in one sentence, and its spread as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from cofitune.importance_file import (
    ATTENTION_HEADS,
    COLUMN_KIND,
    ENOUGH,
    EXPERTS,
    FFN_NEURONS,
    FFN_OUTPUTS,
    Reliability,
    known_units,
)

TITLES = {ATTENTION_HEADS: "heads", FFN_NEURONS: "neurons", FFN_OUTPUTS: "outputs", EXPERTS: "experts"}
MOST_KINDS = 3  # side by side in a table of 80 columns
HIGH, LOW = 0.9, 0.1
MORE_ITEMS = "more items (importance.data, importance.max_items)"


def importance_report(vectors: dict[str, Tensor]) -> RenderableType:
    """The table, what its columns mean, and the summary sentence.

    Args:
        vectors: each unit kind → [L, units] in [0, 1].
    """
    legend = Text(f"mean importance; share of units above {HIGH} and below {LOW}; most important unit", style="dim")
    kinds = list(vectors)
    parts = [kinds[first : first + MOST_KINDS] for first in range(0, len(kinds), MOST_KINDS)]
    tables = [importance_table({kind: vectors[kind] for kind in part}) for part in parts]
    return Group(*tables, legend, Text(summary(vectors)))


def title_of(kind: str) -> str:
    """A kind of unit in words: `heads`, `q columns`."""
    return TITLES.get(kind) or kind.removesuffix(COLUMN_KIND).removesuffix("_proj") + " columns"


def importance_table(vectors: dict[str, Tensor]) -> Table:
    """One row a layer and a last row over all layers; four columns a unit kind.

    Args:
        vectors: each unit kind → [L, units] in [0, 1].
    """
    of_columns = all(kind.endswith(COLUMN_KIND) for kind in vectors)
    title = "Importance of input columns" if of_columns else "Importance"
    table = Table(title=title, box=None, padding=(0, 1, 0, 0), header_style="bold", title_style="bold")
    table.add_column("\nlayer", justify="right", no_wrap=True)
    for kind in vectors:
        for number, head in enumerate(("mean", f">{HIGH}", f"<{LOW}", "top")):
            title = title_of(kind).removesuffix(" columns") if number == 0 else ""
            table.add_column(f"{title}\n{head}", justify="right", no_wrap=True, style="dim" if head == "top" else "")
        table.add_column("\n", width=1)
    num_layers = max(len(v) for v in vectors.values())
    for layer in range(num_layers):
        table.add_row(str(layer), *_cells([v[layer] for v in vectors.values()]))
    table.add_row("all", *_cells(list(vectors.values()), with_top=False), style="bold")
    return table


def summary(vectors: dict[str, Tensor]) -> str:
    """One sentence: how much of the training step the mask leaves, and which layer it holds back most and least."""
    *kinds, last = (f"{1 - float(v.nanmean()):.0%} for the {title_of(kind)}" for kind, v in vectors.items())
    kept = " and ".join(filter(None, (", ".join(kinds), last)))
    by_layer = torch.stack([v.nanmean(dim=-1) for v in vectors.values()]).mean(dim=0)
    most, least = int(by_layer.argmax()), int(by_layer.argmin())
    silent = [f"{title_of(kind)} of layer {layer}" for kind, v in vectors.items() for layer in _all_zero(v)]
    text = (
        f"As a soft mask it leaves, on average, this share of an update: {kept}; it holds layer {most} back most and "
        f"layer {least} least."
    )
    if silent:
        text += f" No unit stands out among the {', '.join(silent)}: their scores are all equal, so nothing is masked."
    return text


def reliability_text(reliable: Mapping[str, Reliability], estimator: object = None) -> str:
    """One sentence: how far the importance repeats itself, and what helps where that is not far enough.

    Args:
        estimator: its name in the config; None where it is not known.
    """
    if not reliable:
        return "Reliability: not known; it takes at least two micro-batches."
    figures = ", ".join(
        f"{title_of(kind)} {'–' if one.whole is None else f'{one.whole:.2f}'}"
        f"{'' if one.split_half is None else f' (halves {one.split_half:.2f})'}"
        for kind, one in reliable.items()
    )
    text = f"Reliability (1 is best): {figures}; how far as much other data would rank a layer's units alike."
    if unreliable(reliable):
        text += f" Below {ENOUGH} it is mostly noise: {remedy(estimator)}."
    return text


def remedy(estimator: object) -> str:
    """What makes an importance of this estimator more reliable."""
    if estimator in ("fisher", "wanda"):  # which take no draws
        return MORE_ITEMS
    return f"{MORE_ITEMS}, more draws (importance.passes) or importance.estimator: fisher"


def unreliable(reliable: Mapping[str, Reliability]) -> dict[str, float]:
    """The unit kinds whose importance is mostly noise, with their reliability."""
    return {kind: one.whole for kind, one in reliable.items() if one.whole is not None and one.whole < ENOUGH}


def spread_csv(vectors: dict[str, Tensor], reliable: Mapping[str, Reliability] | None = None) -> str:
    """A line a layer and unit kind: how its units' importance is spread, in [0, 1], and its most important unit.

    The last column is the rank correlation of the data's two halves in this layer, empty where it is not known.
    """
    reliable = reliable or {}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    quantiles = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
    writer.writerow(
        ["layer", "kind", "units", "mean", "std", *quantiles, "above_0.9", "below_0.1", "top_unit", "split_half"]
    )
    for kind, vector in vectors.items():
        for layer, row in enumerate(map(known_units, vector.double())):
            cut = torch.quantile(row, torch.tensor(list(quantiles.values()), dtype=row.dtype)).tolist()
            shares = [float((row > HIGH).double().mean()), float((row < LOW).double().mean())]
            figures = [float(row.mean()), float(row.std(correction=0)), *cut, *shares]
            half = reliable[kind].by_layer[layer] if kind in reliable else math.nan
            known = "" if math.isnan(half) else f"{half:.4f}"
            writer.writerow([layer, kind, len(row), *(f"{f:.4f}" for f in figures), int(row.argmax()), known])
    return text.getvalue()


def _all_zero(vector: Tensor) -> list[int]:
    return [int(layer) for layer in (vector.nan_to_num() == 0).all(dim=-1).nonzero()]


def _cells(vectors: list[Tensor], with_top: bool = True) -> list[str]:
    cells = []
    for vector in map(known_units, vectors):
        share_high, share_low = float((vector > HIGH).float().mean()), float((vector < LOW).float().mean())
        top = "" if not with_top else str(int(vector.argmax())) if vector.any() else "-"
        cells += [f"{float(vector.mean()):.2f}", f"{share_high:.0%}", f"{share_low:.0%}", top, ""]
    return cells
