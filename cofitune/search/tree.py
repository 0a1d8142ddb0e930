"""The coarse tree search (CoFiTune's coarse level): level by level, the best regions of one are expanded at the next.

The rules, all ours (the paper's own search order is not known to us):

- A level's candidates are what it offers inside each expanded region. Where it offers the region itself, or nothing,
  the region stands again, with the scores it has: no trial is made twice. All others are ordered together, so that
  several may run at once; what is found does not depend on which ends first.
- The `beam` best of a level by the objective are expanded, also when all are worse than their parent: a level down may
  still be better.
- The winner is the best over *all* finished trials that the search reached, so going down never costs it a better
  region further up. Under successive halving (rungs.py) only what was trained to the end is finished.
- A trial that failed is tried once more when the others of its level have ended, and once in each later call; then the
  search continues without it. A level of which nothing finished is skipped: its parents are expanded at the next.
- Where the budget leaves no room, the level at hand ends with what fits, and no other is begun.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cofitune.errors import UserError
from cofitune.model.region import Region
from cofitune.search.halving import share_of
from cofitune.search.level import Job, LevelRunner, OnTrial, RunJobs, SearchSettings
from cofitune.search.space import Level, children
from cofitune.search.store import Store
from cofitune.search.trial import Trial

OnLevel = Callable[[int, int], None]


@dataclass(frozen=True)
class Unexplored:
    """What the search did not come to.

    Attributes:
        regions: candidates that the budget had no room for, or that it left paused.
        levels: levels that were not begun.
        reason: the limit that was met; None: the search went to its end.
        pruned: candidates that the proxy left out.
    """

    regions: tuple[Region, ...] = ()
    levels: tuple[Level, ...] = ()
    reason: str | None = None
    pruned: tuple[Region, ...] = ()


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        winner: the best finished trial.
        runner_up: the second best, if there is one.
        trials: every trial that was reached, in order; failed and stopped ones included.
        expanded: for each level the ids that were taken on to the next, best first.
        untried: what it did not come to.
    """

    winner: Trial
    runner_up: Trial | None
    trials: tuple[Trial, ...]
    expanded: tuple[tuple[str, ...], ...]
    untried: Unexplored = field(default_factory=Unexplored)


def search(
    root: Region,
    levels: Sequence[Level],
    *,
    rules: SearchSettings,
    run_jobs: RunJobs,
    store: Store,
    on_trial: OnTrial,
    on_level: OnLevel = lambda number, reached: None,
) -> SearchResult:
    """Search the tree below `root`, taking from the store what is already there.

    Args:
        root: the whole model (all layers × all modules); it is never trained itself.
        levels: tried in order.
        run_jobs: trains and evaluates.
        store: gets one line for each part of a trial as soon as it ends.
        on_trial: told of every part of a trial, and whether it was known from the store.
        on_level: told as a level begins of its number, from 1, and of how many trials there are up to its end.

    Raises:
        UserError: no trial finished; the message gives the first reason.
    """
    reached: dict[Region, Trial] = {}
    expanded: list[tuple[str, ...]] = []
    pruned: list[Region] = []
    parents = [root]
    race = LevelRunner(rules, run_jobs, store, on_trial)
    for number, level in enumerate(levels, start=1):
        candidates = _offered(parents, level, root)
        new = [region for region in candidates if region != root and region not in reached]
        chosen, left_out = _choose(new, rules)
        pruned += left_out
        above = {region: reached.get(parent) for region, parent in candidates.items()}
        ids = {region: trial.id if trial else None for region, trial in above.items()}
        on_level(number, len(reached) + len(chosen))
        reached |= race.run([Job(store.id_of(region), region, number, ids[region]) for region in chosen])
        parents = _best(candidates, reached, rules) or parents
        expanded.append(tuple(reached[r].id for r in parents if r in reached))
        if race.ended:
            break
    not_begun = tuple(levels[len(expanded) :])  # none, unless the budget ended
    untried = Unexplored(tuple(race.untried), not_begun, race.ended, tuple(pruned))
    finished = rules.objective.order([trial for trial in reached.values() if trial.done])
    if not finished:
        raise UserError(_why_nothing_finished(reached, race.ended))
    runner_up = finished[1] if len(finished) > 1 else None
    return SearchResult(finished[0], runner_up, tuple(reached.values()), tuple(expanded), untried)


def _offered(parents: Sequence[Region], level: Level, root: Region) -> dict[Region, Region]:
    """A level's candidates, each with the first of the regions that it lies in."""
    offered: dict[Region, Region] = {}
    for parent in parents:
        for region in children(parent, level, root.last + 1, root.modules):
            offered.setdefault(region, parent)
    return offered


def _choose(regions: Sequence[Region], rules: SearchSettings) -> tuple[list[Region], list[Region]]:
    """The candidates that are tried, in the order in which they are, and those that the proxy leaves out."""
    if rules.proxy_score is None:
        return list(regions), []
    proxy_score = rules.proxy_score
    order = sorted(regions, key=lambda region: -proxy_score(region))  # stable: of equals the level's order
    most = max(rules.beam, share_of(rules.keep, len(order)))
    return order[:most], order[most:]


def _best(candidates: Iterable[Region], reached: Mapping[Region, Trial], rules: SearchSettings) -> list[Region]:
    """The `beam` best finished candidates, best first."""
    finished = {reached[r].id: r for r in candidates if r in reached and reached[r].done}
    order = rules.objective.order([reached[region] for region in finished.values()])
    return [finished[trial.id] for trial in order[: rules.beam]]


def _why_nothing_finished(reached: Mapping[Region, Trial], ended: str | None) -> str:
    if ended is not None:
        return f"search: {ended} ended it before one trial was trained to its end; what was done is kept, so raise it"
    first = next((t.reason for t in reached.values() if t.reason), "the levels offer no region")
    return f"search: not one of {len(reached)} trials finished; the first one's reason: {first}"
