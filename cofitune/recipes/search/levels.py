"""The levels of a search, by the section `search`."""

from __future__ import annotations

from cofitune.config import schema
from cofitune.search.space import Level, paper_levels


def search_levels(requested: schema.Search, modules: tuple[str, ...]) -> tuple[Level, ...]:
    """What the section names, or the paper's levels.

    Args:
        modules: of the model.
    """
    if requested.levels == "paper":
        return paper_levels(modules)
    return tuple(Level(level.layers or (), level.modules or ()) for level in requested.levels)
