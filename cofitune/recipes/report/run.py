"""A run's files for the report: which are there, and what each section says of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cofitune.errors import ArtifactError
from cofitune.evaluation.statistics.scores import FORMAT
from cofitune.files import read_json, read_tensors
from cofitune.recipes.report.training import described_trained, described_training
from cofitune.reports.compare import page as compare_view
from cofitune.reports.evaluation.findings import findings
from cofitune.reports.evaluation.items import item_groups
from cofitune.reports.evaluation.plots import deltas_picture, frontier_picture, points_of
from cofitune.reports.evaluation.rows import score_rows
from cofitune.reports.evaluation.table import notes, verdict_line
from cofitune.reports.figure import Picture
from cofitune.reports.html import Changed, Run, Scores, Search, Settings
from cofitune.reports.importance.map import importance_picture
from cofitune.reports.importance.table import summary
from cofitune.reports.search.rows import search_picture, trial_rows
from cofitune.reports.training.loss_plot import losses_picture
from cofitune.search.store import read_trials
from cofitune.search.trial import BASE

Entry = Mapping[str, Any]
COMMANDS = ("search", "importance", "rehearsal", "train", "eval", "compare")


@dataclass(frozen=True)
class Artifacts:
    """What lies in a run's folder, as it was read; None or empty where it is not there.

    Attributes:
        metrics: the lines of train/metrics.jsonl.
        changed: model → `lost` and `gained` → the items.
        tree: the content of search/tree.json, or what trials.jsonl says of a search that has not ended.
        vectors: importance, each unit kind → [L, units].
        configs: command → the text of its config.yaml.
    """

    path: Path
    name: str
    scores: dict[str, Any] | None = None
    compared: dict[str, Any] | None = None
    changed: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    tree: dict[str, Any] | None = None
    vectors: dict[str, Any] | None = None
    importance: dict[str, Any] | None = None
    manifest: dict[str, Any] | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    configs: dict[str, str] = field(default_factory=dict)


def read_artifacts(path: Path, name: str) -> Artifacts:
    """Read all that a run has.

    Raises:
        ArtifactError: a file is damaged, or was written by another version in a form that we do not read.
    """
    scores = _json(path / "eval" / "scores.json", "evaluation", FORMAT)
    vectors = None
    if importance := _json(path / "importance" / "manifest.json", "importance manifest"):
        vectors = read_tensors(path / "importance" / "importance.safetensors", "importance file")
    texts = {command: path / command / "config.yaml" for command in COMMANDS}
    return Artifacts(
        path=path,
        name=name,
        scores=scores,
        compared=_json(path / "compare" / "compare.json", "comparison", compare_view.FORMAT),
        changed=_read_changed(path, scores),
        tree=_json(path / "search" / "tree.json", "search tree") or _unfinished_search(path / "search"),
        vectors=vectors,
        importance=importance,
        manifest=_json(path / "train" / "manifest.json", "training manifest"),
        metrics=read_lines(path / "train" / "metrics.jsonl", may_be_torn=True),
        configs={c: file.read_text(encoding="utf-8") for c, file in texts.items() if file.is_file()},
    )


def describe(run: Artifacts, key: str, draws: bool) -> Run:
    """The run as the page shows it.

    Args:
        key: names its sections and its drawings' parts within the page.
        draws: whether to make the pictures.
    """
    steps = [line for line in run.metrics if "loss" in line]
    validations = [line for line in run.metrics if "validation_loss" in line]
    drifts = [line for line in run.metrics if "drift" in line]
    rows = trial_rows(run.tree["base"], run.tree["trials"], run.tree.get("winner")) if run.tree else []
    pictures: dict[str, Picture] = {}
    if draws:
        if run.scores:
            points = points_of(run.scores)
            if len(points) > 1:
                pictures["frontier"] = frontier_picture("frontier", points, run.scores["speciality_weight"])
            if run.scores["comparisons"]:
                pictures["deltas"] = deltas_picture("deltas", run.scores)
        if run.compared and run.compared["points"]:
            pictures["methods"] = compare_view.methods_picture("methods", run.compared)
        if len(rows) > 1:
            pictures["search"] = search_picture("search", rows)
        if run.vectors:
            pictures["importance"] = importance_picture("importance", run.vectors)
        if steps:
            pictures["losses"] = losses_picture("losses", steps, validations, drifts)
    return Run(
        key=key,
        name=run.name,
        facts=_facts(run),
        scores=_scores(run.scores) if run.scores else None,
        changed=[Changed(m, item_groups(p["lost"]), item_groups(p["gained"])) for m, p in run.changed.items()],
        comparison=compare_view.comparison(run.compared) if run.compared else None,
        search=Search(rows, _search_words(run.tree)) if run.tree else None,
        importance=_importance(run),
        training=described_training(run.manifest, steps, validations, drifts),
        trained=described_trained(run.manifest) if run.manifest else None,
        settings=_settings(run.configs),
        pictures=pictures,
        absent=list(_absent(run, steps)),
    )


def read_lines(path: Path, may_be_torn: bool = False) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line; none where there is no file.

    Args:
        may_be_torn: a last line without its line break was cut off by a kill, and is left out.

    Raises:
        ArtifactError: a line is damaged (file:line).
    """
    if not path.is_file():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    if last and not may_be_torn:
        lines.append(last)
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ArtifactError(f"{path}:{number}: this line is damaged: {error}") from None
        if not isinstance(value, dict):
            raise ArtifactError(f"{path}:{number}: this line is damaged: it is no JSON object")
        found.append(value)
    return found


def _json(path: Path, what: str, form: int | None = None) -> dict[str, Any] | None:
    """Read one of ours, where it is there; `form`: its format, where it says one."""
    if not path.is_file():
        return None
    value = read_json(path, what)
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: this {what} is damaged: it is no JSON object")
    if form is not None and value.get("format") != form:
        raise ArtifactError(
            f"{path}: its format is {value.get('format')}, and {form} is what we read; make it again with the command "
            f"that made it (`cofitune {path.parent.name}`), which asks no model anew"
        )
    return value


def _read_changed(path: Path, scores: Entry | None) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The lost and gained items of each model, in the order of the table."""
    if scores is None:
        return {}
    folders = {model: path / "eval" / "changed" / model for model in scores["models"]}
    return {
        model: {part: read_lines(folder / f"{part}.jsonl") for part in ("lost", "gained")}
        for model, folder in folders.items()
        if folder.is_dir()
    }


def _unfinished_search(folder: Path) -> dict[str, Any] | None:
    """A search that has not ended, as far as its store goes; None without one, or before its base is scored."""
    trials = {trial.id: json.loads(trial.to_json()) for trial in read_trials(folder / "trials.jsonl")}
    base = trials.pop(BASE, None)
    if base is None:
        return None
    reason = f"The search has not ended: {len(trials)} trials so far, and no winner."
    return {"base": base, "trials": list(trials.values()), "reason": reason}


def _scores(scores: Entry) -> Scores:
    said = list(notes(scores))
    if scores["missing"]:
        said.append(f"no task, and so in no mean: {', '.join(scores['missing'])}")
    left_out = {title: len(about["left_out"]) for title, about in scores["tasks"].items() if about.get("left_out")}
    if left_out:
        said.append("left out of every model alike: " + ", ".join(f"{n} items of {t}" for t, n in left_out.items()))
    verdicts = [verdict_line(v) for v in scores.get("gate", ())]
    return Scores(list(scores["models"]), findings(scores), score_rows(scores), said, verdicts)


def _search_words(tree: Entry) -> str:
    """All that the search says of its end, or its reason alone where it keeps no more."""
    return " ".join(tree.get("sentences") or [tree.get("reason") or ""])


def _importance(run: Artifacts) -> str:
    if run.vectors is None or run.importance is None:
        return ""
    made = run.importance
    how = ", ".join(str(made[name]) for name in ("estimator", "reduce", "normalize") if made.get(name))
    return f"Estimated over {made['items']:,} items, {made['tokens']:,} tokens ({how}). {summary(run.vectors)}"


def _facts(run: Artifacts) -> list[tuple[str, str]]:
    """What the run is, in a few lines."""
    facts = []
    if made := run.manifest or run.importance:
        facts.append(("base model", str(made["base"])))
    elif run.compared:
        facts.append(("base model", str(run.compared["config"]["model"]["name"])))
    elif run.scores:
        facts.append(("base model", str(next(iter(run.scores["models"].values())).get("path", "not known"))))
    if made := run.manifest:
        region, mask = made["region"], made["softmask"]
        share = 100 * region["trained_weights"] / region["all_weights"]
        what = region["match"] or f"layers {region['layers']} × {', '.join(region['modules'])}"
        if adapter := made.get("adapter"):
            what = f"adapter {', '.join(f'{k} {v}' for k, v in adapter.items() if isinstance(v, str | int | float))}"
        held = ", without a mask"
        if mask["apply_to"] != "none":
            control = "" if mask.get("control", "none") == "none" else f" (its control: {mask['control']})"
            held = f", under a soft mask on the {mask['apply_to']}{control}"
        facts += [
            ("trained", f"{what}: {region['trained_weights']:,} weights, {share:.1f} % of all{held}"),
            *_rehearsal(made.get("rehearsal")),
            (
                "steps",
                f"{made['steps']:,}, {made['tokens']:,} tokens, seed {made['seed']}, {_many(made['ranks'], 'rank')}",
            ),
        ]
    return facts


def _rehearsal(made: Entry | None) -> list[tuple[str, str]]:
    """What was rehearsed, where anything was."""
    if not made or "loss" not in made:
        return []
    told = f"{made['items']:,} of the base's own answers, {100 * made['share']:g} % of each step, loss {made['loss']}"
    return [("rehearsal", told if made["weight"] == 1 else f"{told}, weight {made['weight']:g}")]


def _settings(configs: Mapping[str, str]) -> list[Settings]:
    """The configs of the commands; those that are equal, versions and git state included, once."""
    by_text: dict[str, list[str]] = {}
    for command, text in configs.items():
        by_text.setdefault(text, []).append(command)
    return [Settings(commands, *_split_config(text)) for text, commands in by_text.items()]


def _split_config(text: str) -> tuple[Sequence[str], str]:
    """What stands above a config as comments, and the config."""
    lines = text.splitlines()
    head = next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return [line.lstrip("# ") for line in lines[:head]], "\n".join(lines[head:])


def _absent(run: Artifacts, steps: Sequence[Entry]) -> Iterable[str]:
    """What is not in this report because it is not in the run; a comparison's runs lie below it, in `compare`."""
    if run.compared is not None and run.scores is None and not steps:
        return
    if run.scores is None:
        yield "Not evaluated: `cofitune eval` has left no scores here, so what was learnt and forgotten is not known."
    elif not run.scores["comparisons"]:
        yield "Only the base was scored: there is no other model to compare it with."
    if run.manifest is None:
        yield (
            f"The training has not ended: it stands at step {steps[-1]['step']:,}, and nothing is proved frozen yet."
            if steps
            else "Not trained: `cofitune train` has left nothing here."
        )
    if run.tree is None:
        yield "No search: the region was not chosen by `cofitune search` here."
    if run.vectors is None:
        yield "No importance: `cofitune importance` has left none here."


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
