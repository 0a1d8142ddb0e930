"""From what the search wants tried to requests, and from what a request left in its folder to a line of the store."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cofitune.errors import UserError
from cofitune.files import read_json
from cofitune.model.region import Region
from cofitune.recipes.search.plan import SearchPlan
from cofitune.recipes.search.trial_config import trial_config, trial_rate
from cofitune.recipes.trial.executor import TrialExecutor, TrialRequest, TrialResult
from cofitune.search.item_scores import Difference, KeptAnswers, difference
from cofitune.search.level import Job
from cofitune.search.store import Store
from cofitune.search.trial import BASE, Trial, TrialError
from cofitune.training.checkpoint_folders import remove_checkpoints

WITH_INTERVALS = ("speciality", "versatility", "unified")


class Trials:
    """Runs the trials of one search, and keeps what each of them scored on every item.

    Attributes:
        store: where they are written down.
    """

    def __init__(self, plan: SearchPlan, store: Store, execute: TrialExecutor) -> None:
        self._plan, self.store, self._execute = plan, store, execute
        self._answers = KeptAnswers(plan.folder / "items")

    @property
    def knows_base(self) -> bool:
        """Whether the base was scored before."""
        return self.store.at(BASE, None) is not None

    def score_base(self) -> Trial:
        """Score the untouched model once; every trial is shown against it.

        Raises:
            UserError: that failed.
        """
        known = self.store.at(BASE, None)
        if known is not None:
            return known
        folder = self._folder(BASE)
        shutil.rmtree(folder, ignore_errors=True)
        request = TrialRequest(BASE, trial_config(self._plan, None, folder), folder, train=False)
        (result,) = self._execute([request])
        base = self._trial(result, None, 0)
        self.store.append(base)
        self.drop_weights(BASE)
        if not base.done:
            raise UserError(f"search: the base could not be scored, so no trial was started: {base.reason}")
        return base

    def run(self, jobs: Sequence[Job]) -> Iterator[Trial]:
        """Run the jobs and yield each trial as it ends, failed ones too."""
        requests = {job.id: self._request(job) for job in jobs}
        begun = {job.id: self.store.resume_step(job.id, job.stop_step or self._steps) for job in jobs}
        regions = {job.id: job.region for job in jobs}
        for result in self._execute(list(requests.values())):
            yield self._trial(result, regions[result.request.id], begun[result.request.id])

    def compare(self, first: Trial, second: Trial) -> Difference | None:
        """The deciding score of the first minus that of the second, paired; None where items' scores are missing."""
        return self.difference(self._plan.config.search.objective, first, second)

    def difference(self, score: str, first: Trial, second: Trial) -> Difference | None:
        """A score of the first trial minus that of the second, each at the step that it has its scores from."""
        own, other = (self._answers.get(trial.id, trial.steps) for trial in (first, second))
        return difference(score, own, other, self._plan.measure.tasks.speciality_weight)

    def drop_weights(self, trial: str) -> None:
        """Free the disk of a trial that goes no further: its scores are what the search is for.

        The store must know of it already: one that it calls paused continues from what lies here.
        """
        folder = self._folder(trial)
        remove_checkpoints(folder / "train" / "checkpoints")
        for file in folder.rglob("*.safetensors"):
            file.unlink(missing_ok=True)

    @property
    def _steps(self) -> int:
        return self._plan.config.search.train_steps

    def _folder(self, trial: str) -> Path:
        return self._plan.folder / "trials" / trial

    def _request(self, job: Job) -> TrialRequest:
        """Make the trial's folder ready: empty, unless it continues where it paused, and with the base's answers."""
        folder = self._folder(job.id)
        if not self.store.resume_step(job.id, job.stop_step or self._steps):
            shutil.rmtree(folder, ignore_errors=True)  # what a killed or failed attempt left
        answers = self._folder(BASE) / "eval" / "cache"
        if answers.is_dir() and not (folder / "eval" / "cache").exists():
            shutil.copytree(answers, folder / "eval" / "cache")
        config = trial_config(self._plan, job.region, folder, job.seed)
        return TrialRequest(job.id, config, folder, stop_step=job.stop_step)

    def _trial(self, result: TrialResult, region: Region | None, start_step: int) -> Trial:
        """What became of a request. What a part left is read, and its items' scores kept, before it is written down."""
        request = result.request
        steps = 0 if region is None else request.stop_step or self._steps
        ended: dict[str, Any]
        try:
            if result.error is not None:
                raise TrialError(result.error)
            ended = {"status": "done" if request.stop_step is None else "paused", **self._figures(result, steps)}
        except (TrialError, UserError, OSError) as error:
            ended = {"status": "failed", "reason": str(error) or type(error).__name__}
        return Trial(
            id=request.id,
            region=region,
            level=0,  # its place in the tree is the search's to say
            seed=request.config.train.seed,
            num_trained=region.num_parameters(self._plan.anatomy) if region else 0,
            steps=steps,
            start_step=start_step,
            learning_rate=trial_rate(self._plan, region) if region else None,
            seconds=round(sum(result.seconds.values()), 1),
            parts={name: round(seconds, 2) for name, seconds in result.seconds.items()},
            train_loss=_last_loss(request.folder / "train" / "metrics.jsonl"),
            **ended,
        )

    def _figures(self, result: TrialResult, steps: int) -> dict[str, object]:
        """What a request that ended well was measured at.

        Raises:
            TrialError: it left no scores, or no curve.
            UserError: a file that it left is damaged.
        """
        request = result.request
        if self._plan.measure.kind == "loss":
            if not result.curve or result.curve[-1].steps != steps:
                raise TrialError(f"it was not measured after {steps} steps")
            return {"curve": result.curve, "margins": result.margins}
        model = "run" if request.train else BASE
        scores = _read_scores(request.folder, model)
        self._answers.keep(request.id, steps, request.folder / "eval" / "samples" / model)
        return scores


def _read_scores(folder: Path, model: str) -> dict[str, Any]:
    """Read the scores of `base` or `run`: speciality, versatility, unified, versatility's parts, and intervals.

    Raises:
        ArtifactError: the evaluation left no scores.
        TrialError: it left scores that cannot be ranked.
    """
    path = folder / "eval" / "scores.json"
    content = read_json(path, "evaluation")
    scores = content.get("models", {}).get(model)
    if not isinstance(scores, dict):
        raise TrialError(f"{path}: holds no scores of '{model}'")
    categories = {name: _number(value) for name, value in (scores.get("categories") or {}).items()}
    unified = _number(scores.get("unified"))
    if unified is None:
        raise TrialError(f"{path}: the unified score of '{model}' is no number, so the region cannot be ranked")
    return {
        "speciality": categories.pop("speciality", None),
        "versatility": _number(scores.get("versatility")),
        "unified": unified,
        "categories": categories,
        "intervals": _read_intervals(content, model),
    }


def _read_intervals(content: dict[str, Any], model: str) -> dict[str, tuple[float, float]]:
    """The ends of the intervals of the model's changes against the base, where the evaluation has them."""
    compared = (c for c in content.get("comparisons", ()) if (c["model"], c["against"]) == (model, BASE))
    summary: dict[str, Any] = next((c["summary"] for c in compared), {})
    return {n: (summary[n]["low"], summary[n]["high"]) for n in WITH_INTERVALS if summary.get(n)}


def _number(value: object) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def _last_loss(path: Path) -> float | None:
    """The loss of the last optimizer step, in nats a token."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return _number(next(json.loads(line)["loss"] for line in reversed(lines) if '"loss"' in line))
    except (OSError, ValueError, KeyError, TypeError, StopIteration, RecursionError):
        return None  # it is a courtesy to the reader, and no trial fails for the want of it
