"""Drift in the table of the terminal and of the page: below the means, in nats, more of it is worse."""

from __future__ import annotations

from dataclasses import asdict
from io import StringIO
from typing import Any

from rich.console import Console

from cofitune.evaluation.metrics import METRICS
from cofitune.evaluation.samples import Sample, TaskResult
from cofitune.evaluation.statistics.comparison import Compared, build_scores
from cofitune.reports.evaluation.rows import ScoreRow, score_rows
from cofitune.reports.evaluation.scores import Scores
from cofitune.reports.evaluation.table import scores_table


def make_scores(drifts: dict[str, list[float]], with_drift: bool = True) -> dict[str, Any]:
    """scores.json of models that answer all the same, and have moved so far on each item."""
    results: dict[str, dict[str, TaskResult]] = {}
    metrics = {"law": METRICS["exact_match"], "drift": METRICS["drift"]}
    for name, items in drifts.items():
        own = {"law": ("speciality", [1.0, 0.0, 1.0]), "drift": ("drift", items)}
        results[name] = {}
        for title, (category, scores) in own.items():
            if title == "drift" and not with_drift:
                continue
            samples = tuple(Sample(i, f"{i}?", "a", "a", None, None, s) for i, s in enumerate(scores))
            results[name][title] = TaskResult(
                title, category, metrics[title], sum(scores) / len(scores), 0.0, samples, 1.0
            )
    about = {
        title: asdict(metrics[title]) | {"category": c, "metric": metrics[title].name, "items": 3}
        for title, c in (("law", "speciality"), ("drift", "drift"))
        if title == "law" or with_drift
    }
    return {"tasks": about, **build_scores(results, Compared("base"))}


MOVED = {"base": [-1e-9, 0.0, -1e-9], "run": [0.25, 0.5, 0.3]}


def line_of(scores: dict[str, Any], name: str) -> str:
    out = StringIO()
    Console(file=out, width=100, no_color=True).print(scores_table(Scores.of(scores)))
    return " ".join(next(line for line in out.getvalue().splitlines() if line.strip().startswith(name)).split())


def row_of(scores: dict[str, Any], name: str) -> ScoreRow:
    return next(row for row in score_rows(Scores.of(scores)) if row.name == name)


def test_the_table_shows_nats_without_a_minus_before_nothing() -> None:
    scores = make_scores(MOVED)
    assert line_of(scores, "drift  ").startswith("drift 3 0.000 0.350 +0.350 +0.")
    assert line_of(scores, "drift (nats a token)")
    nearer = make_scores({"base": [0.0] * 3, "run": [-0.25, -0.5, -0.3]})
    assert line_of(nearer, "drift  ").startswith("drift 3 0.000 −0.350 −0.350 −0.")


def test_the_page_has_it_as_its_last_row_and_calls_more_of_it_worse() -> None:
    row = score_rows(Scores.of(make_scores(MOVED)))[-1]
    assert (row.kind, row.name, row.metric, row.items) == ("task", "drift", "drift", "3")
    base, run = row.cells
    assert (base.figure, base.raw, run.figure) == ("0.000", "nats", "0.350")
    assert (run.change, run.verdict) == ("+0.350", "worse")


def test_it_enters_no_mean() -> None:
    with_it, without = make_scores(MOVED), make_scores(MOVED, with_drift=False)
    for model in MOVED:
        for key in ("categories", "versatility", "unified"):
            assert with_it["models"][model][key] == without["models"][model][key]
    assert row_of(with_it, "versatility") == row_of(without, "versatility")


def test_two_models_get_a_paired_interval_and_no_lost_items() -> None:
    drifts = MOVED | {"other": [0.26, 0.51, 0.31]}
    for comparison in make_scores(drifts)["comparisons"]:
        change = comparison["tasks"]["drift"]
        assert change["low"] <= change["value"] <= change["high"] and change["value"] > 0.3
        assert change["lost"] == change["gained"] == []
