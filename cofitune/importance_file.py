"""The importance file: per layer and unit kind one vector in [0, 1], beside a manifest that says whose it is.

A folder holds `importance.safetensors` (normalised, what the soft mask reads), `scores.safetensors` (before
normalisation, to merge or normalise again) and `manifest.json`. Each safetensors file has one tensor a unit kind, of
shape [L, units], fp32. Where layers have unequally many units, the narrower ones' vectors end with NaN.

Units are heads, neurons and outputs, each a row (or block) of weights; or, of the estimator `wanda`, the input columns
of each module. The second is format 2, whose manifest says `axis: columns`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cofitune.errors import ArtifactError
from cofitune.files import read_json, read_tensors, sha256_file, write_checked_json, write_tensors

if TYPE_CHECKING:  # it imports transformers, which who draws importance does not need
    from cofitune.model.anatomy import Anatomy

ROWS, COLUMNS = "rows", "columns"  # what a unit is of a weight
FORMATS = {ROWS: 1, COLUMNS: 2}
COLUMN_KIND = "_columns"  # ends the name of a module's columns as a kind of unit
ATTENTION_HEADS = "attention_heads"
FFN_NEURONS = "ffn_neurons"
FFN_OUTPUTS = "ffn_outputs"
EXPERTS = "experts"
UNIT_KINDS = (ATTENTION_HEADS, FFN_NEURONS, FFN_OUTPUTS)  # of a model without experts
ENOUGH = 0.5  # below it more than half of what tells the units apart is noise


@dataclass(frozen=True)
class ImportanceFile:
    """What a folder holds: `vectors` maps each unit kind to [L, units] in [0, 1]; `sha256` names the file's bytes."""

    vectors: dict[str, Tensor]
    manifest: dict[str, Any]
    sha256: str

    @property
    def axis(self) -> str:
        """What its units are of a weight: rows or columns."""
        return str(self.manifest.get("axis", ROWS))


@dataclass(frozen=True)
class Reliability:
    """Of one unit kind.

    Attributes:
        by_layer: rank correlation of the two halves in each layer; NaN where a half has all units alike.
        split_half: their mean over the layers that have one; None where none has.
        whole: that of the whole data, estimated from `split_half`.
    """

    by_layer: tuple[float, ...]
    split_half: float | None
    whole: float | None


def column_kind(module: str) -> str:
    """The input columns of a module as a kind of unit."""
    return module + COLUMN_KIND


def unit_counts(anatomy: Anatomy, axis: str = ROWS) -> dict[str, int]:
    """Units a layer of each known kind: A attention heads, F FFN neurons, H FFN output channels, experts. Where layers
    differ, the most.

    Args:
        axis: rows; or columns: the input columns of each linear module.
    """
    if axis == COLUMNS:
        kinds = [column_kind(module) for module in anatomy.modules if module != EXPERTS]
        return {kind: max(layer_units(anatomy, kind)) for kind in kinds}
    attention = {ATTENTION_HEADS: anatomy.num_heads} if "o_proj" in anatomy.modules else {}
    ffn = {FFN_NEURONS: anatomy.intermediate_size, FFN_OUTPUTS: anatomy.hidden_size}
    experts = {EXPERTS: anatomy.num_experts} if anatomy.experts else {}
    return {**attention, **(ffn if "down_proj" in anatomy.modules else {}), **experts}


def layer_units(anatomy: Anatomy, kind: str) -> tuple[int, ...]:
    """Units of a kind in each layer, 0 where it has none."""
    if kind.endswith(COLUMN_KIND):
        module = kind.removesuffix(COLUMN_KIND)
        return tuple(anatomy.num_columns(layer, module) for layer in range(anatomy.num_layers))
    module = {ATTENTION_HEADS: "o_proj", EXPERTS: EXPERTS}.get(kind, "down_proj")

    def units(layer: int) -> int:
        size = anatomy.sizes[layer]
        counts = {ATTENTION_HEADS: size.num_heads, FFN_NEURONS: size.intermediate_size, EXPERTS: anatomy.num_experts}
        return counts.get(kind, anatomy.hidden_size) if anatomy.has(layer, module) else 0

    return tuple(map(units, range(anatomy.num_layers)))


def known_units(vector: Tensor) -> Tensor:
    """A layer's vector [units] without the places of units that wider layers have."""
    return vector[~vector.isnan()]


def write_importance(
    folder: Path, vectors: dict[str, Tensor], scores: dict[str, Tensor], manifest: Mapping[str, object]
) -> None:
    """Write the three files; the manifest last, because a folder without it counts as unfinished."""
    write_tensors(folder / "scores.safetensors", {k: v.float().contiguous() for k, v in scores.items()})
    path = folder / "importance.safetensors"
    sha256 = write_tensors(path, {k: v.float().contiguous() for k, v in vectors.items()})
    format_of = FORMATS[str(manifest.get("axis", ROWS))]
    write_checked_json(folder / "manifest.json", {"format": format_of, "sha256": sha256, **manifest})


def read_importance(folder: Path, anatomy: Anatomy, base_fingerprint: str) -> ImportanceFile:
    """Read an importance folder and check that it belongs to this model.

    Raises:
        ArtifactError: a file is missing or damaged, another model's, or holds wrong shapes, NaN, or values outside
            [0, 1].
    """
    manifest = read_json(folder / "manifest.json", "importance manifest")
    path = folder / "importance.safetensors"
    axis = str(manifest.get("axis", ROWS))
    if axis not in FORMATS or manifest.get("format") != FORMATS[axis]:
        known = " or ".join(f"{number} ({name})" for name, number in FORMATS.items())
        raise ArtifactError(f"{folder}: importance format {manifest.get('format')} is not {known}, which we read")
    vectors = read_vectors(folder, manifest)
    if manifest.get("base_fingerprint") != base_fingerprint:
        raise ArtifactError(
            f"{folder}: this importance was computed on another model ({manifest.get('base')}, fingerprint "
            f"{str(manifest.get('base_fingerprint'))[:12]}; the model here has {base_fingerprint[:12]})"
        )
    for kind, units in unit_counts(anatomy, axis).items():
        if kind not in vectors:
            raise ArtifactError(f"{path}: holds no '{kind}'; compute the importance again")
        _check_vector(path, kind, vectors[kind], [count or units for count in layer_units(anatomy, kind)])
    return ImportanceFile(vectors, manifest, manifest["sha256"])


def read_vectors(folder: Path, manifest: Mapping[str, object]) -> dict[str, Tensor]:
    """The vectors of a folder, compared with what its manifest says of their file.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    path = folder / "importance.safetensors"
    vectors = read_tensors(path, "importance file")
    if manifest.get("sha256") != sha256_file(path):
        raise ArtifactError(f"{path}: its bytes are not those that the manifest names; compute the importance again")
    return vectors


def merge_importance(sets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Merge several importances of one model: a unit matters as much as it matters to any of them (CoFiTune).

    Args:
        sets: one or more of unit kind → [L, units] in [0, 1], normalised.
    """
    return {kind: torch.stack([one[kind] for one in sets]).amax(dim=0) for kind in sets[0]}


def _check_vector(path: Path, kind: str, vector: Tensor, units: Sequence[int]) -> None:
    shape = [len(units), max(units)]
    if list(vector.shape) != shape:
        raise ArtifactError(f"{path}: '{kind}' has shape {list(vector.shape)}; this model needs {shape}")
    values = torch.cat([row[:count] for row, count in zip(vector, units, strict=True)])
    if not torch.isfinite(values).all():
        raise ArtifactError(f"{path}: '{kind}' holds NaN or infinity")
    if values.min() < 0 or values.max() > 1:
        raise ArtifactError(f"{path}: '{kind}' holds values outside [0, 1]")


def reliability_entry(reliable: Mapping[str, Reliability]) -> dict[str, object]:
    """What an importance's manifest says of it: three decimals; nothing where two halves could not be compared."""
    if not reliable:
        return {}

    def figures(one: Reliability) -> dict[str, object]:
        by_layer = [None if math.isnan(r) else round(r, 3) for r in one.by_layer]
        return {"whole": _rounded(one.whole), "split_half": _rounded(one.split_half), "by_layer": by_layer}

    return {"reliability": {kind: figures(one) for kind, one in reliable.items()}}


def read_reliability(manifest: Mapping[str, object]) -> dict[str, Reliability]:
    """What a manifest says of it; empty for an importance of an earlier version, and for what is not understood."""
    kept = manifest.get("reliability")
    found = {}
    for kind, one in kept.items() if isinstance(kept, dict) else ():
        if isinstance(one, dict) and isinstance(one.get("by_layer"), list):
            by_layer = tuple(math.nan if r is None else float(r) for r in one["by_layer"])
            found[kind] = Reliability(by_layer, one.get("split_half"), one.get("whole"))
    return found


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
