"""The training state: checkpoints that any number of ranks can go on from, in safetensors and JSON.

A checkpoint is a folder `step-000200` with the fp32 weights, exp_avg and exp_avg_sq of each trained parameter, whole;
the random numbers' state of each rank, with 8-bit moments their scales, too; and `manifest.json`: the step, whose
training it is, and the sha256 of every file. The data's cursor and the schedule's are the step itself. Frozen weights
are the base's and never saved.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from cofitune.distributed import run_on_rank_zero, wait_for_all
from cofitune.errors import ArtifactError, UserError, WriteError
from cofitune.files import read_json, read_tensors, sha256_file, sha256_json, write_json, write_tensors
from cofitune.training.checkpoint_folders import checkpoint_folders, drop_old, empty, put_in_place
from cofitune.training.finite import check_finite
from cofitune.training.moments import MomentWriter, begin_moments, block_scales, read_moment
from cofitune.zero import MOMENTS, Flat, copy_masters_to_model, flats, go_to_step, moments

if TYPE_CHECKING:
    from cofitune.zero import Engine

FORMAT = 1
MASTER = "master"
BYTES_A_WEIGHT = 12  # fp32 master, exp_avg, exp_avg_sq
FILE_BYTES = 2 * 2**30  # one file's tensors are held in host memory until it is written
RANDOM = "random.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        step: optimizer steps that were taken.
        world_size: ranks that took them.
        identity: whose training this is, as JSON values.
        tensors: name of a trained parameter → the file that holds it.
        sha256: name of a file → its hash.
    """

    folder: Path
    step: int
    world_size: int
    identity: dict[str, Any]
    tensors: dict[str, str]
    sha256: dict[str, str]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's manifest.

    Raises:
        ArtifactError: it is missing or damaged, or of another format.
    """
    manifest = read_json(folder / "manifest.json", "checkpoint's manifest")
    if not isinstance(manifest, dict) or manifest.pop("manifest_sha256", None) != sha256_json(manifest):
        raise ArtifactError(f"{folder}/manifest.json: this checkpoint's manifest is damaged: its checksum differs")
    if manifest.pop("format") != FORMAT:
        raise ArtifactError(f"{folder}: this checkpoint is not of format {FORMAT}, which we read")
    return Checkpoint(folder, **manifest)


def newest_whole(folder: Path, tell: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose files all have the bytes that were written; None where there is none.

    Args:
        tell: is told of every damaged one that is passed over.
    """
    for path in checkpoint_folders(folder):
        try:
            result = read_checkpoint(path)
            _check_files(result)
        except ArtifactError as error:
            tell(f"damaged, so the checkpoint before it is looked for: {error}")
            continue
        return result
    return None


def save_state(folder: Path, engine: Engine, step: int, identity: Mapping[str, Any], save_total_limit: int) -> None:
    """Write the checkpoint of `step` into `folder`, then drop all but the newest ones. Every rank must call.

    Parameters are gathered one at a time and rank 0 writes. The folder appears under its name in one move when all of
    it is on the disk, so that a process that dies on the way leaves nothing that could be taken for a checkpoint.

    Raises:
        UserError: the disk is full, or cannot be written, or a value is not finite; on every rank.
    """
    states: list[dict[str, Tensor]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(states, {**_random_state(), **block_scales(engine)})
    tensors = _gathered_tensors(engine, step, keep=torch.distributed.get_rank() == 0)

    def write() -> None:
        temporary = folder / f".step-{step:06d}.tmp"
        try:
            _write(temporary, tensors, states, {"step": step, "world_size": len(states), "identity": dict(identity)})
            put_in_place(temporary, folder / f"step-{step:06d}")
            drop_old(folder, step, save_total_limit)
        except (OSError, UserError) as error:
            deque(tensors, maxlen=0)  # the other ranks gather what is left
            with suppress(OSError):
                empty(temporary)
            what = "cannot be written" if isinstance(error, OSError | WriteError) else "is not written"
            reason = error.reason if isinstance(error, WriteError) else error
            raise UserError(f"{folder}: the checkpoint of step {step} {what}: {reason}") from error

    if torch.distributed.get_rank() != 0:
        deque(tensors, maxlen=0)  # takes part in the gathering
    run_on_rank_zero(
        write
    )  # for which all wait: a rank that ended earlier would have the launcher end the one that writes


def load_state(engine: Engine, checkpoint: Checkpoint | None) -> int:
    """Put a checkpoint's values into a fresh engine, on any number of ranks and under any ZeRO stage. Collective.

    Args:
        checkpoint: on rank 0, which alone reads; None there: nothing is loaded. What other ranks give is not looked at.

    Returns:
        The optimizer steps that are done.
    """
    result = run_on_rank_zero(lambda: (checkpoint.step, _read_random(checkpoint)) if checkpoint else None)
    if result is None:
        return 0
    step, states = result
    begin_moments(engine, step)
    writer, local = MomentWriter(engine), _local_shards(engine)
    for name, parameter in _trained(engine):
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        for kind in (MASTER, *MOMENTS):
            whole = torch.empty(shape, dtype=torch.float32, device=engine.device).view(-1)
            if checkpoint is not None and torch.distributed.get_rank() == 0:
                whole.copy_(_read_tensor(checkpoint, name, kind, shape).view(-1))
            torch.distributed.broadcast(whole, 0)
            for flat, shard in local.get(name, []):
                piece = whole[shard.start : shard.start + shard.numel]
                place = slice(shard.offset, shard.offset + shard.numel)
                if kind == MASTER:
                    flat.tensor.data[place].copy_(piece)
                else:
                    writer.write(flat, kind, place, piece)
    same_ranks = len(states) == torch.distributed.get_world_size()
    own = states[torch.distributed.get_rank() % len(states)]
    writer.finish(own if same_ranks else {})
    copy_masters_to_model(engine)
    go_to_step(engine, step)
    _set_random_state(own)
    return step


def _trained(engine: Engine) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def _local_shards(engine: Engine) -> dict[str, list[tuple[Flat, Any]]]:
    results: dict[str, list[tuple[Flat, Any]]] = {}
    for flat in flats(engine):
        for shard in flat.shards:
            results.setdefault(shard.name, []).append((flat, shard))
    return results


def _gathered_tensors(engine: Engine, step: int, keep: bool) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each trained parameter's three tensors, whole and on the CPU where `keep`. Every rank must exhaust it."""
    counted = {int(moments(engine, flat)["step"]) for flat in flats(engine) if flat.shards}
    if counted - {step}:
        raise RuntimeError(f"AdamW has counted {sorted(counted)} steps where the training has taken {step}")
    local = _local_shards(engine)
    for name, parameter in _trained(engine):
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        tensors = {}
        wait_for_all()  # rank 0 may have written a file since, which lasts as long as the disk likes
        for kind in (MASTER, *MOMENTS):
            # summed as integers, every element has one owner's bits: a float sum would turn -0 into 0
            bits = torch.zeros(shape, dtype=torch.int32, device=engine.device).view(-1)
            for flat, shard in local.get(name, []):
                place = slice(shard.offset, shard.offset + shard.numel)
                piece = flat.tensor.data[place] if kind == MASTER else read_moment(engine, flat, kind, place)
                bits[shard.start : shard.start + shard.numel] = piece.view(torch.int32).to(bits.device)
            torch.distributed.all_reduce(bits)
            if keep:
                tensors[kind] = bits.view(torch.float32).view(shape).cpu()
        yield name, tensors


def _write(
    folder: Path,
    tensors: Iterable[tuple[str, dict[str, Tensor]]],
    states: list[dict[str, Tensor]],
    content: dict[str, Any],
) -> None:
    """Fill a folder: tensors in files of limited size, each written as soon as it is full; last the manifest."""
    empty(folder)  # what a killed process left
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[str, str] = {}
    hashes: dict[str, str] = {}
    waiting: dict[str, Tensor] = {}

    def write_out() -> None:
        nonlocal waiting
        name = f"state-{len(hashes) + 1:05d}.safetensors"
        hashes[name] = write_tensors(folder / name, waiting)
        places.update({key.rpartition("/")[0]: name for key in waiting})
        waiting = {}

    for name, parts in tensors:
        for kind, tensor in parts.items():
            check_finite(name if kind == MASTER else f"{name} ({kind})", tensor)
        waiting.update({f"{name}/{kind}": tensor for kind, tensor in parts.items()})
        if sum(t.nbytes for t in waiting.values()) >= FILE_BYTES:
            write_out()
    if waiting:
        write_out()
    hashes[RANDOM] = write_tensors(
        folder / RANDOM, {f"{rank}/{kind}": t for rank, part in enumerate(states) for kind, t in part.items()}
    )
    manifest = {"format": FORMAT, **content, "tensors": places, "sha256": hashes}
    write_json(folder / "manifest.json", {**manifest, "manifest_sha256": sha256_json(manifest)})


def _check_files(checkpoint: Checkpoint) -> None:
    missing = set(checkpoint.tensors.values()) - checkpoint.sha256.keys()
    for name in [*checkpoint.sha256, *missing]:
        path = checkpoint.folder / name
        if not path.is_file():
            raise ArtifactError(f"{path}: this file of the checkpoint is missing")
        if sha256_file(path) != checkpoint.sha256[name]:
            raise ArtifactError(f"{path}: its bytes are not those that were written")


def _read_tensor(checkpoint: Checkpoint, name: str, kind: str, shape: tuple[int, ...]) -> Tensor:
    if name not in checkpoint.tensors:
        raise ArtifactError(f"{checkpoint.folder}: holds no {name}")
    with safe_open(checkpoint.folder / checkpoint.tensors[name], framework="pt") as file:
        tensor: Tensor = file.get_tensor(f"{name}/{kind}")
    if tuple(tensor.shape) != shape:
        raise ArtifactError(f"{checkpoint.folder}: {name} has shape {list(tensor.shape)}, the model's {list(shape)}")
    return tensor


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
