"""Soft mask on the update: θ ← θ_old + (1 − I)(θ_new − θ_old), weight decay included.

Hooks before and after DeepSpeed's inner optimizer see its local fp32 shards before they are copied to the model's
precision. Each shard is a stretch of a weight laid out row by row, so its first and last rows may be cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from cofitune.softmask.factors import Factor
from cofitune.softmask.pieces import place_of, step_in_pieces
from cofitune.softmask.retained import RetainedUpdate
from cofitune.zero import Shard


def mask_updates(
    optimizer: torch.optim.Optimizer,
    shards: Mapping[int, list[Shard]],
    factors: Mapping[str, Factor],
    kept: RetainedUpdate | None = None,
    elements: int | None = None,
) -> UpdateMask:
    """Install the mask on the inner optimizer.

    Args:
        optimizer: steps on flat fp32 tensors, each a row of shards.
        shards: id of a flat tensor → its shards (`cofitune.zero.shards`).
        factors: parameter name → factor; parameters without one move freely.
        kept: told, while it is watching, what each update would have been and what is left of it.
        elements: of a flat tensor, how many are stepped on and copied at once; None: all of it.
    """
    if elements is not None and isinstance(optimizer, torch.optim.AdamW):
        masked = {key: [s for s in row if s.name in factors] for key, row in shards.items()}
        step_in_pieces(optimizer, masked, elements)
    return UpdateMask(optimizer, shards, factors, kept)


class UpdateMask:
    """The installed hooks. `remove()` takes them off."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        shards: Mapping[int, list[Shard]],
        factors: Mapping[str, Factor],
        kept: RetainedUpdate | None,
    ) -> None:
        self._kept = kept
        self._masked = {key: [(s, factors[s.name]) for s in row if s.name in factors] for key, row in shards.items()}
        self._old: list[tuple[Tensor, Shard, Factor, Tensor]] = []
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._remember),
            optimizer.register_step_post_hook(self._hold_back),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _remember(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._old = [
            (flat, shard, factor, _piece(flat, shard).clone())
            for group in optimizer.param_groups
            for flat in group["params"]
            for shard, factor in self._masked_in(flat)
        ]

    def _masked_in(self, tensor: Tensor) -> Iterator[tuple[Shard, Factor]]:
        """What is masked of a tensor that is stepped on: a flat one, or a piece of one."""
        flat, begin = place_of(tensor)
        for shard, factor in self._masked.get(id(flat), []):
            first = max(shard.offset, begin)
            numel = min(shard.offset + shard.numel, begin + tensor.numel()) - first
            if numel > 0:
                start = shard.start + first - shard.offset
                yield replace(shard, start=start, offset=first - begin, numel=numel), factor

    def _hold_back(self, *_: object) -> None:
        for flat, shard, factor, old in self._old:
            new = _piece(flat, shard)
            if self._kept is not None and self._kept.watching:
                free, start = new - old, old.clone()
                hold_back(new, old, shard, factor)
                self._kept.add(shard.name, free, new - start)
            else:
                hold_back(new, old, shard, factor)
        self._old = []


def hold_back(new: Tensor, old: Tensor, shard: Shard, factor: Factor) -> None:
    """In place: new ← old + f·(new − old), each element by its unit's f; `old` is lost. Both are [shard.numel]."""
    by_row, by_column = _along(factor, new)
    columns = math.prod(shard.shape[1:])
    for begin, end in _stretches(shard, columns):
        first = shard.start + begin
        row, column = divmod(first, columns)
        rows = max(1, (end - begin) // columns)
        # `lerp` gives exactly `old` at factor 0 and exactly `new` at factor 1
        part = (rows, (end - begin) // rows)
        along = [] if by_row is None else [by_row[row : row + rows, None]]
        along += [] if by_column is None else [by_column[None, column : column + part[1]]]
        weight = along[0] if len(along) == 1 else along[0] * along[1]
        target = new[begin:end].view(part)
        target.copy_(old[begin:end].view(part).lerp_(target, weight.expand(part)))


def _along(factor: Factor, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A factor's values by row and by column, on the device and in the precision of a tensor; None: all 1."""
    along, across = (None if v is None else v.to(like.device, like.dtype) for v in (factor.values, factor.across))
    return (along, across) if factor.axis == 0 else (across, along)


def _piece(flat: Tensor, shard: Shard) -> Tensor:
    return flat.data[shard.offset : shard.offset + shard.numel]


def _stretches(shard: Shard, columns: int) -> Iterator[tuple[int, int]]:
    """Cut a shard into the rest of a row, whole rows, and the beginning of a row (any of them may be missing)."""
    head = min(-shard.start % columns, shard.numel)
    whole = head + (shard.numel - head) // columns * columns
    for begin, end in ((0, head), (head, whole), (whole, shard.numel)):
        if end > begin:
            yield begin, end
