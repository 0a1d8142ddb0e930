"""Where DeepSpeed keeps things. The only file that knows its internals: gather a parameter, find a shard's place.

Written for deepspeed 0.19; `shards` is checked against the whole parameters by the tests under every stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shard:
    """A piece of a parameter inside one of the optimizer's flat fp32 tensors on this rank.

    Attributes:
        name: the parameter's name in the model.
        shape: the whole parameter's shape.
        start: first element, counted in the whole parameter laid out row by row.
        offset: first element, counted in the flat tensor.
        numel: elements on this rank.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    offset: int
    numel: int


def skip_cpu_communication_op() -> None:
    """Let CPU ranks talk through gloo alone, before `init_distributed`.

    DeepSpeed would otherwise compile an all-reduce through shared memory at its first start: a minute or more, with a
    C++ compiler, for a speed-up that only CPU training on several ranks would feel.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextmanager
def gathered(parameter: nn.Parameter) -> Iterator[Tensor]:
    """Give the whole parameter for reading, whatever the sharding. Every rank must enter."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter.data
    else:
        yield parameter.data


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer that steps on the fp32 shards, before they are copied to the model's precision."""
    inner: torch.optim.Optimizer = engine.basic_optimizer
    return inner


def shards(engine: Any) -> dict[int, list[Shard]]:
    """Map the id of each flat fp32 tensor that the inner optimizer steps on to the shards inside it.

    Raises:
        RuntimeError: an optimizer class that this file does not know (a DeepSpeed newer than it).
    """
    names = {id(p): name for name, p in engine.module.named_parameters()}
    optimizer = engine.optimizer
    kind = type(optimizer).__name__
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        return _stage3_shards(optimizer, names)
    if kind == "DeepSpeedZeroOptimizer":
        return _stage12_shards(optimizer, names)
    raise RuntimeError(f"the update-mode soft mask does not know DeepSpeed's optimizer {kind}")


def _stage3_shards(optimizer: Any, names: dict[int, str]) -> dict[int, list[Shard]]:
    """Stage 3 cuts each parameter into `world` equal pieces, the last ones padded, a rank's in a row."""
    rank = torch.distributed.get_rank(optimizer.dp_process_group)
    found: dict[int, list[Shard]] = {}
    for index, group in enumerate(optimizer.fp16_groups):
        pieces = []
        for parameter in group:
            _, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = rank * length
            numel = min(length, parameter.ds_numel - start)
            if numel > 0:
                pieces.append(Shard(names[id(parameter)], tuple(parameter.ds_shape), start, offset, numel))
        found[id(optimizer.fp32_partitioned_groups_flat[index])] = pieces
    return found


def _stage12_shards(optimizer: Any, names: dict[int, str]) -> dict[int, list[Shard]]:
    """Stages 1 and 2 lay all parameters in a row and cut the row; `_hp_mapping` says what fell to this rank."""
    found: dict[int, list[Shard]] = {}
    for index, group in enumerate(optimizer.bit16_groups):
        pieces = []
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:
                whole, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
                shape = tuple(parameter.shape)
                pieces.append(Shard(names[id(parameter)], shape, whole.start, flat.start, flat.numel))
        found[id(optimizer.single_partition_of_fp32_groups[index])] = pieces
    return found
