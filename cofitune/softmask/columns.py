"""The soft mask along input columns: column j of a weight gets the factor 1 − s·I_j, whatever unit its rows belong to.

Importance of columns is `cofitune.importance.wanda`'s, as SSU freezes columns (arXiv 2512.04844).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cofitune.errors import RegionError
from cofitune.importance_file import EXPERTS, column_kind, known_units
from cofitune.model.anatomy import Anatomy
from cofitune.model.region import Region
from cofitune.softmask.factors import Factor, check_masked, factor_values


def build_column_factors(
    importance: Mapping[str, Tensor],
    region: Region,
    modules: tuple[str, ...],
    anatomy: Anatomy,
    strength: float = 1.0,
    *,
    uniform: bool = False,
) -> dict[str, Factor]:
    """One factor for each masked weight of the region, by its name. A bias has no columns and is not masked.

    Modules that share a tensor have their columns in common: of their importances the largest counts, as for a
    key/value head that serves several heads.

    Args:
        importance: column kind → [L, columns] in [0, 1].
        modules, strength, uniform: as `build_factors` takes them.

    Raises:
        RegionError: a module to mask is not trained, has no columns, or shares its tensor with one that trains
            unmasked.
    """
    check_masked(modules, region)
    check_columns(modules, region, anatomy)
    trained = set(region.parameter_names(anatomy))
    factors: dict[str, Factor] = {}
    for layer in region.layers:
        for module in modules:
            name = next(anatomy.parameter_names(layer, module)) if anatomy.has(layer, module) else None
            if name is None or name not in trained or name in factors:
                continue
            parts = [part for part in anatomy.layout.parts(module) if part in modules]
            own = [known_units(importance[column_kind(part)][layer].float()) for part in parts]
            values = factor_values(torch.stack(own).amax(dim=0), strength, uniform)
            factors[name] = Factor(values, 1 - anatomy.row_axis)
    if not factors:
        raise RegionError(
            f"softmask.axis: columns finds no trained weight of {', '.join(modules)}, whose columns it could mask; set "
            "axis: rows or apply_to: none"
        )
    return factors


def check_columns(modules: tuple[str, ...], region: Region, anatomy: Anatomy) -> None:
    """Raise a RegionError where a module to mask has no columns, or not all that train in its tensor are masked."""
    if EXPERTS in modules:
        raise RegionError(
            "softmask.axis: columns masks the input columns of single weights, which a tensor of all experts does not "
            "have; name the others in softmask.modules, or set axis: rows"
        )
    for module in modules:
        free = [p for p in anatomy.layout.parts(module) if p in region.modules and p not in modules]
        if free:
            raise RegionError(
                f"softmask.axis: columns cannot mask {module} without {', '.join(free)}, which trains in the same "
                "tensor and so has the same columns; name both in softmask.modules, or set axis: rows"
            )
