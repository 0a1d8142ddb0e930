"""AdamW's moments of a flat tensor in fp32, whichever optimizer keeps them: torch's own, or bitsandbytes' 8-bit codes.

bitsandbytes keeps a code of 8 bits an element and a scale for each `BLOCK` of them; the value is table[code] × scale.
Checkpoints hold values, which any number of ranks can go on from, and beside them each rank's scales: where its shards
lie as they lay, the codes come back exactly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cofitune.zero import Flat, flats, init_adam_state, inner_optimizer, moments

if TYPE_CHECKING:
    from cofitune.zero import Engine

BLOCK = 256
CODED_AT_ONCE = 2**14 * BLOCK  # elements: looking for the nearest code takes some 40 bytes of each
NUMBERS = {"exp_avg": 1, "exp_avg_sq": 2}  # in bitsandbytes' names
LAYOUT = "layout"


def begin_moments(engine: Engine, step: int) -> None:
    """Give every flat tensor the state after `step` steps, its moments zeros for the caller to fill."""
    inner = inner_optimizer(engine)
    if isinstance(inner, torch.optim.AdamW) or not hasattr(inner, "init_state"):
        init_adam_state(engine, step)
        return
    group = inner.param_groups[0]
    held = group["params"]
    for flat in flats(engine):
        group["params"] = [flat.tensor]  # under stage 3 the groups are empty between two steps
        inner.init_state(group, flat.tensor, 0, 0)
        inner.state[flat.tensor]["step"] = step
    group["params"] = held


def read_moment(engine: Engine, flat: Flat, kind: str, place: slice) -> Tensor:
    """A stretch of a flat tensor's moment in fp32; `kind` is exp_avg or exp_avg_sq."""
    state = moments(engine, flat)
    if kind in state:
        return _tensor(state[kind])[place]
    number = NUMBERS[kind]
    kept = _tensor(state[f"state{number}"])
    if kept.dtype != torch.uint8:  # small tensors are kept whole
        return kept[place]
    blocks = torch.arange(place.start, place.stop, device=kept.device) // BLOCK
    table, scales = _tensor(state[f"qmap{number}"]), _tensor(state[f"absmax{number}"])
    return table[kept[place].int()] * scales[blocks]


class MomentWriter:
    """Puts fp32 moments into an engine whose state was begun, a stretch at a time; `finish` makes codes of them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # by a flat tensor's id: whole blocks are coded together. In the host's memory, for a device that has room for
        # 8-bit moments may have none for those in fp32
        self._waiting: dict[tuple[int, str], Tensor] = {}

    def write(self, flat: Flat, kind: str, place: slice, values: Tensor) -> None:
        """Put a stretch of a moment."""
        state = moments(self._engine, flat)
        target = state.get(kind)
        if target is None:
            kept = _tensor(state[f"state{NUMBERS[kind]}"])
            target = kept
            if kept.dtype == torch.uint8:
                target = self._waiting.setdefault(
                    (id(flat.tensor), kind), torch.zeros_like(flat.tensor.data, device="cpu")
                )
        _tensor(target)[place].copy_(values)

    def finish(self, scales: Mapping[str, Tensor]) -> None:
        """Make codes of what waits for them.

        Args:
            scales: as `block_scales` gave them to this rank; where its shards lie otherwise now, they are made anew.
        """
        known = LAYOUT in scales and torch.equal(scales[LAYOUT], _layout(self._engine))
        for index, flat in enumerate(flats(self._engine)):
            state = moments(self._engine, flat)
            for kind, number in NUMBERS.items():
                values = self._waiting.pop((id(flat.tensor), kind), None)
                if values is None:
                    continue
                kept, largest = _tensor(state[f"state{number}"]), _tensor(state[f"absmax{number}"])
                if known:
                    largest.copy_(scales[_key(index, kind)])
                for begin in range(0, len(values), CODED_AT_ONCE):
                    place, blocks = (slice(begin // n, (begin + CODED_AT_ONCE) // n) for n in (1, BLOCK))
                    part, table = values[place].to(kept.device), _tensor(state[f"qmap{number}"])
                    kept[place], largest[blocks] = _encode(part, table, largest[blocks] if known else None)


def block_scales(engine: Engine) -> dict[str, Tensor]:
    """This rank's scales and where its shards lie; empty where moments are kept in fp32."""
    result = {
        _key(index, kind): _tensor(moments(engine, flat)[f"absmax{number}"]).cpu()
        for index, flat in enumerate(flats(engine))
        for kind, number in NUMBERS.items()
        if f"absmax{number}" in moments(engine, flat)
    }
    return {LAYOUT: _layout(engine), **result} if result else {}


def _encode(values: Tensor, table: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor]:
    """The codes [n] of values [n], each the nearest entry of its table, and the scales [blocks]."""
    blocks = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1) if scales is None else scales
    # a block of zeros has scale 0, and the code of 0
    relative = (blocks / torch.where(largest > 0, largest, 1.0)[:, None]).view(-1)[: len(values)]
    ordered, order = table.sort()
    between = (ordered[1:] + ordered[:-1]) / 2
    return order[torch.bucketize(relative, between)].to(torch.uint8), largest


def _layout(engine: Engine) -> Tensor:
    """A hash of where each shard of this rank lies, as a tensor."""
    places = [[[s.name, s.start, s.offset, s.numel] for s in flat.shards] for flat in flats(engine)]
    digest = hashlib.sha256(json.dumps(places).encode()).digest()
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8).clone()


def _key(index: int, kind: str) -> str:
    return f"scale-{index}-{kind}"


def _tensor(value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise RuntimeError(f"the optimizer keeps a {type(value).__name__} where a tensor was expected")
    return value
