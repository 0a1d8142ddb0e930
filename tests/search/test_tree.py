"""The tree search against ground truth: brute force, kills at every trial, ties, failures."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cofitune.errors import UserError
from cofitune.evaluation.statistics.paired import Estimate
from cofitune.model.layouts import GROUPS
from cofitune.model.region import Region
from cofitune.search.budget import Budget
from cofitune.search.halving import SuccessiveHalving
from cofitune.search.level import Job, SearchSettings
from cofitune.search.objective import Objective
from cofitune.search.space import PAPER_LEVELS, Level, plan, whole_model
from cofitune.search.store import Store, open_store, read_trials
from cofitune.search.tree import SearchResult, search
from cofitune.search.trial import Trial

L = 8
ROOT = whole_model(L)
HALVES = [(0, 3), (2, 5), (4, 7)]
QUARTERS = [(0, 1), (2, 3), (4, 5), (6, 7)]
STEPS, EVALUATION = 60, 10.0  # of a trial; seconds
Score = Callable[[Region], float]


def weights(region: Region) -> int:
    """Layers × modules stand for the weights."""
    return len(region.layers) * len(region.modules)


def random_score(seed: int, values: int) -> Score:
    """A score per region, with few different values so that ties are common."""
    known: dict[Region, float] = {}
    return lambda region: known.setdefault(region, float(random.Random(f"{seed}{region}").randrange(values)))


class Bench:
    """A fake trainer that counts its trials, fails where it is told to, and is killed at the trial it is told."""

    def __init__(
        self, folder: Path, score: Score, failing: Iterable[tuple[Region, int]] = (), kill_at: int | None = None
    ) -> None:
        self.store: Store = open_store(folder, {"model": "m"})
        self.score, self.kill_at = score, kill_at
        self.failing = dict(failing)
        self.ran: list[Region] = []
        self.ordered: list[tuple[Region, int, int]] = []  # with the steps from and to
        self.backwards = False
        self.told: list[tuple[str, bool]] = []
        self.levels: list[tuple[int, int]] = []

    def run(self, jobs: Sequence[Job]) -> Iterator[Trial]:
        """Yield the trials one after the other, or backwards, as if the last had been the fastest."""
        for job in reversed(jobs) if self.backwards else jobs:
            yield self.run_one(job)

    def run_one(self, job: Job) -> Trial:
        if self.kill_at is not None and len(self.ran) == self.kill_at:
            raise KeyboardInterrupt
        region, steps = job.region, job.stop_step or STEPS
        self.ran.append(region)
        self.ordered.append((region, self.store.resume_step(job.id, steps), steps))
        start_step, weight = self.ordered[-1][1], weights(region)
        fails = self.failing.get(region, 0)
        if fails:
            self.failing[region] = fails - 1
            return Trial(job.id, region, "failed", 0, 1, weight, 1.0, steps, start_step, reason=f"broken {region}")
        status: Any = "paused" if job.stop_step else "done"
        seconds = float(steps - start_step) + EVALUATION
        score, parts = self.score(region), {"train": float(steps - start_step), "evaluate": EVALUATION}
        return Trial(job.id, region, status, 0, 1, weight, seconds, steps, start_step, unified=score, parts=parts)

    def search(self, levels: tuple[Level, ...] = PAPER_LEVELS, beam: int = 1, **rules: Any) -> SearchResult:
        return search(
            ROOT,
            levels,
            rules=SearchSettings(STEPS, beam, **rules),
            run_jobs=self.run,
            store=self.store,
            on_trial=lambda trial, known: self.told.append((trial.id, known)),
            on_level=lambda number, reached: self.levels.append((number, reached)),
        )


def obvious_order(region: Region, score: Score) -> tuple[float, int, int, int, tuple[str, ...]]:
    return (-score(region), weights(region), region.first, region.last, region.modules)


def all_reachable() -> list[Region]:
    """Every region of the paper's levels, written out by hand from its sets."""
    everything = (*GROUPS["mha"], *GROUPS["ffn"])
    sets = [s for level in PAPER_LEVELS for s in level.modules if s not in (("mha",), ("ffn",), ("all",))]
    results = [Region.span(a, b, everything) for a, b in HALVES + QUARTERS]
    results += [Region.span(a, b, GROUPS[g]) for (a, b), g in itertools.product(QUARTERS, ("mha", "ffn"))]
    results += [Region.span(a, b, s) for (a, b), s in itertools.product(QUARTERS, sets)]
    return results


@pytest.mark.parametrize("seed", range(12))
def test_with_a_beam_as_wide_as_the_space_the_winner_is_the_best_of_all(tmp_path: Path, seed: int) -> None:
    score = random_score(seed, 1000 if seed % 2 else 5)
    bench = Bench(tmp_path, score)
    result = bench.search(beam=1000)
    truth = sorted(all_reachable(), key=lambda region: obvious_order(region, score))
    assert sorted(map(str, bench.ran)) == sorted(map(str, truth)), "every region, each once"
    assert result.winner.region == truth[0]
    assert result.runner_up is not None and result.runner_up.region == truth[1]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("beam", [1, 2, 3])
def test_a_beam_follows_the_obvious_implementation(tmp_path: Path, seed: int, beam: int) -> None:
    score = random_score(seed, 1000 if seed % 2 else 4)
    tried: list[Region] = []
    parents = [ROOT]
    for step in range(len(PAPER_LEVELS)):
        offered = {
            0: [r for r in all_reachable() if (r.first, r.last) in HALVES and len(r.modules) == 7],
            1: [r for r in all_reachable() if (r.first, r.last) in QUARTERS and len(r.modules) == 7],
            2: [r for r in all_reachable() if r.modules in (GROUPS["mha"], GROUPS["ffn"])],
            3: [r for r in all_reachable() if len(r.modules) <= 2],
        }[step]
        inside = [
            r
            for r in offered
            if any(set(r.layers) <= set(p.layers) and set(r.modules) <= set(p.modules) for p in parents)
        ]
        tried += inside
        standing = parents if step == 2 else []  # "both"
        parents = sorted([*inside, *standing], key=lambda region: obvious_order(region, score))[:beam]
    bench = Bench(tmp_path, score)
    result = bench.search(beam=beam)
    assert set(bench.ran) == set(tried) and len(bench.ran) == len(tried)
    assert result.winner.region == min(tried, key=lambda region: obvious_order(region, score))
    assert [t.region for t in result.trials] == bench.ran
    assert len(bench.ran) <= sum(level.most for level in plan(PAPER_LEVELS, L, beam)), "no more than was announced"


def test_a_score_that_rises_down_one_path_is_followed_to_the_papers_best(tmp_path: Path) -> None:
    target = {(layer, module) for layer in (2, 3) for module in ("up_proj", "down_proj")}

    def overlap(region: Region) -> float:
        own = {(layer, module) for layer in region.layers for module in region.modules}
        return 100 * len(own & target) / len(own | target)

    bench = Bench(tmp_path, overlap)
    result = bench.search()
    assert result.winner.region == Region.span(2, 3, ("up_proj", "down_proj"))
    assert result.winner.unified == 100
    assert len(bench.ran) == 3 + 2 + 2 + 6
    by_id = {t.id: t for t in result.trials}
    way = [result.winner]
    while way[-1].parent:
        way.append(by_id[way[-1].parent])
    assert way[-1].region == Region.span(0, 3, ROOT.modules), "of the two halves that hold the target the lower one"
    assert [t.level for t in way] == [4, 3, 2, 1]


def test_children_worse_than_their_parent_are_expanded_but_it_wins(tmp_path: Path) -> None:
    bench = Bench(tmp_path, lambda region: 10.0 * len(region.layers) + len(region.modules))
    result = bench.search()
    assert result.winner.region == Region.span(0, 3, ROOT.modules)
    assert {t.level for t in result.trials} == {1, 2, 3, 4}
    assert all(len(ids) == 1 for ids in result.expanded)


def test_where_both_beat_either_the_projections_of_both_are_tried(tmp_path: Path) -> None:
    kinds = {ROOT.modules: 50.0, GROUPS["mha"]: 40.0, GROUPS["ffn"]: 10.0, ("up_proj", "down_proj"): 90.0}
    bench = Bench(tmp_path, lambda region: kinds.get(region.modules, 0.0))
    result = bench.search()
    assert result.winner.region and result.winner.region.modules == ("up_proj", "down_proj"), (
        "inside mha, the better half, it is not"
    )
    assert len(bench.ran) == len(set(bench.ran)) == 3 + 2 + 2 + 12, "both stands at its level without another trial"
    assert result.expanded[1] == result.expanded[2] and result.winner.parent == result.expanded[2][0]


def test_ties_go_to_fewer_weights_then_to_the_lower_layers(tmp_path: Path) -> None:
    bench = Bench(tmp_path, lambda region: 1.0)
    result = bench.search(beam=1000)
    assert result.winner.region is not None
    assert weights(result.winner.region) == min(weights(r) for r in all_reachable())
    assert result.winner.region.first == 0


def test_a_region_reached_twice_is_trained_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path, lambda region: float(region.first))
    bench.search(PAPER_LEVELS[:2], beam=3)  # layers 2-3 lie in 0-3 and in 2-5
    assert len(bench.ran) == len(set(bench.ran)) == 7


def test_a_second_call_runs_nothing_and_finds_the_same(tmp_path: Path) -> None:
    score = random_score(3, 50)
    first = Bench(tmp_path, score).search(beam=2)
    bench = Bench(tmp_path, score)
    assert bench.search(beam=2) == first
    assert bench.ran == []
    assert bench.told and all(known for _, known in bench.told)


def test_a_wider_beam_runs_only_what_is_new(tmp_path: Path) -> None:
    score = random_score(4, 50)
    narrow = Bench(tmp_path, score)
    narrow.search(beam=1)
    wide = Bench(tmp_path, score)
    result = wide.search(beam=3)
    assert not set(narrow.ran) & set(wide.ran)
    assert result == Bench(tmp_path, score).search(beam=3)


def test_a_search_killed_at_any_trial_goes_on_to_the_same_store(tmp_path: Path) -> None:
    score = random_score(5, 6)
    fragile = [(Region.span(0, 3, ROOT.modules), 1), (Region.span(2, 3, ROOT.modules), 1)]
    (tmp_path / "whole").mkdir()
    whole = Bench(tmp_path / "whole", score, fragile)
    expected = whole.search(beam=2)
    lines = (tmp_path / "whole" / "trials.jsonl").read_bytes()
    for kill_at in range(len(whole.ran)):
        folder = tmp_path / f"killed-{kill_at}"
        folder.mkdir()
        bench = Bench(folder, score, fragile, kill_at)
        with pytest.raises(KeyboardInterrupt):
            bench.search(beam=2)
        again = Bench(folder, score, bench.failing.items())
        assert again.search(beam=2) == expected, kill_at
        assert (folder / "trials.jsonl").read_bytes() == lines, kill_at
        assert bench.ran + again.ran == whole.ran, kill_at


def test_a_line_torn_by_the_kill_is_mended_on_the_way(tmp_path: Path) -> None:
    score = random_score(6, 50)
    for name in ("whole", "torn"):
        (tmp_path / name).mkdir()
    expected = Bench(tmp_path / "whole", score).search()
    whole = (tmp_path / "whole" / "trials.jsonl").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        Bench(tmp_path / "torn", score, kill_at=5).search()
    path = tmp_path / "torn" / "trials.jsonl"
    path.write_bytes(whole[: path.stat().st_size + 40])  # the sixth line was on its way to the disk
    assert Bench(tmp_path / "torn", score).search() == expected
    assert path.read_bytes() == whole


def test_a_trial_that_fails_once_is_tried_again(tmp_path: Path) -> None:
    region = Region.span(0, 3, ROOT.modules)
    bench = Bench(tmp_path, lambda region: 1.0, [(region, 1)])
    result = bench.search(PAPER_LEVELS[:1])
    assert bench.ran.count(region) == 2
    assert all(t.done for t in result.trials)
    assert [t.status for t in bench.store.trials()] == ["done"] * 3


def test_a_trial_that_keeps_failing_is_recorded_and_ends_no_search(tmp_path: Path) -> None:
    region = Region.span(0, 3, ROOT.modules)
    bench = Bench(tmp_path, lambda region: -float(region.first), [(region, 99)])
    result = bench.search(PAPER_LEVELS[:2])
    assert bench.ran.count(region) == 2
    assert [t.region for t in result.trials if not t.done] == [region]
    assert result.winner.region == Region.span(2, 3, ROOT.modules)
    later = Bench(tmp_path, lambda region: -float(region.first))
    again = later.search(PAPER_LEVELS[:2])
    assert later.ran[0] == region, "a later call tries it again"
    assert again.trials[0].done and len(later.store.trials()) > len(bench.store.trials())


def test_a_kill_between_the_two_tries_leaves_one_for_the_next_call(tmp_path: Path) -> None:
    region = Region.span(0, 3, ROOT.modules)
    with pytest.raises(KeyboardInterrupt):
        Bench(tmp_path, lambda region: 1.0, [(region, 99)], kill_at=1).search(PAPER_LEVELS[:1])
    for _ in range(2):  # the second try, and then one in each later call
        bench = Bench(tmp_path, lambda region: 1.0, [(region, 99)])
        bench.search(PAPER_LEVELS[:1])
        assert bench.ran.count(region) == 1
    assert bench.ran == [region]


def test_a_level_of_which_nothing_finished_is_skipped(tmp_path: Path) -> None:
    broken = [(Region.span(a, b, ROOT.modules), 99) for a, b in HALVES]
    result = Bench(tmp_path, lambda region: float(region.first), broken).search(PAPER_LEVELS[:2])
    assert result.winner.region == Region.span(6, 7, ROOT.modules)
    assert result.winner.parent is None
    assert result.expanded[0] == ()


def test_when_nothing_finishes_the_first_reason_is_given(tmp_path: Path) -> None:
    broken = [(region, 99) for region in all_reachable()]
    with pytest.raises(UserError, match=r"not one of 7 trials finished; .* broken layers 0-3"):
        Bench(tmp_path, lambda region: 0.0, broken).search(PAPER_LEVELS[:2])


def test_a_level_without_anything_inside_keeps_the_regions_above(tmp_path: Path) -> None:
    levels = (Level(layers=("bottom1", "top")), Level(layers=("middle",)), Level(modules=(("ffn",),)))
    bench = Bench(tmp_path, lambda region: float(region.first))
    result = bench.search(levels)
    above = [Region.span(0, 1, ROOT.modules), Region.span(6, 7, ROOT.modules)]
    assert bench.ran == [*above, Region.span(6, 7, GROUPS["ffn"])]
    assert result.expanded[0] == result.expanded[1]


def test_no_child_trains_what_its_parent_does_not(tmp_path: Path) -> None:
    for beam in (1, 3):
        folder = tmp_path / str(beam)
        folder.mkdir()
        result = Bench(folder, random_score(9, 9)).search(beam=beam)
        by_id = {t.id: t for t in result.trials}
        for trial in result.trials:
            if trial.parent:
                above = by_id[trial.parent].region
                assert trial.region is not None and above is not None and trial.region.inside(above)


@pytest.mark.parametrize("seed", range(6))
def test_what_is_found_does_not_depend_on_which_trial_ends_first(tmp_path: Path, seed: int) -> None:
    score = random_score(seed, 6)
    fragile = [(Region.span(2, 5, ROOT.modules), 1)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    forwards = Bench(tmp_path / "a", score, fragile)
    expected = forwards.search(beam=2, rungs=SuccessiveHalving((15, 30)))
    bench = Bench(tmp_path / "b", score, fragile)
    bench.backwards = True
    assert bench.search(beam=2, rungs=SuccessiveHalving((15, 30))) == expected
    assert {t.id: t for t in bench.store.trials()} == {t.id: t for t in forwards.store.trials()}


def test_halving_follows_the_obvious_implementation(tmp_path: Path) -> None:
    score = random_score(11, 1000)
    bench = Bench(tmp_path, score)
    result = bench.search(PAPER_LEVELS[1:2], beam=1, rungs=SuccessiveHalving((15, 30), keep=0.5))
    order = sorted((Region.span(a, b, ROOT.modules) for a, b in QUARTERS), key=lambda r: obvious_order(r, score))
    everything = [(Region.span(a, b, ROOT.modules), 0, 15) for a, b in QUARTERS]
    assert bench.ordered == [*everything, (order[0], 15, 30), (order[1], 15, 30), (order[0], 30, 60)]
    stopped = {t.region: t for t in result.trials if t.status == "stopped"}
    assert {region: trial.steps for region, trial in stopped.items()} == {order[1]: 30, order[2]: 15, order[3]: 15}
    assert stopped[order[3]].reason == "number 4 of 4 after 15 steps, of which 2 may go on"
    assert result.winner.region == order[0] and result.winner.steps == 60 and result.runner_up is None


def test_a_stopped_trial_never_wins_even_where_its_score_is_the_highest(tmp_path: Path) -> None:
    early = {Region.span(a, b, ROOT.modules): 10.0 * n for n, (a, b) in enumerate(QUARTERS)}
    bench = Bench(tmp_path, lambda region: early[region])
    plain = bench.run_one

    def run_one(job: Job) -> Trial:
        return plain(job) if job.stop_step else replace(plain(job), unified=1.0)

    bench.run_one = run_one  # type: ignore[method-assign]
    result = bench.search(PAPER_LEVELS[1:2], rungs=SuccessiveHalving((15,)))
    assert [t.unified for t in result.trials if t.status == "stopped"] == [0.0, 10.0]
    assert result.winner.unified == 1.0, "below what was stopped at 10"
    assert result.runner_up is not None and result.runner_up.unified == 1.0


def test_what_is_worse_than_the_best_beyond_chance_is_stopped_too(tmp_path: Path) -> None:
    far, near = Estimate(-20.0, -30.0, -10.0), Estimate(-20.0, -41.0, 1.0)
    scores = {Region.span(a, b, ROOT.modules): 10.0 * n for n, (a, b) in enumerate(QUARTERS)}
    rungs = SuccessiveHalving((15,), keep=1.0)

    def run(folder: str, rungs: SuccessiveHalving, beam: int, behind: Estimate) -> list[str]:
        (tmp_path / folder).mkdir()
        bench = Bench(tmp_path / folder, scores.__getitem__)
        result = bench.search(PAPER_LEVELS[1:2], beam=beam, rungs=rungs, compare=lambda trial, best: behind)
        return [t.status for t in result.trials]

    assert run("far", rungs, 1, far) == ["stopped", "stopped", "stopped", "done"]
    assert run("beam", rungs, 3, far) == ["stopped", "done", "done", "done"], "at least beam regions go on"
    assert run("near", rungs, 1, near) == ["done"] * 4
    assert run("off", replace(rungs, early_stop=False), 1, far) == ["done"] * 4
    assert len(read_trials(tmp_path / "off" / "trials.jsonl")) == 4, "a rung where all go on is not evaluated"


def test_a_halving_search_killed_anywhere_goes_on_to_the_same_store(tmp_path: Path) -> None:
    score, rungs = random_score(5, 6), SuccessiveHalving((15, 30))
    fragile = [(Region.span(0, 3, ROOT.modules), 1), (Region.span(2, 3, ROOT.modules), 1)]
    (tmp_path / "whole").mkdir()
    whole = Bench(tmp_path / "whole", score, fragile)
    expected = whole.search(beam=2, rungs=rungs)
    lines = (tmp_path / "whole" / "trials.jsonl").read_bytes()
    assert {t.status for t in whole.store.lines()} == {"done", "paused", "stopped", "failed"}
    for kill_at in range(len(whole.ran)):
        folder = tmp_path / f"killed-{kill_at}"
        folder.mkdir()
        bench = Bench(folder, score, fragile, kill_at)
        with pytest.raises(KeyboardInterrupt):
            bench.search(beam=2, rungs=rungs)
        again = Bench(folder, score, bench.failing.items())
        assert again.search(beam=2, rungs=rungs) == expected, kill_at
        assert (folder / "trials.jsonl").read_bytes() == lines, kill_at


def test_without_halving_what_was_stopped_before_is_trained_to_its_end(tmp_path: Path) -> None:
    score = random_score(7, 1000)
    Bench(tmp_path, score).search(PAPER_LEVELS[1:2], rungs=SuccessiveHalving((15,)))
    bench = Bench(tmp_path, score)
    result = bench.search(PAPER_LEVELS[1:2])
    assert all(t.done for t in result.trials) and {begun for _, begun, _ in bench.ordered} == {0}
    later = Bench(tmp_path, score)
    again = later.search(PAPER_LEVELS[1:2], rungs=SuccessiveHalving((30,)))
    assert again == result and later.ran == [], "what is finished is not stopped"


def test_a_floor_ranks_what_misses_it_below_all_that_keep_it() -> None:
    base = Trial("base", None, "done", 0, 1, 0, 1.0, speciality=10.0, versatility=50.0, unified=30.0)

    def trial(name: str, speciality: float, versatility: float | None) -> Trial:
        region = Region.span(0, 1, ("up_proj",))
        return replace(base, id=name, region=region, speciality=speciality, versatility=versatility)

    kept, better, lost = trial("kept", 20.0, 48.0), trial("better", 30.0, 49.0), trial("lost", 90.0, 47.9)
    far, unknown = trial("far", 99.0, 10.0), trial("unknown", 99.0, None)
    objective = Objective("speciality", -2.0, base)
    order = sorted([unknown, far, kept, lost, better], key=objective.rank)
    assert [t.id for t in order] == ["better", "kept", "lost", "far", "unknown"]
    assert objective.shortfall(kept) == 0 and objective.shortfall(lost) == pytest.approx(0.1)
    mirrored = sorted([far, kept, better], key=Objective("versatility", 15.0, base).rank)
    assert [t.id for t in mirrored] == ["better", "far", "kept"], "speciality +20 and +89 keep the floor of +15"


@pytest.mark.parametrize("trials", range(1, 13))
def test_a_budget_of_trials_is_kept_and_a_larger_one_goes_on(tmp_path: Path, trials: int) -> None:
    score = random_score(8, 1000)
    for name in ("budget", "whole"):
        (tmp_path / name).mkdir()
    whole = Bench(tmp_path / "whole", score)
    expected = whole.search()
    assert len(whole.ran) > 12
    bench = Bench(tmp_path / "budget", score)
    result = bench.search(budget=Budget(trials=trials))
    assert bench.ran == whole.ran[:trials]
    assert result.winner == min(bench.store.trials(), key=Objective().rank)
    assert result.untried.reason == f"search.budget_trials: {trials}"
    left = [region for region in whole.ran[trials:] if region in result.untried.regions]
    assert list(result.untried.regions) == left == whole.ran[trials : trials + len(left)]
    assert result.untried.levels == PAPER_LEVELS[len(result.expanded) :]
    again = Bench(tmp_path / "budget", score)
    assert again.search() == expected
    assert bench.ran + again.ran == whole.ran


def test_no_trial_is_started_that_would_not_fit_the_hours(tmp_path: Path) -> None:
    score = random_score(8, 1000)
    one = STEPS + EVALUATION
    for name, room, fits in (("exact", 5 * one + 0.01, 5), ("short", 5 * one - 1, 4), ("little", 1.0, 1)):
        (tmp_path / name).mkdir()
        bench = Bench(tmp_path / name, score)
        result = bench.search(budget=Budget(hours=room / 3600))
        assert len(bench.ran) == fits, name
        assert "search.budget_hours" in str(result.untried.reason)
        later = Bench(tmp_path / name, score)
        assert later.search(budget=Budget(hours=room / 3600)) == result and later.ran == [], "what was spent counts"


def test_where_many_run_at_once_no_more_are_ordered_than_fit(tmp_path: Path) -> None:
    bench = Bench(tmp_path, random_score(8, 1000))
    batches: list[int] = []

    def run(jobs: Sequence[Job]) -> Iterator[Trial]:
        batches.append(len(jobs))
        return bench.run(jobs)

    rules = SearchSettings(STEPS, budget=Budget(hours=6.5 * (STEPS + EVALUATION) / 3600, at_once=None))
    search(ROOT, PAPER_LEVELS, rules=rules, run_jobs=run, store=bench.store, on_trial=lambda *_: None)
    assert batches == [1, 2, 2, 1], "one to learn what a trial takes, then what is left of each level, then what fits"


def test_a_budget_keeps_enough_to_finish_one_of_the_paused(tmp_path: Path) -> None:
    room = 2 * (15 + EVALUATION) + 45 + EVALUATION + 0.01  # two to the rung, and one of them to its end
    bench = Bench(tmp_path, random_score(8, 1000))
    result = bench.search(PAPER_LEVELS[1:2], rungs=SuccessiveHalving((15,)), budget=Budget(hours=room / 3600))
    assert [(begun, steps) for _, begun, steps in bench.ordered] == [(0, 15), (0, 15), (15, 60)]
    assert result.winner.done and len(result.untried.regions) == 2
    (tmp_path / "less").mkdir()
    with pytest.raises(UserError, match="ended it before one trial was trained to its end"):
        Bench(tmp_path / "less", lambda region: 1.0).search(
            rungs=SuccessiveHalving((15,)), budget=Budget(hours=1 / 3600)
        )


def test_a_budget_that_ends_between_rungs_finishes_the_best_of_the_paused(tmp_path: Path) -> None:
    score = random_score(8, 1000)
    room = 2 * (15 + EVALUATION) + 45 + EVALUATION + 0.01  # two to the first rung, and one of them past the second
    bench = Bench(tmp_path, score)
    rungs = SuccessiveHalving((15, 30), keep=1.0)
    result = bench.search(PAPER_LEVELS[1:2], rungs=rungs, budget=Budget(hours=room / 3600))
    assert [(begun, steps) for _, begun, steps in bench.ordered] == [(0, 15), (0, 15), (15, 60)]
    best, other = sorted(bench.ran[:2], key=lambda region: obvious_order(region, score))
    assert result.winner.region == best and result.winner.done
    assert other in result.untried.regions and best not in result.untried.regions
    assert len(result.untried.regions) == 3


def test_the_proxy_orders_a_level_and_prunes_it_only_where_asked(tmp_path: Path) -> None:
    score = random_score(12, 1000)
    values = zip(QUARTERS, (1.0, 3.0, 2.0, 3.0), strict=True)
    proxy_score = {Region.span(a, b, ROOT.modules): value for (a, b), value in values}
    for name in ("order", "prune"):
        (tmp_path / name).mkdir()
    bench = Bench(tmp_path / "order", score)
    result = bench.search(PAPER_LEVELS[1:2], proxy_score=proxy_score.__getitem__)
    assert [r.first for r in bench.ran] == [2, 6, 4, 0]
    assert result.winner.region == min(proxy_score, key=lambda r: obvious_order(r, score)), "whatever the proxy says"
    bench = Bench(tmp_path / "prune", score)
    result = bench.search(PAPER_LEVELS[1:2], proxy_score=proxy_score.__getitem__, keep=0.5)
    assert [r.first for r in bench.ran] == [2, 6]
    assert [r.first for r in result.untried.pruned] == [4, 0] and result.untried.reason is None
    wider = Bench(tmp_path / "prune", score).search(PAPER_LEVELS[1:2], 3, proxy_score=proxy_score.__getitem__, keep=0.5)
    assert len(wider.trials) == 3, "at least beam"


@pytest.mark.parametrize("keep", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("beam", [1, 2, 3])
def test_the_plan_bounds_what_a_pruned_search_tries_exactly_if_it_can(tmp_path: Path, beam: int, keep: float) -> None:
    planned = plan(PAPER_LEVELS, ROOT.last + 1, beam, keep=keep)
    tried = []
    for seed in range(8):
        (tmp_path / str(seed)).mkdir()
        bench = Bench(tmp_path / str(seed), random_score(seed, 1000))
        guess = random_score(100 + seed, 1000)
        result = bench.search(beam=beam, proxy_score=guess, keep=keep)
        at_level = Counter(trial.level for trial in result.trials)
        assert bench.levels == [(n, sum(at_level[m] for m in range(1, n + 1))) for n in range(1, len(planned) + 1)]
        for number, level in enumerate(planned, start=1):
            assert at_level[number] == level.most if level.exact else at_level[number] <= level.most
        tried.append(len(bench.ran))
    assert max(tried) == sum(level.most for level in planned) or beam > 1, "no looser than it must be"
