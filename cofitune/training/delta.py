"""The delta: the trained tensors whole, in the training dtype, and a manifest that says whose they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cofitune.errors import ArtifactError, UserError
from cofitune.files import read_json, read_tensors, sha256_file, sha256_json, write_json, write_tensors
from cofitune.softmask.factors import Factor
from cofitune.zero import gathered

FORMAT = 1
HASHED_AT_ONCE = 4


@dataclass(frozen=True)
class Delta:
    """What training changed: `tensors` by parameter name, `sha256` of the file's bytes."""

    tensors: dict[str, Tensor]
    manifest: dict[str, Any]
    sha256: str


def collect(model: nn.Module, names: Iterable[str], everywhere: bool = False) -> dict[str, Tensor]:
    """Gather the named parameters whole, one at a time. Every rank must call.

    Returns:
        Copies on the CPU for rank 0, nothing for the others; or `everywhere` the same.
    """
    parameters = dict(model.named_parameters())
    keep = everywhere or _rank() == 0
    tensors = {}
    for name in names:
        with gathered(parameters[name]) as whole:
            if keep:
                tensors[name] = whole.detach().to("cpu", copy=True).contiguous()
    return tensors


def write_delta(folder: Path, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> None:
    """Write `delta.safetensors`, then `manifest.json`; a folder without the manifest counts as unfinished.

    Raises:
        UserError: the disk is full, or cannot be written.
    """
    path = folder / "delta.safetensors"
    try:
        write_tensors(path, tensors)
        write_json(folder / "manifest.json", {"format": FORMAT, "delta_sha256": sha256_file(path), **manifest})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {error}; --resume trains from the newest checkpoint on") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read what a run's training says of itself.

    Raises:
        ArtifactError: it is missing, damaged, or of another format.
    """
    manifest: dict[str, Any] = read_json(folder / "manifest.json", "training manifest")
    if manifest.get("format") != FORMAT:
        raise ArtifactError(f"{folder}: delta format {manifest.get('format')} is not {FORMAT}, which we read")
    return manifest


def read_delta(folder: Path, base_fingerprint: str) -> Delta:
    """Read a run's delta and check that it belongs to this base model.

    Raises:
        ArtifactError: a file is missing or damaged, or the delta was trained from another model.
    """
    manifest = read_manifest(folder)
    path = folder / "delta.safetensors"
    if manifest.get("base_fingerprint") != base_fingerprint:
        raise ArtifactError(
            f"{folder}: this delta was trained from another model ({manifest.get('base')}, fingerprint "
            f"{str(manifest.get('base_fingerprint'))[:12]}; the model here has {base_fingerprint[:12]})"
        )
    tensors = read_tensors(path, "delta")
    found = sha256_file(path)
    if manifest.get("delta_sha256") != found:
        raise ArtifactError(f"{path}: its bytes are not those that the manifest names; train again")
    return Delta(tensors, manifest, found)


def interpolate(base: Tensor, trained: Tensor, alpha: float) -> Tensor:
    """base + alpha·(trained − base) in fp32, in the trained tensor's dtype; 1 gives its own bits, 0 the base's.

    The base is taken in that dtype, in which the training began. On a run that trained all weights this is WiSE-FT
    (Wortsman et al., arXiv 2109.01903).
    """
    if alpha == 1:
        return trained
    start = base.to(trained.device, trained.dtype).float()
    return torch.lerp(start, trained.float(), alpha).to(trained.dtype)


def apply_delta(model: nn.Module, delta: Delta, alpha: float = 1.0) -> None:
    """Copy the delta's tensors into a base model in memory, or what lies at `alpha` on the way there from the base.

    Raises:
        ArtifactError: a tensor has no place in the model, or another shape.
    """
    parameters = dict(model.named_parameters())
    for name, tensor in delta.tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise ArtifactError(f"the delta's {name} {list(tensor.shape)} has no place in this model")
        with torch.no_grad():
            parameters[name].copy_(interpolate(parameters[name].detach(), tensor, alpha))


@contextmanager
def delta_applied(model: nn.Module, delta: Delta, alpha: float = 1.0) -> Iterator[None]:
    """Have the delta in the model for a while; the tensors that it replaces wait on the CPU and come back.

    Raises:
        ArtifactError: as `apply_delta`.
    """
    parameters = dict(model.named_parameters())
    before = {n: parameters[n].detach().to("cpu", copy=True) for n in delta.tensors if n in parameters}
    try:
        apply_delta(model, delta, alpha)
        yield
    finally:
        with torch.no_grad():
            for name, tensor in before.items():
                parameters[name].copy_(tensor)


def hash_parameters(model: nn.Module, names: Iterable[str], held: Mapping[str, Factor] | None = None) -> dict[str, str]:
    """sha256 of each named parameter's bytes. Every rank must call and gets the same answer.

    Parameters are gathered one at a time; the ranks share the hashing, parameter i falling to rank i mod world.

    Args:
        held: parameters of which only the part with factor 0 is hashed, as `NAME (held part)`.
    """
    parameters = dict(model.named_parameters())
    held_parts = {f"{name} (held part)": (name, factor) for name, factor in (held or {}).items()}
    rank, world = _rank(), _world_size()
    # sha256 lets go of Python's lock, so a few threads hash while the next parameter is gathered
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        pending = {}
        for index, entry in enumerate([*names, *held_parts]):
            name, factor = held_parts.get(entry, (entry, None))
            with gathered(parameters[name]) as whole:
                if index % world == rank:
                    kept = whole.detach().to("cpu", copy=True)
                    pending[entry] = pool.submit(_hash, factor.part_at_zero(kept) if factor else kept)
                    if len(pending) >= HASHED_AT_ONCE:  # bounds the copies that wait
                        list(pending.values())[-HASHED_AT_ONCE].result()
        mine = {name: future.result() for name, future in pending.items()}
    if world == 1:
        return mine
    parts: list[dict[str, str] | None] = [None] * world
    torch.distributed.all_gather_object(parts, mine)
    return {name: digest for part in parts if part for name, digest in part.items()}


def hash_tensor(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes, as `hash_parameters` counts them."""
    return _hash(tensor.detach().cpu())


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """One sha256 for tensors by name, whatever their order."""
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        return sha256_json(dict(zip(tensors, pool.map(hash_tensor, tensors.values()), strict=True)))


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
