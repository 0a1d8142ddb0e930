"""Importance → soft mask: the factor 1 − I of each unit, on the unit's own rows or columns of each weight.

The published code tiles the mask along the flattened gradient, which gives 0.02 % of the elements their own unit's
factor (docs/method.md, defects); here a factor is a vector over rows or columns, and tests check it unit by unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cofitune.errors import RegionError
from cofitune.importance_file import (
    ATTENTION_HEADS,
    COLUMN_KIND,
    EXPERTS,
    FFN_NEURONS,
    FFN_OUTPUTS,
    known_units,
)
from cofitune.model.anatomy import Anatomy
from cofitune.model.region import Region

UNIT_OF_MODULE = {
    "q_proj": ATTENTION_HEADS,
    "k_proj": ATTENTION_HEADS,
    "v_proj": ATTENTION_HEADS,
    "o_proj": ATTENTION_HEADS,
    "gate_proj": FFN_NEURONS,
    "up_proj": FFN_NEURONS,
    "down_proj": FFN_OUTPUTS,
    "experts": EXPERTS,
}


@dataclass(frozen=True)
class Factor:
    """What multiplies a weight's update: `values` along one of its axes, or along its only one; in [0, 1], fp32.

    Attributes:
        across: of a weight [rows, columns] that has a factor on both, that along the other axis; None: there is none.

    Example:
        >>> rows = Factor(torch.tensor([1.0, 0.0]), axis=0)
        >>> (torch.ones(2, 3) * rows.shaped(torch.ones(2, 3))).tolist()
        [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    """

    values: Tensor
    axis: int
    across: Tensor | None = None

    def to(self, device: torch.device) -> Factor:
        """The factor on a device."""
        if self.values.device == device:
            return self
        return Factor(self.values.to(device), self.axis, None if self.across is None else self.across.to(device))

    def scaled(self, tensor: Tensor) -> Tensor:
        """A whole weight or bias times the factor, in the tensor's own precision."""
        result = tensor * self.shaped(tensor).to(tensor.dtype)
        if self.across is None:
            return result
        return result * Factor(self.across, 1 - self.axis).shaped(tensor).to(tensor.dtype)

    def part_at_zero(self, tensor: Tensor) -> Tensor:
        """The rows (or columns) of a whole tensor that the factor 0 holds."""
        return tensor.index_select(self.axis, (self.values == 0).nonzero().flatten())

    def shaped(self, tensor: Tensor) -> Tensor:
        """`values` so that it broadcasts over a whole weight or bias."""
        return self.values if tensor.dim() == 1 else self.values.view(-1, *[1] * (tensor.dim() - 1 - self.axis))


def build_factors(
    importance: Mapping[str, Tensor],
    region: Region,
    modules: tuple[str, ...],
    anatomy: Anatomy,
    strength: float = 1.0,
    *,
    uniform: bool = False,
) -> dict[str, Factor]:
    """One factor for each masked parameter of the region, by the parameter's name.

    Rows of up, gate (FFN neurons), down (FFN output channels), q, k, v (heads); columns of `o_proj`, where a head is an
    input block; experts by their place in the tensors that hold them all. With grouped queries a key/value head takes
    the maximum over the heads that it serves. A bias is masked with its row; `o_proj`'s bias belongs to no head and is
    not masked. In a fused tensor each module's rows get their own units' factors, and those of modules that are not
    masked get 1.

    Args:
        importance: unit kind → [L, units] in [0, 1].
        modules: modules to mask, each of them trained.
        strength: s in the factor 1 − s·I, in (0, 1].
        uniform: as a control, each module of a layer gets its mean factor on all of its units: what a smaller learning
            rate alone would do.

    Raises:
        RegionError: a module to mask is not trained.
    """
    check_masked(modules, region)
    trained = set(region.parameter_names(anatomy))
    factors: dict[str, Factor] = {}
    for layer in region.layers:
        for module in modules:
            if not anatomy.has(layer, module):
                continue
            of_units = importance[UNIT_OF_MODULE[module]][layer].float()
            importances = _unit_per_row(known_units(of_units), layer, module, anatomy)
            values = factor_values(importances, strength, uniform)
            for name in anatomy.parameter_names(layer, module):
                is_bias = len(anatomy.shapes[name]) == 1
                if name not in trained or (is_bias and module == "o_proj"):
                    continue
                if module == "o_proj":
                    factors[name] = Factor(values, 1 - anatomy.row_axis)
                else:
                    factor = factors.setdefault(name, _uniform(1.0, name, layer, module, anatomy))
                    factor.values[anatomy.rows(layer, module)] = values
    return factors


def factor_values(importance: Tensor, strength: float, uniform: bool) -> Tensor:
    """1 − s·I for each row or column [n], or, as a control, their mean for all."""
    values = 1 - strength * importance
    return values.mean().repeat(len(values)) if uniform else values


def harden(importance: Mapping[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """A hard mask: 1 for units of at least this importance, 0 for all others.

    Args:
        importance: unit kind → [L, units] in [0, 1].

    Example:
        >>> harden({"ffn_neurons": torch.tensor([[0.2, 0.9]])}, 0.9)["ffn_neurons"].tolist()
        [[0.0, 1.0]]
    """
    return {
        kind: (vectors >= threshold).to(vectors.dtype).masked_fill(vectors.isnan(), math.nan)
        for kind, vectors in importance.items()
    }


def shuffle_units(importance: Mapping[str, Tensor], anatomy: Anatomy, seed: int) -> dict[str, Tensor]:
    """The same importances on other units, layer by layer: as a control, a mask that knows how much and not where.

    Heads change places within their key/value group, and the groups with one another, so that the maxima over groups,
    which mask keys and values, keep their mean, too. So do the maxima over modules that share a tensor, whose columns
    change places together.

    Args:
        importance: unit kind → [L, units].
    """
    generator = torch.Generator().manual_seed(seed)
    of_tensors: dict[tuple[int, tuple[str, ...]], Tensor] = {}

    def order(kind: str, layer: int, units: int) -> Tensor:
        if kind.endswith(COLUMN_KIND):
            tensor = layer, anatomy.layout.parts(kind.removesuffix(COLUMN_KIND))
            if tensor not in of_tensors:
                of_tensors[tensor] = torch.randperm(units, generator=generator)
            return of_tensors[tensor]
        if kind != ATTENTION_HEADS:
            return torch.randperm(units, generator=generator)
        num_groups = anatomy.sizes[layer].num_key_value_heads
        size = units // num_groups
        groups = torch.randperm(num_groups, generator=generator).tolist()
        return torch.cat([group * size + torch.randperm(size, generator=generator) for group in groups])

    def shuffled(kind: str, layer: int, row: Tensor) -> Tensor:
        own = known_units(row)
        return torch.cat([own[order(kind, layer, len(own))], row[len(own) :]])

    return {
        kind: torch.stack([shuffled(kind, layer, row) for layer, row in enumerate(vectors)])
        for kind, vectors in importance.items()
    }


def freeze_factors(region: Region, anatomy: Anatomy) -> dict[str, Factor]:
    """What holds the frozen rows of fused tensors: 0 on them, 1 on those of trained modules.

    `requires_grad` is a whole tensor's: of one that is trained in part, the rest is held by its factor, on the gradient
    (so that clipping does not see it) and on the update (so that weight decay does not move it).
    """
    held: dict[str, Factor] = {}
    for layer in region.layers if not region.matched else ():
        for module in region.modules:
            if not set(anatomy.layout.parts(module)) <= set(region.modules):
                for name in anatomy.parameter_names(layer, module):
                    factor = held.setdefault(name, _uniform(0.0, name, layer, module, anatomy))
                    factor.values[anatomy.rows(layer, module)] = 1
    return held


def join(held: Mapping[str, Factor], mask: Mapping[str, Factor]) -> dict[str, Factor]:
    """Both at once: where a parameter has two factors, their product."""

    def product(one: Factor, other: Factor) -> Factor:
        if one.axis == other.axis:
            return Factor(one.values * other.values, one.axis)
        return Factor(one.values, one.axis, across=other.values)

    both = {name: product(held[name], mask[name]) for name in held.keys() & mask.keys()}
    return {**held, **mask, **both}


def check_masked(modules: tuple[str, ...], region: Region) -> None:
    """Raise a RegionError where a module to mask is not trained: its mask would do nothing, and say nothing."""
    untrained = [m for m in modules if m not in region.modules]
    if untrained:
        raise RegionError(
            f"softmask.modules: {', '.join(untrained)} would be masked but not trained (trained: "
            f"{', '.join(region.modules)})"
        )


def _uniform(value: float, name: str, layer: int, module: str, anatomy: Anatomy) -> Factor:
    """One factor for all rows of the tensor that a module lies in."""
    axis = 0 if len(anatomy.shapes[name]) == 1 or module == EXPERTS else anatomy.row_axis
    return Factor(torch.full((anatomy.num_rows_of_tensor(layer, module),), value), axis)


def _unit_per_row(importance: Tensor, layer: int, module: str, anatomy: Anatomy) -> Tensor:
    """Spread a layer's importances [units] over the rows (for o_proj: columns) that each unit owns."""
    size = anatomy.sizes[layer]
    if module in ("q_proj", "o_proj"):
        return importance.repeat_interleave(size.head_dim)
    if module in ("k_proj", "v_proj"):
        per_group = importance.view(size.num_key_value_heads, -1).amax(dim=1)
        return per_group.repeat_interleave(size.head_dim)
    return importance
