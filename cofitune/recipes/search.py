"""`cofitune search`: try regions level by level, each by a short training and a small evaluation; write the winner."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from cofitune.config.schema import Config
from cofitune.errors import UserError
from cofitune.files import exclusive, read_json, write_json
from cofitune.model.region import Region
from cofitune.recipes.folders import start_folder
from cofitune.recipes.search_plan import Plan, make_plan, trial_config
from cofitune.reports.search_tree import PlanRow, Row, plan_report, progress_line, search_report, winner_sentence
from cofitune.search import tree
from cofitune.search.store import Store, open_store
from cofitune.search.trial import BASE, Trial, TrialError
from cofitune.search.winner import write_winner


class StartTrial(Protocol):
    """How a trial is run: in processes of its own, since starting ranks belongs to the launcher above."""

    def __call__(self, config: Config, folder: Path, *, train: bool) -> None:
        """Train and evaluate what `config` says, below its output_dir, which is `folder`.

        With `train` it trains into `<folder>/train` (`metrics.jsonl`, `delta.safetensors`) and scores the result as
        `run` of `<folder>/eval/scores.json`; without, it only scores the base, as `base` there. The base's answers are
        handed on to each trial in `<folder>/eval/cache`, where `evaluate` finds them and scores the run only.

        Raises:
            TrialError: it failed; the search records the reason and goes on. A UserError or OSError counts as that too.
        """


def search(
    config: Config,
    *,
    start_trial: StartTrial,
    overwrite: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
    ranks: int = 1,
) -> Path:
    """Search for the region to train and write it into `<output_dir>/search/region.yaml`.

    Every finished trial is kept: a call that was killed goes on where it was, and one that was finished only prints.

    Args:
        config: reads its sections model, data, train, deepspeed, eval and search.
        start_trial: runs one trial.
        overwrite: forget all trials and begin anew.
        dry_run: print the levels and what they cost, and write nothing.
        console: where to talk; default: the terminal.
        ranks: on how many ranks `start_trial` trains. The batch grows with them, so trials on another number of ranks
            are not comparable, and a store of such trials is refused.

    Returns:
        The folder with `trials.jsonl`, `tree.json` and `region.yaml`.

    Raises:
        UserError: anything that the user can mend, found before the first trial; or not one trial finished.
    """
    console = console or Console()
    made = make_plan(config, overwrite, dry_run, ranks)
    if config.search.eval is None:
        note = "search.eval is not given: regions are chosen on eval's own items, which flatters a later `eval` on them"
        console.print(f"note: {note}", markup=False)
    if dry_run:
        console.print(_plan_report(made, config, overwrite))
        for text in made.missing:
            console.print(f"still missing: {text}", markup=False, soft_wrap=True)
        return made.folder
    with exclusive(made.folder, "search"):
        start_folder(config, "search", overwrite)
        store = open_store(made.folder, made.identity)
        base = _score_base(config, made, store, start_trial, console)
        found = tree.search(
            made.root,
            made.levels,
            beam=config.search.beam,
            run_trial=_runner(config, made, store, start_trial),
            store=store,
            on_trial=_teller(base, made.at_most, console),
        )
        rows = [_row(trial) for trial in found.trials]
        runner_up = found.runner_up.id if found.runner_up else None
        reason = winner_sentence(_row(base), rows, found.winner.id, runner_up)
        _write_tree(made, base, found, reason)
        path = write_winner(made.folder, found.winner, reason, made.identity["model"]["fingerprint"])
    console.print(search_report(_row(base), rows, found.winner.id, runner_up), crop=False)
    console.print(f"{path}: `region: search` in this config trains it", markup=False, soft_wrap=True)
    return made.folder


def _runner(config: Config, made: Plan, store: Store, start_trial: StartTrial) -> Callable[[Region | None, int], Trial]:
    """Return what runs one trial (of the base: without training) and turns its files into a line of the store."""

    def run(region: Region | None, level: int) -> Trial:
        name = store.id_of(region)
        folder = made.folder / "trials" / name
        shutil.rmtree(folder, ignore_errors=True)  # what a killed attempt left
        if region is not None:
            _hand_on_base(made.folder / "trials" / BASE, folder)
        started = time.perf_counter()
        outcome: dict[str, Any]
        try:
            start_trial(trial_config(config, region, made.tasks, folder), folder, train=region is not None)
            outcome = {"status": "done", **_read_scores(folder, BASE if region is None else "run")}
        except (TrialError, UserError, OSError) as error:
            outcome = {"status": "failed", "reason": str(error) or type(error).__name__}
        finally:
            _free_disk(folder)
        return Trial(
            id=name,
            region=region,
            level=level,
            seed=config.train.seed,
            num_trained=region.num_parameters(made.anatomy) if region else 0,
            seconds=round(time.perf_counter() - started, 1),
            train_loss=_last_loss(folder / "train" / "metrics.jsonl"),
            **outcome,
        )

    return run


def _score_base(config: Config, made: Plan, store: Store, start_trial: StartTrial, console: Console) -> Trial:
    """Score the untouched model once; every trial is shown against it."""
    known = store.get(BASE)
    if known is not None and known.done:
        return known
    console.print("scoring the base, which trains nothing", markup=False)
    base = _runner(config, made, store, start_trial)(None, 0)
    store.append(base)
    if not base.done:
        raise UserError(f"search: the base could not be scored, so no trial was started: {base.reason}")
    return base


def _hand_on_base(base: Path, folder: Path) -> None:
    """Give a trial the base's answers, so that it need not score the base again."""
    if (base / "eval" / "cache").is_dir():
        shutil.copytree(base / "eval" / "cache", folder / "eval" / "cache")


def _read_scores(folder: Path, model: str) -> dict[str, Any]:
    """Read the scores of `base` or `run`: speciality, versatility, unified, and versatility's parts.

    Raises:
        ArtifactError: the evaluation left no scores.
        TrialError: it left scores that cannot be ranked.
    """
    path = folder / "eval" / "scores.json"
    content = read_json(path, "evaluation")
    scores = content.get("models", {}).get(model) if isinstance(content, dict) else None
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
    }


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def _last_loss(path: Path) -> float | None:
    """The loss of the last optimizer step, in nats a token."""
    try:
        *_, last = path.read_text(encoding="utf-8").splitlines()
        return _number(json.loads(last)["loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it is a courtesy to the reader, and no trial fails for the want of it


def _free_disk(folder: Path) -> None:
    """Drop a trial's weights: its scores are what the search is for, and the winner is trained anew."""
    for file in folder.rglob("*.safetensors"):
        file.unlink(missing_ok=True)


def _teller(base: Trial, at_most: int, console: Console) -> tree.OnTrial:
    ended: set[str] = set()

    def tell(trial: Trial, known: bool) -> None:
        ended.add(trial.id)
        line = progress_line(_row(trial), _row(base), len(ended), at_most, known)
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    return tell


def _row(trial: Trial) -> Row:
    return Row(
        id=trial.id,
        parent=trial.parent,
        region=trial.region,
        level=trial.level,
        num_trained=trial.num_trained,
        speciality=trial.speciality,
        versatility=trial.versatility,
        unified=trial.unified,
        seconds=trial.seconds,
        reason=None if trial.done else trial.reason or "no reason was given",
    )


def _write_tree(made: Plan, base: Trial, found: tree.Found, reason: str) -> None:
    content = {
        "winner": found.winner.id,
        "runner_up": found.runner_up.id if found.runner_up else None,
        "reason": reason,
        "levels": [
            {"tries": str(level), "expanded": list(ids)} for level, ids in zip(made.levels, found.expanded, strict=True)
        ],
        "base": json.loads(base.to_json()),
        "trials": [json.loads(trial.to_json()) for trial in found.trials],
        "identity": made.identity,
    }
    write_json(made.folder / "tree.json", content)


def _plan_report(made: Plan, config: Config, overwrite: bool) -> Any:
    num_done = 0
    if made.has_store and not overwrite and not made.missing:
        finished = open_store(made.folder, made.identity).trials()
        num_done = sum(trial.done and trial.region is not None for trial in finished)
    rows = [PlanRow(str(p.level), p.candidates, p.most, p.exact) for p in made.planned]
    return plan_report(rows, config.search.train_steps, num_done)
