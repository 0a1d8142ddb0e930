"""One level of a search: its candidates are trained together, thinned out at the rungs, retried where they failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from cofitune.model.region import Region
from cofitune.search.budget import Budget, Part
from cofitune.search.halving import Compare, SuccessiveHalving
from cofitune.search.objective import Objective, Ranking
from cofitune.search.store import Store
from cofitune.search.trial import Trial


@dataclass(frozen=True)
class Job:
    """What is asked of whoever runs trials: train this region until a step (None: the last) and measure it there.

    Attributes:
        level, parent: the region's place in the tree; the parent is a trial's id.
        seed: of its training; None: the config's.
    """

    id: str
    region: Region
    level: int
    parent: str | None
    stop_step: int | None = None
    seed: int | None = None


RunJobs = Callable[[Sequence[Job]], Iterator[Trial]]  # each trial as it ends, in any order, also a failed one
OnTrial = Callable[[Trial, bool], None]


def _nothing_known(first: Trial, second: Trial) -> None:
    """Stands for a comparison where no item's score was kept: no trial is told from another."""


@dataclass(frozen=True)
class SearchSettings:
    """What a search goes by.

    Attributes:
        beam: regions expanded at each level.
        steps: optimizer steps of a whole trial.
        compare: paired difference of two trials that were scored at the same step, for the early stop.
        proxy_score: the proxy's opinion of a region, high is good: a level's candidates are tried in its order.
        keep: share of them that is tried at all, the most favoured first; 1: all.
    """

    steps: int
    beam: int = 1
    objective: Ranking = field(default_factory=Objective)
    rungs: SuccessiveHalving | None = None
    compare: Compare = _nothing_known
    budget: Budget = field(default_factory=Budget)
    proxy_score: Callable[[Region], float] | None = None
    keep: float = 1.0


class LevelRunner:
    """Runs the candidates of one level, and then those of the next.

    Attributes:
        ended: the limit that left no room for a part of a trial; None as long as all fitted.
        untried: regions that were not begun, or not taken on, for that reason.
    """

    def __init__(self, rules: SearchSettings, run_jobs: RunJobs, store: Store, on_trial: OnTrial) -> None:
        self._rules, self._run_jobs, self._store, self._on_trial = rules, run_jobs, store, on_trial
        self.ended: str | None = None
        self.untried: list[Region] = []

    def run(self, jobs: Sequence[Job]) -> dict[Region, Trial]:
        """What became of each candidate, in the order given; one that the budget had no room for is left out."""
        results: dict[str, Trial] = {}
        racing = list(jobs)
        for step in self._rules.rungs.steps if self._rules.rungs else ():
            racing = self._to_rung(racing, step, results)
        self._advance(racing, None, results)
        # what found no room at a rung may have gone straight to its end
        whole = {job.region for job in jobs if job.id in results and results[job.id].done}
        self.untried = [region for region in self.untried if region not in whole]
        return {job.region: results[job.id] for job in jobs if job.id in results}

    def _to_rung(self, jobs: list[Job], step: int, results: dict[str, Trial]) -> list[Job]:
        """Train all candidates to a step; stop what falls behind there, and return the others, the best first."""
        rungs, rules = self._rules.rungs, self._rules
        if rungs is None or rungs.spare_all(len(jobs), rules.beam):
            return jobs
        # what an earlier search trained to the end without this rung has its last scores for nothing
        done = [job for job in jobs if self._store.at(job.id, None) and not self._store.at(job.id, step)]
        racing = [job for job in jobs if job not in done]
        self._advance(racing, step, results)
        there = {job: trial for job in racing if (trial := self._store.at(job.id, step)) is not None}
        if self.ended and not there:
            # none of the rest may pause here, or the search would end without one whole trial: the best go to their end
            return [job for job in jobs if results.get(job.id) is None or results[job.id].scored]
        objective, compare = rules.objective, rules.compare
        reasons = rungs.prune(list(there.values()), step, beam=rules.beam, objective=objective, compare=compare)
        jobs_by_id = {job.id: job for job in there}
        going = [jobs_by_id[trial.id] for trial in objective.order(list(there.values()))]
        for job in list(going):
            if job.id in reasons and self._store.at(job.id, None) is None:
                results[job.id] = self._stop(job, there[job], reasons[job.id])
                going.remove(job)
        return done + going

    def _advance(self, jobs: Sequence[Job], stop_step: int | None, results: dict[str, Trial]) -> None:
        """Take every candidate to a step (None: the last), from the store or by running it, twice where it fails."""
        for job in jobs:
            known = self._store.at(job.id, stop_step)
            if known is not None:
                results[job.id] = replace(known, level=job.level, parent=job.parent)  # another beam came another way
                if known.done:
                    self._on_trial(results[job.id], True)
        for again in (False, True):
            missing = [job for job in jobs if self._store.at(job.id, stop_step) is None]
            requested = [job for job in missing if bool(self._store.failures(job.id)) == again]
            self._run([replace(job, stop_step=stop_step) for job in requested], results)

    def _run(self, jobs: Sequence[Job], results: dict[str, Trial]) -> None:
        """Request as many trials at once as the budget has room for, until all have ended or it has none."""
        while jobs:
            reserve = self._reserve(jobs[0].stop_step)
            count = self._rules.budget.admit([self._part(job) for job in jobs], self._store, reserve)
            if not count:
                self.ended = self._rules.budget.why_ended(self._store)
                self.untried += [job.region for job in jobs if job.region not in self.untried]
                return
            places = {job.id: job for job in jobs[:count]}
            for ended in self._run_jobs(jobs[:count]):
                job = places[ended.id]
                trial = replace(ended, level=job.level, parent=job.parent)
                self._store.append(trial)
                results[job.id] = trial
                self._on_trial(trial, False)
            jobs = jobs[count:]

    def _part(self, job: Job) -> Part:
        steps = self._rules.steps if job.stop_step is None else job.stop_step
        return Part(job.id, self._store.resume_step(job.id, steps), steps)

    def _reserve(self, stop_step: int | None) -> int:
        """Steps that must still fit after a rung, so that the search does not end without one whole trial."""
        if stop_step is None or any(trial.done and trial.region for trial in self._store.trials()):
            return 0
        return self._rules.steps - stop_step

    def _stop(self, job: Job, scored: Trial, reason: str) -> Trial:
        """Leave a trial where it is, and write that down once."""
        trial = replace(
            scored, status="stopped", reason=reason, level=job.level, parent=job.parent, seconds=0.0, parts={}
        )
        before = self._store.get(job.id)
        known = before is not None and (before.status, before.steps) == ("stopped", trial.steps)
        if not known:
            self._store.append(trial)
        self._on_trial(trial, known)
        return trial
