"""A run's files for the report: which are there, and what each section says of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from cofitune.importance_file import read_reliability
from cofitune.recipes.report.artifacts import Artifacts, made_of
from cofitune.recipes.report.training import described_trained, described_training
from cofitune.reports.compare.page import comparison
from cofitune.reports.compare.plot import methods_picture
from cofitune.reports.evaluation.findings import findings
from cofitune.reports.evaluation.items import item_groups
from cofitune.reports.evaluation.plots import deltas_picture, frontier_picture, points_of
from cofitune.reports.evaluation.rows import score_rows
from cofitune.reports.evaluation.scores import Scores
from cofitune.reports.evaluation.table import notes, verdict_line
from cofitune.reports.figure import Picture
from cofitune.reports.html import Changed, Evaluation, Run, Search, Settings
from cofitune.reports.importance.plot import importance_picture
from cofitune.reports.importance.table import reliability_text, summary
from cofitune.reports.search.plot import search_picture
from cofitune.reports.search.rows import trial_rows
from cofitune.reports.shape import Entry
from cofitune.reports.text import many
from cofitune.reports.training.loss_plot import losses_picture
from cofitune.training.peft import adapter_text

LINES = ("loss", "validation_loss", "drift")  # what a line of metrics.jsonl is about


def describe(run: Artifacts, key: str, draws: bool) -> Run:
    """The run as the page shows it.

    Args:
        key: names its sections and its drawings' parts within the page.
        draws: whether to make the pictures.

    Raises:
        ArtifactError: nothing can be made of one of its files.
    """
    steps, validations, drifts = ([line for line in run.metrics if name in line] for name in LINES)
    trained, metrics = run.path / "train" / "manifest.json", run.path / "train" / "metrics.jsonl"
    places = run.path / "search" / "tree.json", run.path / "search" / "trials.jsonl"
    searched = next((place for place in places if place.is_file()), places[0])
    estimated, scored = run.path / "importance" / "manifest.json", run.path / "eval" / "scores.json"
    compared = run.path / "compare" / "compare.json"
    return Run(
        key=key,
        name=run.name,
        facts=made_of(trained if run.manifest else estimated, lambda: _facts(run)),
        scores=made_of(scored, lambda: _scores(run.scores) if run.scores else None),
        changed=made_of(scored.with_name("changed"), lambda: _changed(run)),
        comparison=made_of(compared, lambda: comparison(run.compared) if run.compared else None),
        search=made_of(searched, lambda: _search(run.tree) if run.tree else None),
        importance=made_of(estimated, lambda: _importance(run)),
        training=made_of(metrics, lambda: described_training(run.manifest, steps, validations, drifts)),
        trained=made_of(trained, lambda: described_trained(run.manifest) if run.manifest else None),
        settings=_settings(run.configs),
        pictures=_pictures(run, steps, validations, drifts) if draws else {},
        absent=made_of(metrics, lambda: list(_absent(run, steps))),
    )


def _pictures(
    run: Artifacts, steps: Sequence[Entry], validations: Sequence[Entry], drifts: Sequence[Entry]
) -> dict[str, Picture]:
    """The run's plots by their names."""
    scored, pictures = run.path / "eval" / "scores.json", {}
    if run.scores:
        points, weight = made_of(scored, partial(points_of, run.scores)), run.scores.speciality_weight
        if len(points) > 1:
            pictures["frontier"] = made_of(scored, partial(frontier_picture, "frontier", points, weight))
        if run.scores.comparisons:
            pictures["deltas"] = made_of(scored, partial(deltas_picture, "deltas", run.scores))
    if run.compared and run.compared.points:
        file = run.path / "compare" / "compare.json"
        pictures["methods"] = made_of(file, partial(methods_picture, "methods", run.compared))
    if run.tree and run.tree["trials"]:
        pictures["search"] = made_of(run.path / "search", partial(search_picture, "search", run.tree))
    if run.vectors:
        file = run.path / "importance" / "importance.safetensors"
        reliable = read_reliability(run.importance or {})
        pictures["importance"] = made_of(
            file, partial(importance_picture, "importance", run.vectors, reliable=reliable)
        )
    if steps:
        file = run.path / "train" / "metrics.jsonl"
        pictures["losses"] = made_of(file, partial(losses_picture, "losses", steps, validations, drifts))
    return pictures


def _changed(run: Artifacts) -> list[Changed]:
    return [Changed(m, item_groups(p["lost"]), item_groups(p["gained"])) for m, p in run.changed.items()]


def _search(tree: Entry) -> Search:
    return Search(trial_rows(tree["base"], tree["trials"], tree.get("winner")), _search_words(tree))


def _scores(scores: Scores) -> Evaluation:
    output = list(notes(scores))
    if scores.missing:
        output.append(f"no task, and so in no mean: {', '.join(scores.missing)}")
    left_out = {title: len(task.left_out) for title, task in scores.tasks.items() if task.left_out}
    if left_out:
        output.append("left out of every model alike: " + ", ".join(f"{n} items of {t}" for t, n in left_out.items()))
    verdicts = [verdict_line(verdict) for verdict in scores.gate]
    return Evaluation(list(scores.models), findings(scores), score_rows(scores), output, verdicts)


def _search_words(tree: Entry) -> str:
    """All that the search says of its end, or its reason alone where it keeps no more."""
    return " ".join(tree.get("sentences") or [tree.get("reason") or ""])


def _importance(run: Artifacts) -> str:
    if run.vectors is None or run.importance is None:
        return ""
    made = run.importance
    how = ", ".join(str(made[name]) for name in ("estimator", "reduce", "normalize") if made.get(name))
    known = "reliability" in made
    reliable = f" {reliability_text(read_reliability(made), made.get('estimator'))}" if known else ""
    return (
        f"Estimated over {made['items']:,} items, {made['tokens']:,} tokens ({how}). {summary(run.vectors)}{reliable}"
    )


def _facts(run: Artifacts) -> list[tuple[str, str]]:
    """What the run is, in a few lines."""
    facts = []
    if made := run.manifest or run.importance:
        facts.append(("base model", str(made["base"])))
    elif run.compared:
        facts.append(("base model", str(run.compared.config["model"]["name"])))
    elif run.scores:
        facts.append(("base model", run.scores.models[run.scores.base].path))
    if made := run.manifest:
        region, mask = made["region"], made["softmask"]
        share = 100 * region["trained_weights"] / region["all_weights"]
        what = region["match"] or f"layers {region['layers']} × {', '.join(region['modules'])}"
        if adapter := made.get("adapter"):
            what = f"adapter {adapter_text(adapter)}"
        held = ", without a mask"
        if mask["apply_to"] != "none":
            control = "" if mask.get("control", "none") == "none" else f" (its control: {mask['control']})"
            held = f", under a soft mask on the {mask['apply_to']}{control}"
        facts += [
            ("trained", f"{what}: {region['trained_weights']:,} weights, {share:.1f} % of all{held}"),
            *_rehearsal(made.get("rehearsal")),
            (
                "steps",
                f"{made['steps']:,}, {made['tokens']:,} tokens, seed {made['seed']}, {many(made['ranks'], 'rank')}",
            ),
        ]
    return facts


def _rehearsal(made: Entry | None) -> list[tuple[str, str]]:
    """What was rehearsed, where anything was."""
    if not made or "loss" not in made:
        return []
    message = (
        f"{made['items']:,} of the base's own answers, {100 * made['share']:g} % of each step, loss {made['loss']}"
    )
    return [("rehearsal", message if made["weight"] == 1 else f"{message}, weight {made['weight']:g}")]


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
    elif not run.scores.comparisons:
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
