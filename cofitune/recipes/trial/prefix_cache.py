"""What a search keeps of the frozen prefix from trial to trial: whether it can, and what it takes."""

from __future__ import annotations

from pathlib import Path

import torch

from cofitune.config import schema
from cofitune.data.batches import count_positions
from cofitune.errors import UserError
from cofitune.files import gib
from cofitune.host_memory import free_memory
from cofitune.recipes.folders import free_bytes
from cofitune.recipes.from_config import base_config
from cofitune.recipes.train.plan import TrainPlan
from cofitune.recipes.trial.loss_items import LossItems
from cofitune.training.prefix_cache import changing_prefix
from cofitune.training.shared_prefix_cache import DiskStore, MemoryStore, SharedPrefix


def check_prefix(kind: str, model: schema.Model) -> None:
    """Refuse a prefix cache that would not give the same loss.

    Args:
        kind: `search.prefix_cache`.

    Raises:
        UserError: the model's lower layers answer differently every time, or its code is its own.
    """
    if kind == "none":
        return
    reason = changing_prefix(base_config(model))
    if model.trust_remote_code:
        reason = "with model.trust_remote_code the model's layers are code that we do not know"
    if reason:
        raise UserError(f"search.prefix_cache: {kind} would not give the same loss: {reason}; set it to none")


def layer_bytes(plan: TrainPlan, items: LossItems | None) -> int:
    """Bytes that one kept layer takes on all ranks together.

    A search keeps a layer for each of its trials' lowest trained layers, layer 0 excepted.

    Args:
        items: what losses are measured on besides the held-out answers; None: none are.
    """
    positions = count_positions(plan.steps, plan.lengths, plan.config.train.seed)
    if items:
        held_out = plan.rehearsal.held_out if plan.rehearsal else None
        positions += items.tokens + sum(len(answer.input_ids) for answer in (held_out.examples if held_out else ()))
    return positions * plan.anatomy.hidden_size * plan.settings.dtype.itemsize


def start_prefix(kind: str, model: schema.Model, run: Path) -> SharedPrefix:
    """What begins to keep. Every rank has its own.

    Args:
        kind: memory | disk, which is beside the run's folder.

    Raises:
        UserError: as `check_prefix`.
    """
    check_prefix(kind, model)
    return SharedPrefix(MemoryStore() if kind == "memory" else DiskStore(run.parent))


def has_room(shared: SharedPrefix, plan: TrainPlan, items: LossItems | None) -> tuple[bool, str]:
    """Whether what enters the trial's lowest trained layer is to be kept, the same on every rank; and a word on it.

    Args:
        items: as for `layer_bytes`.
    """
    config = plan.config
    first, needed = plan.region.first, layer_bytes(plan, items)
    if first in shared.kept_layers:
        return True, f"prefix cache: from layer {first} on, where it was kept"
    in_memory = config.search.prefix_cache == "memory"
    free = torch.tensor(free_memory() if in_memory else free_bytes(config.run.parent), dtype=torch.int64)
    if torch.cuda.is_available():
        free = free.cuda()
    torch.distributed.all_reduce(free, torch.distributed.ReduceOp.MIN)
    if needed > int(free) * 0.9:  # the rest of the machine lives there too
        return False, f"prefix cache: no room for the {gib(needed)} of layer {first}: {gib(int(free))} are free"
    return True, f"prefix cache: keeps what enters layer {first}, {gib(needed)}"
