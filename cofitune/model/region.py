"""The region: a layer range × a set of modules, what is trained (CoFiTune's coarse level, METHOD's layer names)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from cofitune.errors import RegionError, did_you_mean
from cofitune.model.anatomy import Anatomy, expand_modules

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


@dataclass(frozen=True)
class Region:
    """Layers `first` … `last` (0-based, inclusive) × `modules` (single modules in the layer's own order)."""

    first: int
    last: int
    modules: tuple[str, ...]

    @property
    def layers(self) -> range:
        """The trained layers."""
        return range(self.first, self.last + 1)

    def __str__(self) -> str:
        return f"layers {self.first}-{self.last} × {', '.join(self.modules)}"

    def parameter_names(self, anatomy: Anatomy) -> list[str]:
        """Names of every trained parameter, weights and biases, in the model's order."""
        return [n for layer in self.layers for module in self.modules for n in anatomy.parameter_names(layer, module)]

    def num_parameters(self, anatomy: Anatomy) -> int:
        """Trained weights and biases, counted from the true shapes."""
        return sum(math.prod(anatomy.shapes[name]) for name in self.parameter_names(anatomy))

    def inside(self, other: Region) -> bool:
        """Whether this region trains nothing that `other` does not."""
        return other.first <= self.first and self.last <= other.last and set(self.modules) <= set(other.modules)


def resolve_region(layers: str, modules: tuple[str, ...] | list[str], num_layers: int) -> Region:
    """Turn what a config says into a region of a model with `num_layers` layers.

    Raises:
        RegionError: an unknown name, an empty range, or layers that the model does not have.
    """
    first, last = layer_range(layers, num_layers)
    return Region(first, last, expand_modules(modules))


def layer_range(text: str, num_layers: int) -> tuple[int, int]:
    """First and last layer (0-based, inclusive) of `25%-50%`, `8-15`, `3` or a name such as `bottom2`.

    Percentages take ⌈L·a⌉ … ⌈L·b⌉ − 1, so that the four quarters tile every model without gap or overlap.
    """
    if text.strip() in NAMED_RANGES:
        low, high = (Fraction(v, 100) for v in NAMED_RANGES[text.strip()])
    elif match := _PERCENT.match(text):
        low, high = (Fraction(v) / 100 for v in match.groups())
        if high > 1:
            raise RegionError(f"region.layers: '{text}' goes beyond 100 %")
    elif match := _INDICES.match(text):
        first = int(match[1])
        last = int(match[2]) if match[2] else first
        if first > last:
            raise RegionError(f"region.layers: '{text}' runs backwards; write the lower layer first")
        if last >= num_layers:
            raise RegionError(
                f"region.layers: '{text}' lies outside the model, whose {num_layers} layers are 0-{num_layers - 1}"
            )
        return first, last
    else:
        raise RegionError(
            f"region.layers: '{text}' is no layer range{did_you_mean(text, NAMED_RANGES)}; write 25%-50%, 8-15 or one "
            f"of {', '.join(NAMED_RANGES)}"
        )
    first, last = math.ceil(num_layers * low), math.ceil(num_layers * high) - 1
    if first > last:
        raise RegionError(f"region.layers: '{text}' holds no layer of the model's {num_layers}")
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
