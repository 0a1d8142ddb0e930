"""The delta: the trained tensors whole, in the training dtype, and a manifest that says whose they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from cofitune.checked import shaped
from cofitune.distributed import rank_or_zero
from cofitune.errors import ArtifactError, UserError, WriteError
from cofitune.files import read_json, read_tensors, sha256_file, write_checked_json, write_tensors
from cofitune.model.weight_files import remembered_sha256
from cofitune.zero import gathered

FORMAT = 1


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
    keep = everywhere or rank_or_zero() == 0
    tensors = {}
    for name in names:
        with gathered(parameters[name]) as whole:
            if keep:
                tensors[name] = whole.detach().to("cpu", copy=True).contiguous()
    return tensors


def write_delta(folder: Path, tensors: dict[str, Tensor], manifest: Mapping[str, object]) -> None:
    """Write `delta.safetensors`, then `manifest.json`; a folder without the manifest counts as unfinished.

    Raises:
        UserError: the disk is full, or cannot be written.
    """
    path = folder / "delta.safetensors"
    try:
        sha256 = write_tensors(path, tensors)
        write_checked_json(folder / "manifest.json", {"format": FORMAT, "delta_sha256": sha256, **manifest})
    except WriteError as error:
        raise UserError(f"{error}; --resume trains from the newest checkpoint on") from error


@dataclass(frozen=True)
class _Used:
    path: str
    sha256: str


@dataclass(frozen=True)
class _About:
    """What is read of a training's manifest, where it is there."""

    base: str = ""
    revision: str | None = None
    base_fingerprint: str = ""
    delta_sha256: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"
    template: str = ""
    chat_template: dict[str, object] | None = None
    names: dict[str, object] = field(default_factory=dict)
    items: list[dict[str, object]] = field(default_factory=list)
    data: list[dict[str, object]] = field(default_factory=list)
    used: dict[str, _Used] = field(default_factory=dict)


class _Manifest(dict[str, Any]):
    """Of a training; an entry that it lacks is a mistake of whoever made the file."""

    folder: Path

    def __missing__(self, key: str) -> NoReturn:
        raise ArtifactError(f"{self.folder}/manifest.json: this training manifest is damaged: it has no {key}")


def check_delta(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise an ArtifactError where the tensors' file is not the one that the manifest names; it may be gone."""
    delta = folder / "delta.safetensors"
    if delta.is_file() and remembered_sha256(delta) != manifest["delta_sha256"]:
        raise ArtifactError(f"{delta}: its bytes are not those that the manifest names; train again")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read what a run's training says of itself.

    Raises:
        ArtifactError: it is missing, damaged, or of another format.
    """
    if not (folder / "manifest.json").exists():
        raise ArtifactError(f"{folder}: no finished training here (manifest.json); `cofitune train` makes one")
    manifest = _Manifest(read_json(folder / "manifest.json", "training manifest"))
    manifest.folder = folder
    if manifest.get("format") != FORMAT:
        raise ArtifactError(f"{folder}: delta format {manifest.get('format')} is not {FORMAT}, which we read")
    try:
        shaped(_About, manifest)
    except ValueError as error:
        raise ArtifactError(f"{folder}/manifest.json: this training manifest is damaged: {error}") from None
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
    result = sha256_file(path)
    if manifest.get("delta_sha256") != result:
        raise ArtifactError(f"{path}: its bytes are not those that the manifest names; train again")
    return Delta(tensors, manifest, result)


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
