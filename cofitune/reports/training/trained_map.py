"""What trained, layer by layer, as the names in a training's manifest tell it: whatever the model's layout."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from cofitune.model.layouts import MODULES
from cofitune.model.region import stretch_text

FROZEN, TRAINED, MASKED, PART, CARRIER = "frozen", "trained", "masked", "part", "carrier"
HELD = " (held part)"  # after the name of a tensor of which a part is frozen (training/delta.py)
_IN_LAYER = re.compile(r"^.*?\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class TrainedMap:
    """Columns are tensors of a layer, rows stretches of layers that are alike.

    Attributes:
        columns: names, the usual modules first.
        rows: the layers (`8-15`) and, for each column, frozen, trained, masked, part (of the tensor),
            carrier (of an adapter) or nothing.
        quiet: tensors of the layers that are frozen in all of them and have no column.
        outside: trained tensors that lie in no layer.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    quiet: tuple[str, ...]
    outside: tuple[str, ...]


def trained_map(
    trained: Iterable[str], frozen: Iterable[str], masked: Sequence[str], adapted: bool = False
) -> TrainedMap:
    """Put the manifest's names into a table.

    Args:
        trained, frozen: names of tensors; one of which a part is held is in both.
        masked: modules under the soft mask.
        adapted: an adapter trained: `trained` are the tensors that carry it, and these too stayed as they were.
    """
    cells: dict[tuple[int, str], str] = {}
    outside = []
    for name in frozen:
        if result := _IN_LAYER.match(name.removesuffix(HELD)):
            cells[int(result[1]), _column(result[2])] = FROZEN
    for name in trained:
        if result := _IN_LAYER.match(name):
            place = int(result[1]), _column(result[2])
            cells[place] = CARRIER if adapted else PART if place in cells else TRAINED
        else:
            outside.append(name)
    moving = {column for (_, column), state in cells.items() if state != FROZEN}
    known = [column for column in dict.fromkeys(c for _, c in cells) if column in moving or column in MODULES]
    columns = tuple(sorted(known, key=lambda c: MODULES.index(c) if c in MODULES else len(MODULES)))
    under_mask = {c for c in moving if c.removesuffix(".bias") in masked}
    if masked and not under_mask:  # fused: the modules have no tensors of their own names
        under_mask = moving
    layers = sorted({layer for layer, _ in cells})

    def row(layer: int) -> tuple[str, ...]:
        states = (cells.get((layer, column), "") for column in columns)
        return tuple(
            MASKED if s == TRAINED and c in under_mask else s for s, c in zip(states, columns, strict=True)
        )  # fmt: skip

    quiet = tuple(dict.fromkeys(column for _, column in cells if column not in columns))
    rows = tuple((stretch_text(list(same)), states) for states, same in groupby(layers, key=row))
    return TrainedMap(columns, rows, quiet, tuple(outside))


def _column(rest: str) -> str:
    """`self_attn.q_proj.weight` → `q_proj`; a bias keeps its name."""
    *_, module, what = f".{rest}".split(".")
    return module if what == "weight" else f"{module}.{what}".strip(".")
