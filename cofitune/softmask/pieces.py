"""AdamW's step on a long flat tensor taken a piece at a time, so that hooks around it copy a piece and not the whole.

ZeRO-3 steps on sub-groups by itself; stages 1 and 2 step on all that a rank trains, and a copy of that would be the
fullest moment of a run. AdamW treats every element by itself, so pieces come to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cofitune.zero import Shard

# elements: a CPU's kernels compute in vectors from the start of what they get, and what is left over one by one,
# perhaps rounded otherwise; so there a piece begins where a vector of the whole does
ALIGNED_ON_CPU = 64
STATES = ("exp_avg", "exp_avg_sq")


def step_in_pieces(optimizer: torch.optim.AdamW, rows: Mapping[int, Sequence[Shard]], elements: int) -> None:
    """Let `optimizer.step` run once for each piece, its hooks included; they see pieces as the groups' parameters.

    Args:
        rows: id of a flat tensor → the shards that a cut must leave whole rows of. Tensors without any stay whole.
        elements: of a piece at most, if rows allow that.
    """
    whole_step = optimizer.step

    @wraps(whole_step)  # with the mark of a learning-rate schedule, which would warn of a step that it has not seen
    def step(closure: None = None) -> None:
        groups = optimizer.param_groups
        try:
            for group in groups:
                for flat in group["params"]:
                    aligned = ALIGNED_ON_CPU if flat.device.type == "cpu" else 1
                    cuts = cut_points(flat.numel(), rows.get(id(flat), ()), elements, aligned)
                    for piece in _pieces(optimizer, group, flat, cuts):
                        optimizer.param_groups = [{**group, "params": [piece]}]
                        whole_step()
        finally:
            optimizer.param_groups = groups

    optimizer.step = step  # type: ignore[method-assign]


def place_of(tensor: Tensor) -> tuple[Tensor, int]:
    """The whole flat tensor that an optimizer's parameter is a piece of, and at which of its elements that begins."""
    place: tuple[Tensor, int] = getattr(tensor, "piece_of", (tensor, 0))
    return place


def cut_points(numel: int, shards: Sequence[Shard], elements: int, aligned: int) -> list[int]:
    """Where a flat tensor is cut, 0 and its end included: between rows of its shards.

    Args:
        elements: of a piece at most, if rows allow that.
        aligned: what a place is a multiple of.
    """

    cuts = [0]
    while shards and numel - cuts[-1] > elements:
        aim = (cuts[-1] + elements) // aligned * aligned
        found = _place_down(aim, cuts[-1], shards, aligned) or _place_up(aim + aligned, numel, shards, aligned)
        if found is None:
            break
        cuts.append(found)
    return [*cuts, numel]


def _place_down(place: int, after: int, shards: Sequence[Shard], aligned: int) -> int | None:
    """The last place up to this aligned one, and behind `after`, where no row is parted."""
    while place > after:
        shard = _around(place, shards)
        if shard is None:
            return place
        columns = math.prod(shard.shape[1:])
        row = place - (shard.start + place - shard.offset) % columns
        for found in range(row, max(after, shard.offset), -columns):
            if found % aligned == 0:
                return found
        place = shard.offset // aligned * aligned
    return None


def _place_up(place: int, end: int, shards: Sequence[Shard], aligned: int) -> int | None:
    """The first place from this aligned one on, and before `end`, where no row is parted."""
    while place < end:
        shard = _around(place, shards)
        if shard is None:
            return place
        columns, last = math.prod(shard.shape[1:]), shard.offset + shard.numel
        row = place + -(shard.start + place - shard.offset) % columns
        for found in range(row, min(end, last), columns):
            if found % aligned == 0:
                return found
        place = -(-last // aligned) * aligned
    return None


def _around(place: int, shards: Sequence[Shard]) -> Shard | None:
    """The shard that a place lies within, and not at an end of."""
    return next((s for s in shards if s.offset < place < s.offset + s.numel), None)


def _pieces(
    optimizer: torch.optim.AdamW, group: Mapping[str, object], flat: Tensor, cuts: Sequence[int]
) -> Iterator[Tensor]:
    """The pieces of a flat tensor one after another, each with its part of gradient and states meanwhile."""
    if len(cuts) == 2 or flat.grad is None:
        yield flat
        return
    state = optimizer.state[flat]
    if not state:  # as torch begins it
        on = flat.device if group["fused"] or group["capturable"] else torch.device("cpu")
        state["step"] = torch.zeros((), dtype=torch.float32, device=on)
        state.update({name: torch.zeros_like(flat.data) for name in STATES})
    before = state["step"].clone()
    for begin, end in pairwise(cuts):
        piece: Any = flat.data[begin:end]
        piece.grad = flat.grad[begin:end]
        piece.piece_of = flat, begin
        count = before.clone()
        optimizer.state[piece] = {"step": count, **{name: state[name][begin:end] for name in STATES}}
        yield piece
        state["step"].copy_(count)
        del optimizer.state[piece]
