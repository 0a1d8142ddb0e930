"""The training state: checkpoints that any number of ranks can go on from, in safetensors and JSON.

A checkpoint is a folder `step-000200` with the fp32 weights, exp_avg and exp_avg_sq of each trained parameter, whole or
in the ranks' pieces (`state_files.py`); the random numbers' state of each rank, with 8-bit moments their scales, too;
and `manifest.json`: the step, whose training it is, and the sha256 of every file. The data's cursor and the schedule's
are the step itself. Frozen weights are the base's and never saved.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cofitune.distributed import run_on_rank_zero, wait_for_all
from cofitune.errors import UserError
from cofitune.files import read_tensors
from cofitune.training.checkpoint_folders import drop_old, put_in_place
from cofitune.training.moments import MomentWriter, begin_moments, block_scales
from cofitune.training.state_files import (
    MASTER,
    RANDOM,
    Checkpoint,
    Places,
    or_nothing,
    write_checkpoint,
    write_whole,
)
from cofitune.training.state_pieces import KINDS, all_see, joined, stretch, write_own_pieces
from cofitune.training.state_reader import StateReader
from cofitune.zero import Flat, Shard, copy_masters_to_model, flats, go_to_step, moments

if TYPE_CHECKING:
    from cofitune.zero import Engine

BYTES_A_WEIGHT = 12  # fp32 master, exp_avg, exp_avg_sq
PIECES_FROM = 4 * 2**30  # bytes of a checkpoint from which the ranks write their own pieces


def save_state(
    folder: Path,
    engine: Engine,
    step: int,
    identity: Mapping[str, object],
    save_total_limit: int,
    in_pieces: bool | None = None,
) -> None:
    """Write the checkpoint of `step` into `folder`, then drop all but the newest ones. Every rank must call.

    Parameters are gathered one at a time and rank 0 writes; or each rank writes what it has. The folder appears under
    its name in one move when all of it is on the disk, so that a process that dies on the way leaves nothing that could
    be taken for a checkpoint.

    Args:
        in_pieces: each rank writes its own, where all of them see the folder; None: where there is much to write.

    Raises:
        UserError: the disk is full, or cannot be written, or a value is not finite; on every rank.
    """
    world_size = torch.distributed.get_world_size()
    states: list[dict[str, Tensor]] = [{} for _ in range(world_size)]
    torch.distributed.all_gather_object(states, {**_random_state(), **block_scales(engine)})
    _check_counted(engine, step)
    stage = int(engine.zero_optimization_stage())
    content = {"step": step, "world_size": world_size, "zero_stage": stage, "identity": dict(identity)}
    temporary, target = folder / f".step-{step:06d}.tmp", folder / f"step-{step:06d}"

    def finish(places: Places) -> None:
        write_checkpoint(temporary, places, states, content)
        put_in_place(temporary, target)
        drop_old(folder, step, save_total_limit)

    if in_pieces is None:
        in_pieces = _checkpoint_bytes(engine) >= PIECES_FROM
    # for either all wait: a rank that ended earlier would have the launcher end the one that writes
    if in_pieces and world_size > 1 and all_see(temporary, step, engine.device):
        everyone = write_own_pieces(temporary, engine)
        run_on_rank_zero(lambda: or_nothing(temporary, step, lambda: finish(joined(everyone))))
        return
    tensors = _gathered_tensors(engine, keep=torch.distributed.get_rank() == 0)

    def write() -> None:
        try:
            or_nothing(temporary, step, lambda: finish(write_whole(temporary, tensors)))
        except UserError:
            deque(tensors, maxlen=0)  # the other ranks gather what is left
            raise

    if torch.distributed.get_rank() != 0:
        deque(tensors, maxlen=0)  # takes part in the gathering
    run_on_rank_zero(write)


def load_state(engine: Engine, checkpoint: Checkpoint | None) -> int:
    """Put a checkpoint's values into a fresh engine, on any number of ranks and under any ZeRO stage. Collective.

    Where every rank sees the files (`find_newest`), each reads what it will hold; else rank 0 reads all for all.

    Args:
        checkpoint: on rank 0; None there: nothing is loaded. What other ranks give is looked at where it is shared.

    Returns:
        The optimizer steps that are done.
    """
    result = run_on_rank_zero(
        lambda: (checkpoint.step, _read_random(checkpoint), checkpoint.shared) if checkpoint else None
    )
    if result is None:
        return 0
    step, states, shared = result
    begin_moments(engine, step)
    writer, local = MomentWriter(engine), _local_shards(engine)
    each_reads = shared or torch.distributed.get_world_size() == 1
    reads = checkpoint if each_reads or torch.distributed.get_rank() == 0 else None
    with StateReader(reads) if reads else nullcontext() as reader:
        for name, parameter in _trained(engine):
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            for kind in KINDS:
                read = _stretches(reader, each_reads, name, kind, shape, engine.device)
                for flat, shard in local.get(name, []):
                    piece = read(shard.start, shard.numel)
                    place = slice(shard.offset, shard.offset + shard.numel)
                    if kind == MASTER:
                        flat.tensor.data[place].copy_(piece)
                    else:
                        writer.write(flat, kind, place, piece)
    wait_for_all()  # for each has read another part, and a disk takes as long as it likes
    same_ranks = len(states) == torch.distributed.get_world_size()
    own = states[torch.distributed.get_rank() % len(states)]
    writer.finish(own if same_ranks else {})
    copy_masters_to_model(engine)
    go_to_step(engine, step)
    _set_random_state(own)
    return step


def _stretches(
    reader: StateReader | None, each_reads: bool, name: str, kind: str, shape: tuple[int, ...], device: torch.device
) -> Callable[[int, int], Tensor]:
    """What gives a stretch of a parameter's tensor by its first element and its length. Collective unless `each_reads`.

    Args:
        reader: on rank 0, and where each rank reads its own.
    """
    if each_reads:
        return lambda start, numel: _opened(reader).read(name, kind, shape, start, numel)
    whole = torch.empty(math.prod(shape), dtype=torch.float32, device=device)
    if torch.distributed.get_rank() == 0:
        whole.copy_(_opened(reader).read(name, kind, shape))
    torch.distributed.broadcast(whole, 0)
    return lambda start, numel: whole[start : start + numel]


def _opened(reader: StateReader | None) -> StateReader:
    if reader is None:
        raise RuntimeError("this rank reads no checkpoint")
    return reader


def _trained(engine: Engine) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def _checkpoint_bytes(engine: Engine) -> int:
    return BYTES_A_WEIGHT * sum(getattr(p, "ds_numel", p.numel()) for _, p in _trained(engine))


def _local_shards(engine: Engine) -> dict[str, list[tuple[Flat, Shard]]]:
    results: dict[str, list[tuple[Flat, Shard]]] = {}
    for flat in flats(engine):
        for shard in flat.shards:
            results.setdefault(shard.name, []).append((flat, shard))
    return results


def _check_counted(engine: Engine, step: int) -> None:
    counted = {int(moments(engine, flat)["step"]) for flat in flats(engine) if flat.shards}
    if counted - {step}:
        raise RuntimeError(f"AdamW has counted {sorted(counted)} steps where the training has taken {step}")


def _gathered_tensors(engine: Engine, keep: bool) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each trained parameter's three tensors, whole and on the CPU where `keep`. Every rank must exhaust it."""
    local = _local_shards(engine)
    for name, parameter in _trained(engine):
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        tensors = {}
        wait_for_all()  # rank 0 may have written a file since, which lasts as long as the disk likes
        for kind in KINDS:
            # summed as integers, every element has one owner's bits: a float sum would turn -0 into 0
            bits = torch.zeros(shape, dtype=torch.int32, device=engine.device).view(-1)
            for flat, shard in local.get(name, []):
                piece = stretch(engine, flat, kind, slice(shard.offset, shard.offset + shard.numel))
                bits[shard.start : shard.start + shard.numel] = piece.view(torch.int32).to(bits.device)
            torch.distributed.all_reduce(bits)
            if keep:
                tensors[kind] = bits.view(torch.float32).view(shape).cpu()
        yield name, tensors


def _random_state() -> dict[str, Tensor]:
    """The state of this rank's random numbers: torch's alone, since nothing in a step draws from another source."""
    on_gpu = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state(), **on_gpu}


def _read_random(checkpoint: Checkpoint) -> list[dict[str, Tensor]]:
    """Each rank's random numbers, and what `block_scales` gave."""
    states: list[dict[str, Tensor]] = [{} for _ in range(checkpoint.world_size)]
    for key, tensor in read_tensors(checkpoint.folder / RANDOM, "random numbers' state").items():
        rank, kind = key.split("/")
        states[int(rank)][kind] = tensor
    return states


def _set_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
