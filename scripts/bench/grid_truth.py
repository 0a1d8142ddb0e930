"""What the trials of a whole grid say: each region's figure under both seeds, and how far the two agree."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cofitune.model.region import Region
from cofitune.search.equal_loss import EqualLoss
from cofitune.search.measured import lowest_loss
from cofitune.search.proxy import rank_correlation
from cofitune.search.repeat import Reliability, judge_seeds
from cofitune.search.store import read_trials
from cofitune.search.trial import BASE, Trial

TITLES = {"loss": "losses and drift", "score": "scores of an evaluation"}
UNITS = {"loss": "drift at equal speciality loss, nats a token", "score": "unified score, points"}


@dataclass(frozen=True)
class Grid:
    """A grid under one measure, as far as it was tried.

    Attributes:
        seeds: the finished trials of each seed, by region.
        common: under losses, the speciality loss at which all trials of all seeds are compared, in nats a token.
        lines: every line of the store, one a part of a trial.
    """

    measure: str
    base: Trial
    seeds: dict[int, dict[Region, Trial]]
    common: float | None
    lines: tuple[Trial, ...]

    @property
    def first(self) -> dict[Region, Trial]:
        """The trials of the first seed."""
        return self.seeds[min(self.seeds)]

    @property
    def both(self) -> list[Region]:
        """Regions that were trained with every seed."""
        return [region for region in self.first if all(region in own for own in self.seeds.values())]

    def figure(self, trial: Trial) -> float | None:
        """What decides: the drift at the common loss, lower is better; or the unified score, higher is better."""
        if self.measure == "score":
            return trial.unified
        # the tolerance only orders what counts as equal, which would make the seeds agree by the numbers of weights
        return EqualLoss(self.base).drift_of(trial, self.common)

    def rank_figure(self, trial: Trial) -> float:
        """The same where all can be ranked, low is best: who does not come to the common loss ranks by its own."""
        figure = self.figure(trial)
        if self.measure == "score":
            return -float(trial.unified or 0.0)
        return figure if figure is not None else 1000.0 + lowest_loss(trial.curve)  # behind every drift

    def truth(self) -> dict[Region, float]:
        """The mean of that over the seeds that a region has, the best region first."""
        means = {
            region: statistics.fmean(self.rank_figure(own[region]) for own in self.seeds.values() if region in own)
            for region in self.first
        }
        return dict(sorted(means.items(), key=lambda one: (one[1], self.first[one[0]].num_trained, one[0].layers)))

    def by_seed(self, seed: int) -> dict[Region, float]:
        """The same of one seed alone."""
        return {region: self.rank_figure(trial) for region, trial in self.seeds.get(seed, {}).items()}

    def correlation(self) -> float | None:
        """Spearman's between the two seeds, over the regions that have both."""
        first, second = (self.by_seed(seed) for seed in sorted(self.seeds)[:2])
        return rank_correlation([first[r] for r in self.both], [second[r] for r in self.both])

    def judged(self) -> Reliability:
        """The seeds, judged as `search.repeat` judges them: the deviation of a training, and what ties."""
        seeds = sorted(self.seeds)
        values = {
            self.first[region].id: [
                self.figure(self.seeds[seed][region]) for seed in seeds if region in self.seeds[seed]
            ]
            for region in self.first
        }
        return judge_seeds(values, seeds)

    def ties(self) -> tuple[int, int] | None:
        """How many regions tie with the best within the error of the seeds, of how many others; None without one."""
        judged = self.judged()
        best = self.first[next(iter(self.truth()))].id
        return None if judged.deviation is None else (len(judged.ties(best)), len(judged.means) - 1)

    def seconds(self, regions: Sequence[Region] | None = None) -> float:
        """What the first seed's trials took, of these regions or of all; the base's measurement left out."""
        ids = {self.first[region].id for region in regions or self.first}
        return sum(line.seconds for line in self.lines if line.id in ids)

    def parts(self) -> dict[str, float]:
        """The same by what it went into."""
        ids = {trial.id for trial in self.first.values()}
        names = ("start", "train", "evaluate", "other")
        return {n: sum(line.parts.get(n, 0.0) for line in self.lines if line.id in ids) for n in names}

    @property
    def work(self) -> tuple[int, int]:
        """Optimizer steps of the first seed's trials, and how many parts of them were measured."""
        return work_of([line for line in self.lines if line.seed == min(self.seeds)])


@dataclass(frozen=True)
class Results:
    """What there is under one measure.

    Attributes:
        searches: by name, what each found; None where it was not run.
        tied_by_items: regions that tie with the best by the items alone, of how many others (scores).
    """

    grid: Grid
    searches: Mapping[str, dict[str, Any] | None]
    tied_by_items: tuple[int, int] | None

    def to_json(self) -> dict[str, Any]:
        """Every number."""
        grid, judged = self.grid, self.grid.judged()
        rows = [
            {
                "region": region.to_dict(),
                "num_trained": grid.first[region].num_trained,
                "seeds": {str(seed): _of_trial(grid, own[region]) for seed, own in grid.seeds.items() if region in own},
            }
            for region in grid.truth()
        ]
        return {
            "measure": grid.measure,
            "unit": UNITS[grid.measure],
            "base": json.loads(grid.base.to_json()),
            "common_loss": grid.common,
            "with_both_seeds": len(grid.both),
            "correlation_between_seeds": grid.correlation(),
            "deviation_of_a_training": judged.deviation,
            "tied_by_seeds": grid.ties(),
            "tied_by_items": self.tied_by_items,
            "seconds": grid.seconds(),
            "parts": grid.parts(),
            "regions": rows,
            "searches": dict(self.searches),
        }


def _of_trial(grid: Grid, trial: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(trial.to_json())
    kept = ("speciality", "versatility", "unified", "curve", "margins", "seconds", "parts")
    return {"figure": grid.figure(trial)} | {name: content[name] for name in kept if name in content}


def rank_in(figures: Mapping[Region, float], region: Region) -> int | None:
    """Place of a region, from 1, equals sharing the better one; None where it is not among them."""
    if region not in figures:
        return None
    return 1 + sum(figure < figures[region] for figure in figures.values())


def read_grid(folder: Path, measure: str, seeds: Sequence[int]) -> Grid | None:
    """Read a grid's store; None where it has no finished trial."""
    path = folder / "search" / "trials.jsonl"
    lines = read_trials(path) if path.is_file() else []
    base = next((line for line in lines if line.id == BASE and line.done), None)
    done: dict[int, dict[Region, Trial]] = {seed: {} for seed in seeds}
    for line in lines:
        if line.done and line.region is not None and line.seed in done:
            done[line.seed][line.region] = line
    if base is None or not done[min(seeds)]:
        return None
    every = [trial for own in done.values() for trial in own.values()]
    common = EqualLoss(base).common_loss(every) if measure == "loss" else None
    return Grid(measure, base, done, common, tuple(lines))


def work_of(lines: Sequence[Trial]) -> tuple[int, int]:
    """Optimizer steps of a search's lines, and how many of them were measured."""
    # a stopped trial's line repeats the one of the part before
    parts = [line for line in lines if line.region is not None and line.status in ("done", "paused")]
    return sum(line.steps - line.start_step for line in parts), len(parts)


def tied_by_items(folder: Path) -> tuple[int, int] | None:
    """Regions whose scores tie with the winner's by the items alone, of how many others; None before the end."""
    path = folder / "search" / "tree.json"
    tree = json.loads(path.read_text()) if path.exists() else {"trials": []}
    told = [t["to_winner"]["tied"] for t in tree["trials"] if t["status"] == "done" and t["to_winner"]]
    return (sum(told), len(told)) if told else None


def read_search(folder: Path) -> dict[str, Any] | None:
    """What a search found, and what its trials took; None where it has not ended."""
    path = folder / "search" / "tree.json"
    if not path.exists():
        return None
    tree = json.loads(path.read_text())
    ids = {t["id"] for t in tree["trials"]}
    proxy = folder / "search" / "proxy.json"
    told = json.loads(proxy.read_text()) if proxy.exists() else None
    return {
        "winner": next(t for t in tree["trials"] if t["id"] == tree["winner"])["region"],
        "sentences": tree["sentences"],
        "trials": len(tree["trials"]),
        "stopped": sum(t["status"] == "stopped" for t in tree["trials"]),
        "pruned": len(tree["not_tried"]["pruned"]),
        "seconds": sum(t["seconds"] for t in tree["trials"]),
        "work": work_of([line for line in read_trials(folder / "search" / "trials.jsonl") if line.id in ids]),
        "proxy_seconds": told["seconds"] if told else 0.0,
        "proxy": {name: told[name] for name in ("gain", "harm")} if told else None,
        "proxy_correlation": (tree["proxy"] or {}).get("rank_correlation"),
    }
