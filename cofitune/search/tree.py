"""The coarse tree search (CoFiTune's coarse level): level by level, the best regions of one are expanded at the next.

The rules, all ours (the paper's own search order is not known to us):

- A level's candidates are what it offers strictly inside each expanded region; where it offers nothing, the region
  itself stands again, with the scores it has.
- The `beam` best of a level by the unified score are expanded, also when all are worse than their parent: a level down
  may still be better. Of equal scores the one with fewer trained weights goes first, then the lower first layer.
- The winner is the best over *all* finished trials that the search reached, so going down never costs it a better
  region further up.
- A trial that failed is tried once more in the same call, and once in each later call; then the search goes on without
  it. A level of which nothing finished is skipped: its parents are expanded at the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cofitune.errors import UserError
from cofitune.model.region import Region
from cofitune.search.space import Level, children
from cofitune.search.store import Store
from cofitune.search.trial import RunTrial, Trial, rank

ATTEMPTS = 2
OnTrial = Callable[[Trial, bool], None]


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        winner: the best finished trial.
        runner_up: the second best, if there is one.
        trials: every trial that was reached, in order; failed ones included.
        expanded: for each level the ids that were taken on to the next, best first.
    """

    winner: Trial
    runner_up: Trial | None
    trials: tuple[Trial, ...]
    expanded: tuple[tuple[str, ...], ...]


def search(
    root: Region, levels: Sequence[Level], *, beam: int, run_trial: RunTrial, store: Store, on_trial: OnTrial
) -> Found:
    """Search the tree below `root`, taking from the store what is already there.

    Args:
        root: the whole model (all layers × all modules); it is never trained itself.
        levels: tried in order.
        beam: regions expanded at each level.
        run_trial: trains and evaluates a region at a level (from 1) and returns the trial, also a failed one.
        store: gets one line a trial as soon as it ends.
        on_trial: told of every trial, and whether it was known from the store.

    Raises:
        UserError: no trial finished; the message gives the first reason.
    """
    reached: dict[Region, Trial] = {}
    expanded = []
    parents = [root]
    for number, level in enumerate(levels, start=1):
        candidates: dict[Region, None] = {}
        for parent in parents:
            above = reached.get(parent)
            for region in children(parent, level, root.last + 1, root.modules):
                candidates[region] = None
                if region == root or region in reached:
                    continue
                place = (region, number, above.id if above else None)
                reached[region] = _finish(*place, run_trial=run_trial, store=store, on_trial=on_trial)
        parents = _best(candidates, reached, beam) or parents
        expanded.append(tuple(reached[r].id for r in parents if r in reached))
    finished = sorted((t for t in reached.values() if t.done), key=rank)
    if not finished:
        first = next((t.reason for t in reached.values() if t.reason), "the levels offer no region")
        raise UserError(f"search: not one of {len(reached)} trials finished; the first one's reason: {first}")
    runner_up = finished[1] if len(finished) > 1 else None
    return Found(finished[0], runner_up, tuple(reached.values()), tuple(expanded))


def _best(candidates: dict[Region, None], reached: dict[Region, Trial], beam: int) -> list[Region]:
    """The `beam` best finished candidates, best first."""
    finished = [region for region in candidates if region in reached and reached[region].done]
    return sorted(finished, key=lambda region: rank(reached[region]))[:beam]


def _finish(
    region: Region, level: int, parent: str | None, *, run_trial: RunTrial, store: Store, on_trial: OnTrial
) -> Trial:
    """Take a trial from the store, or run it, and once more if it failed for the first time."""
    name = store.id_of(region)
    known = store.get(name)
    if known is not None and known.done:
        trial = replace(known, level=level, parent=parent)  # another beam may have reached it by another way
        on_trial(trial, True)
        return trial
    for _ in range(max(1, ATTEMPTS - store.failures(name))):
        trial = replace(run_trial(region, level), id=name, level=level, parent=parent)
        store.append(trial)
        on_trial(trial, False)
        if trial.done:
            break
    return trial
