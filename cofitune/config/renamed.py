"""Keys that an earlier version called otherwise: they are still read, and the new name is told."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from cofitune.config.suite import Place

RENAMED = {  # section and old key → new key; to go with the version after the next
    ("train", "keep_last"): "save_total_limit",
    ("adapter", "kept"): "effective_rank",
}


class RenamedKeyWarning(UserWarning):
    """A config names a key as an earlier version did."""


def rename_keys(
    data: dict[str, object], sources: dict[Place, str], overridden: dict[Place, str], elsewhere: str
) -> list[str]:
    """Give old keys their new names, in place, and warn of each.

    An override goes before the file, whichever of the two names it uses.

    Args:
        data: a config, or some of its sections, as read.
        sources: file:line of each place in it; moved along.
        overridden: place → the override that wrote it; moved along.
        elsewhere: names the place in messages where `sources` does not.

    Returns:
        What is wrong: a setting that is given by both names.
    """
    problems = []
    for place, section, old, new in _old_keys(data):
        there, here = (*place, old), (*place, new)
        where = overridden.get(there) or sources.get(there, elsewhere)
        value = section.pop(old)
        names = ".".join(map(str, there)), ".".join(map(str, here))
        if new in section and (there in overridden) == (here in overridden):
            problems.append(f"{where}: {names[0]} is an old name of {names[1]}, which is given, too; keep that one")
            continue
        warnings.warn(f"{where}: {names[0]} is called {names[1]} now; please rename it", RenamedKeyWarning, 2)
        if here in overridden:
            continue
        section[new] = value
        if there in overridden:
            overridden[here] = overridden[there]
        if there in sources:
            sources[here] = sources[there]
    return problems


def _old_keys(data: dict[str, object]) -> Iterator[tuple[Place, dict[str, object], str, str]]:
    for (name, old), new in RENAMED.items():
        section = data.get(name)
        if isinstance(section, dict) and old in section:
            yield (name,), section, old, new
