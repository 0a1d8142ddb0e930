"""From the section `softmask` to the factors on a training's weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from cofitune.config import schema
from cofitune.errors import ArtifactError, UserError
from cofitune.importance_file import COLUMNS, ROWS, ImportanceFile, merge_importance, read_importance, read_reliability
from cofitune.model.anatomy import Anatomy
from cofitune.model.layouts import expand_modules
from cofitune.model.region import Region
from cofitune.ranks import this_rank
from cofitune.recipes.prerequisites import Prerequisites
from cofitune.reports.importance.table import remedy, unreliable
from cofitune.softmask.columns import build_column_factors, check_columns
from cofitune.softmask.factors import Factor, build_factors, check_masked, harden, shuffle_units


def plan_mask(
    softmask: schema.SoftMask,
    run: Path,
    region: Region,
    anatomy: Anatomy,
    needs: Prerequisites,
    base: str | None,
    seed: int,
) -> tuple[tuple[str, ...], dict[str, Factor]]:
    """The modules under the soft mask, and the factors on their parameters; empty without a mask.

    Factors are empty, too, where a dry run lacks an importance, and on all ranks but the first.

    Args:
        run: the run's folder, whose importance is read unless the section names others.
        seed: of the shuffled control.
        base: the base's fingerprint, of which importance must be; None where a dry run has no weights to know it by.

    Raises:
        UserError: the region has no module that a mask could lie on.
        ArtifactError: a folder has no importance, or one of another base or of other units.
    """
    masked = masked_modules(softmask, region, anatomy)
    if not masked:
        return (), {}
    importance = _find_importance(importance_folders(softmask, run), anatomy, needs, base, softmask.axis)
    if not importance:
        return masked, {}
    return masked, _make_factors(softmask, importance, region, masked, anatomy, seed)


def importance_folders(softmask: schema.SoftMask, run: Path) -> list[Path]:
    """The folders that the soft mask's importance is read from."""
    return [Path(folder) for folder in softmask.importance or (run / "importance",)]


def masked_modules(softmask: schema.SoftMask, region: Region, anatomy: Anatomy) -> tuple[str, ...]:
    """The modules under the soft mask; empty without one.

    Raises:
        UserError: the region has none that a mask could lie on.
    """
    if softmask.apply_to == "none":
        return ()
    if not region.modules:
        raise UserError(
            "softmask.apply_to: region.match trains no tensor with units (heads, neurons, outputs) that a mask could "
            "lie on; set it to none"
        )
    modules = region.modules
    if softmask.modules is not None:
        modules = expand_modules(softmask.modules, anatomy.modules, "softmask.modules")
        check_masked(modules, region)
    if softmask.axis == COLUMNS:
        check_columns(modules, region, anatomy)
    return modules


def _find_importance(
    folders: Sequence[Path], anatomy: Anatomy, needs: Prerequisites, base: str | None, axis: str
) -> dict[str, Tensor]:
    """The importance vectors of the soft mask: unit kind → [L, units]; empty where a dry run lacks some.

    Empty on all ranks but the first, too, which tells the others when they have met.

    Args:
        folders: of `cofitune importance`; several are merged unit by unit.
        axis: `softmask.axis`, which units they must be of.
    """
    if this_rank().rank:
        return {}
    sets = []
    for number, folder in enumerate(folders, start=1):
        try:
            read = _importance_in(folder, anatomy, base, axis)
        except ArtifactError as error:
            if (folder / "manifest.json").is_file():  # there, and not what is needed
                raise
            needs.lack(error)
            continue
        if read is not None:
            sets.append(read.vectors)
            noise = unreliable(read_reliability(read.manifest))
            if noise:
                figures = ", ".join(f"{kind.replace('_', ' ')} {r:.2f}" for kind, r in noise.items())
                needs.notes.append(
                    f"warning: the importance in {folder} is mostly noise (reliability: {figures}; 1 is best), and so "
                    f"is the soft mask made of it: {remedy(read.manifest.get('estimator'))}"
                )
            name = "importance" if len(folders) == 1 else f"importance {number}"
            needs.use(name, folder / "importance.safetensors", read.sha256)
    return merge_importance(sets) if len(sets) == len(folders) else {}


def _importance_in(folder: Path, anatomy: Anatomy, base: str | None, axis: str) -> ImportanceFile | None:
    if not (folder / "manifest.json").is_file():
        raise ArtifactError(
            f"softmask: no importance in {folder}; run `cofitune importance` with this config first, name its "
            "folder in softmask.importance, or set softmask.apply_to: none"
        )
    if base is None:
        return None
    read = read_importance(folder, anatomy, base)
    if read.axis != axis:
        holds = {ROWS: "heads, neurons and outputs", COLUMNS: "input columns"}
        makes = {ROWS: "fisher or kl_dropout", COLUMNS: "wanda"}
        raise ArtifactError(
            f"softmask.axis: {axis} needs an importance of {holds[axis]} (importance.estimator: {makes[axis]}), and "
            f"{folder} is of {holds[read.axis]}; set axis: {read.axis}, or name another in softmask.importance"
        )
    return read


def _make_factors(
    softmask: schema.SoftMask,
    importance: dict[str, Tensor],
    region: Region,
    masked: tuple[str, ...],
    anatomy: Anatomy,
    seed: int,
) -> dict[str, Factor]:
    """The soft mask, or the control that stands in for it; `seed`: of the shuffled control."""
    if softmask.threshold is not None:
        importance = harden(importance, softmask.threshold)
    if softmask.control == "shuffled":
        importance = shuffle_units(importance, anatomy, seed)
    uniform = softmask.control == "uniform"
    build = build_column_factors if softmask.axis == COLUMNS else build_factors
    return build(importance, region, masked, anatomy, softmask.strength, uniform=uniform)
