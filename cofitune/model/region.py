"""The region: layers × modules, what is trained (CoFiTune's coarse level; docs/regions.md has its layer names)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from typing import TYPE_CHECKING

from torch import nn

from cofitune.errors import RegionError, did_you_mean
from cofitune.model.layouts import MODULES, expand_modules

if TYPE_CHECKING:  # it imports transformers, which who reads trials and draws them does not need
    from cofitune.model.anatomy import Anatomy

# The authors' names, as shares of the depth: the first layer is ⌈L·a⌉, the last ⌈L·b⌉ − 1.
NAMED_RANGES = {
    "bottom1": (0, 25),
    "bottom2": (25, 50),
    "middle": (50, 75),
    "top": (75, 100),
    "bottom-plus": (0, 50),
    "middle-plus": (25, 75),
    "top-plus": (50, 100),
    "all": (0, 100),
}
_PERCENT = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*%\s*-\s*(\d+(?:\.\d+)?)\s*%\s*$")
_INDICES = re.compile(r"^\s*(\d+)\s*(?:-\s*(\d+))?\s*$")


def stretch_text(layers: Sequence[int]) -> str:
    """Layers that follow each other, as a config writes them: `0-3`, or `8`."""
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])


@dataclass(frozen=True)
class Region:
    """`layers` (0-based, ascending) × `modules` (single modules in the layer's own order), or what a regex matched.

    Attributes:
        matched: names of exactly the trained parameters, where a regex chose them; `layers` and `modules` are then
            those that they lie in, and may be empty.
        reaches: the lowest layer that the backward pass runs through, where that is not the lowest of `layers`.
    """

    layers: tuple[int, ...]
    modules: tuple[str, ...]
    matched: tuple[str, ...] = ()
    reaches: int | None = None

    @classmethod
    def span(cls, first: int, last: int, modules: tuple[str, ...]) -> Region:
        """Layers `first` … `last`, both included."""
        return cls(tuple(range(first, last + 1)), modules)

    @property
    def first(self) -> int:
        """The lowest layer that the backward pass runs through: what lies below is frozen and needs no gradient."""
        return self.layers[0] if self.reaches is None else self.reaches

    @property
    def last(self) -> int:
        """The highest trained layer."""
        return self.layers[-1]

    @property
    def layers_text(self) -> str:
        """The layers as a config writes them: `0-3,8`."""
        stretches = groupby(enumerate(self.layers), key=lambda item: item[1] - item[0])
        ends = [[layer for _, layer in stretch] for _, stretch in stretches]
        return ",".join(map(stretch_text, ends))

    def __str__(self) -> str:
        if self.matched:
            return f"{len(self.matched)} tensors: {', '.join(self.matched[:3])}" + (", …" * (len(self.matched) > 3))
        return f"layers {self.layers_text} × {', '.join(self.modules)}"

    def to_dict(self) -> dict[str, object]:
        """What names the region in a file: layers and modules as a config writes them."""
        return {"layers": self.layers_text, "modules": list(self.modules)}

    def parameter_names(self, anatomy: Anatomy) -> list[str]:
        """Names of every parameter that trains, wholly or in part: weights and biases, in the model's order."""
        if self.matched:
            return list(self.matched)
        names = [n for layer in self.layers for m in self.modules for n in anatomy.parameter_names(layer, m)]
        return list(dict.fromkeys(names))

    def trains(self, layer: int, module: str, anatomy: Anatomy) -> bool:
        """Whether a module of a layer trains (of a regex's region: whether any of its tensors does)."""
        if self.matched:
            return any(name in self.matched for name in anatomy.parameter_names(layer, module))
        return layer in self.layers and module in self.modules

    def num_parameters(self, anatomy: Anatomy) -> int:
        """Weights and biases that may move, counted from the true shapes."""
        if self.matched:
            return self.num_touched(anatomy)
        return sum(
            math.prod(anatomy.shapes[name])
            // anatomy.num_rows_of_tensor(layer, module)
            * anatomy.num_rows(layer, module)
            for layer in self.layers
            for module in self.modules
            for name in anatomy.parameter_names(layer, module)
        )

    def num_touched(self, anatomy: Anatomy) -> int:
        """Weights and biases of all tensors that train, wholly or in part: what has a gradient and a state."""
        return sum(math.prod(anatomy.shapes[name]) for name in self.parameter_names(anatomy))

    def num_held(self, anatomy: Anatomy) -> int:
        """Weights and biases that share a fused tensor with a trained module, and are held where they are."""
        return self.num_touched(anatomy) - self.num_parameters(anatomy)

    def inside(self, other: Region) -> bool:
        """Whether this region trains nothing that `other` does not."""
        return set(self.layers) <= set(other.layers) and set(self.modules) <= set(other.modules)


def region_from_dict(value: Mapping[str, object]) -> Region:
    """The region that `Region.to_dict` wrote.

    Raises:
        KeyError, TypeError, RegionError: it is none.
    """
    layers, modules = str(value["layers"]), value["modules"]
    if not isinstance(modules, list | tuple):
        raise TypeError(f"modules: a list of names is needed, not {modules!r:.40}")
    return Region(layer_set(layers, 1 + max(map(int, re.findall(r"\d+", layers)))), tuple(modules))


def resolve_region(
    layers: str, modules: tuple[str, ...] | list[str], num_layers: int, available: tuple[str, ...] = MODULES
) -> Region:
    """Turn what a config says into a region of a model with `num_layers` layers and the modules `available`.

    Raises:
        RegionError: an unknown name, an empty range, or layers or modules that the model does not have.
    """
    return Region(layer_set(layers, num_layers), expand_modules(modules, available, "region.modules"))


def match_region(pattern: str, anatomy: Anatomy) -> Region:
    """The region of exactly the parameters whose whole name a regex matches, whatever they are.

    Raises:
        RegionError: it matches none.
    """
    names = [name for name in anatomy.shapes if re.fullmatch(pattern, name)]
    if not names:
        tied = {second: name for second, name in anatomy.tied.items() if re.fullmatch(pattern, second)}
        if tied:
            second, name = next(iter(tied.items()))
            raise RegionError(f"region.match: {second} is no tensor of its own, it is tied to {name}: match that name")
        near = did_you_mean(pattern.replace("\\", ""), anatomy.shapes)
        raise RegionError(
            f"region.match: '{pattern}' matches no parameter's whole name{near} (names look like "
            f"{', '.join(list(anatomy.shapes)[:3])}, …)"
        )
    in_layer = re.compile(re.escape(anatomy.layout.layers) + r"\.(\d+)\.")
    layers = tuple(sorted({int(result[1]) for name in names if (result := in_layer.match(name))}))
    touched = {m for layer in layers for m in anatomy.modules if set(anatomy.parameter_names(layer, m)) & set(names)}
    outside = {name for name in names if not in_layer.match(name)}
    # only an untied head is known to lie above all layers; anything else outside them may feed the lowest
    late = {anatomy.head} - {anatomy.embedding}
    above = not outside - late and anatomy.modules  # where the layout is not known, nor is what feeds what
    reaches = 0 if not above else layers[0] if layers else anatomy.num_layers - 1
    return Region(layers, tuple(m for m in anatomy.modules if m in touched), tuple(names), reaches)


def linear_region(anatomy: Anatomy, layers: tuple[int, ...]) -> Region:
    """All linear modules of some layers, whatever they are: what an adapter sits on where layers differ.

    Raises:
        RegionError: there are none.
    """
    linear = set(anatomy.linear)
    inside = tuple(f"{anatomy.layout.layers}.{layer}." for layer in layers)
    names = tuple(
        name
        for name in anatomy.linear
        if name.startswith(inside) and linear.issuperset(anatomy.converted.get(name, ()))
    )
    if not names:
        raise RegionError(f"adapter: in model type {anatomy.model_type} no linear module lies in a list of layers")
    return Region(layers, (), names, layers[0])


def check_present(region: Region, anatomy: Anatomy, section: str = "region") -> None:
    """Refuse a region in which the model has nothing: none of its layers has one of its modules; and one that could not
    be exported.

    Args:
        section: of the config, that says what the region is.

    Raises:
        RegionError: it is such a region.
    """
    names = set(region.parameter_names(anatomy))
    for name in sorted(names):
        apart = [other for other in anatomy.converted.get(name, ()) if other not in names]
        if apart:
            raise RegionError(
                f"{section}: {name} and {', '.join(apart)} are one tensor in the weight files of model type "
                f"{anatomy.model_type}, so that one without the other could not be exported: train all of them, or none"
            )
    if not names:
        where = {
            m: Region(tuple(i for i in range(anatomy.num_layers) if anatomy.has(i, m)), ()) for m in region.modules
        }
        message = "; ".join(f"{module} is in layers {found.layers_text}" for module, found in where.items())
        raise RegionError(f"{section}: layers {region.layers_text} have none of these modules: {message}")


def layer_set(text: str, num_layers: int, key: str = "region.layers") -> tuple[int, ...]:
    """The layers, ascending, of one or more ranges with commas between them: `0-3,8,50%-75%,top`.

    Args:
        key: of the config, that says them.
    """
    layers: set[int] = set()
    for part in text.split(","):
        first, last = layer_range(part, num_layers, key)
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))


def layer_range(text: str, num_layers: int, key: str = "region.layers") -> tuple[int, int]:
    """First and last layer (0-based, inclusive) of `25%-50%`, `8-15`, `3` or a name such as `bottom2`.

    Percentages take ⌈L·a⌉ … ⌈L·b⌉ − 1, so that the four quarters tile every model without gap or overlap.
    """
    if text.strip() in NAMED_RANGES:
        low, high = (Fraction(v, 100) for v in NAMED_RANGES[text.strip()])
    elif match := _PERCENT.match(text):
        low, high = (Fraction(v) / 100 for v in match.groups())
        if high > 1:
            raise RegionError(f"{key}: '{text}' goes beyond 100 %")
    elif match := _INDICES.match(text):
        first = int(match[1])
        last = int(match[2]) if match[2] else first
        if first > last:
            raise RegionError(f"{key}: '{text}' runs backwards; write the lower layer first")
        if last >= num_layers:
            raise RegionError(
                f"{key}: '{text}' lies outside the model, whose {num_layers} layers are 0-{num_layers - 1}"
            )
        return first, last
    else:
        raise RegionError(
            f"{key}: '{text}' is no layer range{did_you_mean(text, NAMED_RANGES)}; write 25%-50%, 8-15, 3, one "
            f"of {', '.join(NAMED_RANGES)}, or several with commas between them"
        )
    first, last = math.ceil(num_layers * low), math.ceil(num_layers * high) - 1
    if first > last:
        raise RegionError(f"{key}: '{text}' holds no layer of the model's {num_layers}")
    return first, last


def freeze_outside(model: nn.Module, trained: set[str]) -> None:
    """Let exactly the named parameters require gradients. Must run before DeepSpeed wraps the model.

    Raises:
        RegionError: a name matches no parameter (an empty region included).
    """
    parameters = dict(model.named_parameters())
    missing = sorted(trained - parameters.keys())
    if missing or not trained:
        raise RegionError(f"region: matches no parameter of the model: {', '.join(missing) or 'it is empty'}")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)
