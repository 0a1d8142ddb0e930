"""The search space as data: levels of layer ranges or module sets, each tried inside the best regions of the last.

CoFiTune's coarse level (arXiv 2404.10306, Figure 2) narrows a region down a tree; the levels here are ours, since the
order that the authors searched in is not known to us.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from cofitune.errors import ConfigError, RegionError
from cofitune.model.layouts import GROUPS, MODULES, expand_modules
from cofitune.model.region import Region, layer_set
from cofitune.search.halving import share_of


@dataclass(frozen=True)
class Level:
    """What one level tries inside a parent: layer ranges (the modules stay), or module sets (the layers stay).

    Attributes:
        layers: ranges as a config writes them (`bottom2`, `25%-50%`, `8-15`); empty where the level tries modules.
        modules: sets of modules or groups; empty where the level tries layers.
    """

    layers: tuple[str, ...] = ()
    modules: tuple[tuple[str, ...], ...] = ()

    def __str__(self) -> str:
        names = self.layers or tuple("+".join(m) for m in self.modules)
        return f"{'layers' if self.layers else 'modules'}: {', '.join(names)}"


@dataclass(frozen=True)
class PlannedLevel:
    """What a level may cost: every region that it could try, and how many trials it starts at most.

    Attributes:
        exact: whether `most` is the true count (it is where the parents are known before the first trial).
    """

    level: Level
    candidates: tuple[Region, ...]
    most: int
    exact: bool


PAPER_LEVELS = (
    Level(layers=("bottom-plus", "middle-plus", "top-plus")),
    Level(layers=("bottom1", "bottom2", "middle", "top")),
    Level(modules=(("mha",), ("ffn",), ("all",))),  # the paper's "both": the region above stands again
    Level(
        modules=(
            ("q_proj",),
            ("k_proj",),
            ("v_proj",),
            ("o_proj",),
            ("q_proj", "v_proj"),  # what LoRA's paper adapts
            ("v_proj", "o_proj"),
            ("gate_proj",),
            ("up_proj",),
            ("down_proj",),
            ("gate_proj", "up_proj"),
            ("gate_proj", "down_proj"),
            ("up_proj", "down_proj"),  # the paper's best (Figure 2)
        )
    ),
)


def paper_levels(modules: tuple[str, ...]) -> tuple[Level, ...]:
    """`PAPER_LEVELS` for a model with these modules: sets that name another (a gate that there is not) are left out."""
    known = {*modules, *GROUPS}
    return tuple(Level(level.layers, tuple(m for m in level.modules if set(m) <= known)) for level in PAPER_LEVELS)


def whole_model(num_layers: int, modules: tuple[str, ...] = MODULES) -> Region:
    """The root of the tree: all layers × all modules that the model has. It is never trained itself."""
    return Region.span(0, num_layers - 1, modules)


def children(parent: Region, level: Level, num_layers: int, available: tuple[str, ...] = MODULES) -> list[Region]:
    """The regions that a level offers inside `parent`, in the level's order, each once.

    A level may offer the parent itself (`all` modules, say): it stands again, with the scores it has, beside what lies
    inside it. The whole model never does: it is no trial. A level that offers nothing passes the parent through: the
    answer is then `[parent]`.

    Raises:
        RegionError: the level names an unknown module or range, or layers or modules that the model does not have.

    Example:
        >>> halves = Level(layers=("bottom-plus", "top-plus"))
        >>> [region.layers_text for region in children(whole_model(12), halves, 12)]
        ['0-5', '6-11']
    """
    offered = [Region(layer_set(text, num_layers), parent.modules) for text in level.layers]
    offered += [Region(parent.layers, expand_modules(modules, available)) for modules in level.modules]
    root = whole_model(num_layers, available)
    inside = [region for region in offered if region.inside(parent) and region != root]
    return list(dict.fromkeys(inside)) or [parent]


def check_levels(levels: Sequence[Level], num_layers: int, available: tuple[str, ...] = MODULES) -> None:
    """Find every mistake in the levels before the first trial.

    Raises:
        ConfigError: all of them together: empty levels, unknown names, ranges that hold no layer of this model, or
            levels that offer no region at all.
    """
    problems = []
    for index, level in enumerate(levels):
        where = f"search.levels.{index}"
        if bool(level.layers) == bool(level.modules):
            problems.append(f"{where}: a level tries either layers or modules, and at least one of them")
        root = whole_model(num_layers, available)
        single = [Level(layers=(text,)) for text in level.layers] + [Level(modules=(m,)) for m in level.modules]
        for one in single:
            try:
                children(root, one, num_layers, available)
            except RegionError as error:
                problems.append(f"{where}: {str(error).removeprefix('region.layers: ')}")
    if problems:
        raise ConfigError(problems)
    if not any(planned.most for planned in plan(levels, num_layers, 1, available)):
        raise ConfigError(["search.levels: they offer no region smaller than the whole model; name layers or modules"])


def plan(
    levels: Sequence[Level], num_layers: int, beam: int, available: tuple[str, ...] = MODULES, keep: float = 1.0
) -> list[PlannedLevel]:
    """Count the trials before any is run: exactly while the parents are known, then an upper bound.

    The bound of a level is the sum over the `beam` possible parents with the most children. It counts a trial once: one
    that fails is tried again, and a level of which nothing finishes leaves its parents to the next.

    Args:
        keep: share of a level's candidates that the proxy leaves (the `beam` best it always does); 1: all.
    """
    parents = [whole_model(num_layers, available)]
    exact = True
    planned = []
    for level in levels:
        families = {parent: children(parent, level, num_layers, available) for parent in parents}
        real = {parent: family for parent, family in families.items() if family != [parent]}
        new = [[region for region in family if region != parent] for parent, family in real.items()]
        offered = tuple(dict.fromkeys(itertools.chain(*new)))
        sizes = sorted(map(len, new), reverse=True)
        most = min(sum(sizes[:beam]), len(offered))
        left = min(most, max(beam, share_of(keep, most)))
        planned.append(PlannedLevel(level, offered, left, exact))
        exact = exact and not offered  # from here on the scores decide which regions are expanded
        parents = list(dict.fromkeys(itertools.chain(*families.values())))
    return planned
