"""The table of an evaluation: what it says without colour, in a narrow terminal."""

from __future__ import annotations

import re
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from cofitune.checked import shaped
from cofitune.evaluation.metrics import METRICS
from cofitune.evaluation.samples import Sample, TaskResult
from cofitune.evaluation.statistics.comparison import Compared, build_scores
from cofitune.reports.evaluation.scores import GateVerdict, Scores
from cofitune.reports.evaluation.table import example_lines, scores_table, sentences, verdict_line

TASKS = {  # title: category, metric, items, chance
    "law": ("speciality", "exact_match", 120, 0.0),
    "openbookqa": ("gen_kn", "acc_norm", 80, 0.25),
    "arc_easy": ("gen_rs", "acc", 80, 0.25),
}


def make_scores(models: dict[str, list[float]], **compared: Any) -> dict[str, Any]:
    """scores.json for models with these shares of right answers; the first is the base."""
    results: dict[str, dict[str, TaskResult]] = {}
    for name, shares in models.items():
        results[name] = {}
        for (title, (category, metric, items, chance)), share in zip(TASKS.items(), shares, strict=True):
            right = round(share * items)
            samples = tuple(Sample(i, f"{i}?", 0, "a", None, None, int(i < right)) for i in range(items))
            results[name][title] = TaskResult(category=category, title=title, metric=METRICS[metric], chance=chance,
                                              raw=right / items, samples=samples, seconds=1.0)  # fmt: skip
    about = {
        title: {"category": category, "metric": metric, "items": items, "unit": "share"}
        for title, (category, metric, items, _) in TASKS.items()
    }
    return {"tasks": about, **build_scores(results, Compared(next(iter(models)), **compared))}


BASE_AND_RUN = {"base": [0.05, 0.55, 0.4], "run": [0.55, 0.55, 0.2]}


def render(scores: dict[str, Any], width: int = 80) -> list[str]:
    out = StringIO()
    Console(file=out, width=width, no_color=True, force_terminal=False).print(scores_table(Scores.of(scores)))
    return out.getvalue().splitlines()


def cells(lines: list[str], name: str) -> list[str]:
    """The cells of the row that begins with `name`, those that are empty left out."""
    line = next(line for line in lines if line.strip().startswith(name + " "))
    return re.split(r"\s{2,}", line.strip())


@pytest.mark.parametrize("width", [80, 100])
def test_every_figure_stands_in_its_row_without_colour(width: int) -> None:
    lines = render(make_scores(BASE_AND_RUN), width)
    assert max(map(len, lines)) <= width
    law, arc = " ".join(cells(lines, "law")), " ".join(cells(lines, "arc_easy"))
    assert re.fullmatch(r"law 120 5.0 \(0.050\) 55.0 \(0.550\) \+50.0 \+4\d.\d to \+5\d.\d", law)
    assert re.fullmatch(r"arc_easy 80 20.0 \(0.400\) −6.7 \(0.200\) −26.7 −\d\d.\d to −1\d.\d", arc)
    assert " ".join(cells(lines, "gen_kn")) == "gen_kn 40.0 40.0 0.0 −3.3 to +3.3"
    assert re.match(r"versatility 30.0 16.7 −13.3 −\d+.\d to −\d.\d", " ".join(cells(lines, "versatility")))
    assert re.match(r"unified 17.5 35.8 \+18.3 \+1\d.\d to \+2\d.\d", " ".join(cells(lines, "unified")))


def test_many_models_stand_in_columns_with_their_changes_below() -> None:
    models = BASE_AND_RUN | {"full": [0.6, 0.5, 0.1], "other": [0.5, 0.55, 0.4]}
    lines = render(make_scores(models, full_sft="full"))
    assert max(map(len, lines)) <= 80
    heads = next(line for line in lines if "items" in line).split()
    assert heads == ["task", "items", "base", "run", "full", "other"]
    row = next(i for i, line in enumerate(lines) if line.strip().startswith("law "))
    assert " ".join(cells(lines, "law")) == "law 120 5.0 55.0 +50.0 60.0 +55.0 50.0 +45.0"
    assert len(re.findall(r"\+\d+.\d to \+\d+.\d", lines[row + 1])) == 3
    assert "change against base" in lines[0]


def test_more_models_than_the_terminal_is_wide_lose_no_figure() -> None:
    models = BASE_AND_RUN | {f"m{i}": [0.5, 0.55, 0.4] for i in range(5)}
    lines = render(make_scores(models))
    assert max(map(len, lines)) <= 80 and "…" not in "".join(lines)
    assert sum(line.count("+45.0") for line in lines) == 2 * 5  # law, and speciality, of each


def test_a_cross_entropy_keeps_its_unit_and_more_of_it_is_worse() -> None:
    scores = make_scores(BASE_AND_RUN)
    scores["tasks"]["arc_easy"] |= {"unit": "nats", "higher_is_better": False}
    scores["models"]["base"]["tasks"]["arc_easy"]["raw"] = 2.125
    change = {"value": 0.0625, "low": 0.01, "high": 0.12, "within_noise": None}
    scores["comparisons"][0]["tasks"]["arc_easy"] |= change
    assert re.search(
        r"2.125 .*\+0.062 +\+0.010 to \+0.120", next(line for line in render(scores) if "arc_easy" in line)
    )
    out = StringIO()
    Console(file=out, width=80, force_terminal=True, color_system="standard").print(scores_table(Scores.of(scores)))
    assert "\x1b[31m+0.062" in out.getvalue()


def test_a_category_without_tasks_shows_no_number() -> None:
    lines = render(make_scores(BASE_AND_RUN))
    assert cells(lines, "instruct") == ["instruct", "–", "–", "–"]
    index = next(i for i, line in enumerate(lines) if "instruct " in line)
    assert "(no task)" in lines[index + 1]


def test_a_base_alone_shows_no_change() -> None:
    scores = make_scores({"base": [0.05, 0.55, 0.4]})
    assert " ".join(cells(render(scores), "law")) == "law 120 5.0 (0.050)"
    assert list(sentences(Scores.of(scores))) == ["base: speciality 5.0, versatility 30.0"]


def test_sentences_say_what_was_gained_what_it_cost_and_what_is_not_known() -> None:
    output = list(sentences(Scores.of(make_scores(BASE_AND_RUN))))
    assert output[0] == "run: speciality +50.0, versatility −13.3 (gen_kn 0.0, gen_rs −26.7)"
    assert re.fullmatch(r"run: 56 % \(\d\d to \d\d\) of versatility kept", output[1])
    assert output[2] == ("run: 16 items lost, 60 gained; changed beyond chance (McNemar, Holm, 5 %): law, arc_easy")
    assert output[3].startswith("noise between seeds: not known (it takes two runs")
    (kept,) = [
        line for line in sentences(Scores.of(make_scores(BASE_AND_RUN | {"a-b": [0.5, 0.2, 0.1]}))) if "a-b: −" in line
    ]
    assert re.fullmatch(r"a-b: −\d+ % \(−\d+ to −?\d+\) of versatility kept", kept), "a name keeps its hyphen"
    beside = list(sentences(Scores.of(make_scores(BASE_AND_RUN | {"full": [0.6, 0.54, 0.38]}, full_sft="full"))))
    assert any(line.startswith("run: – % of what full forgot is not forgotten: what 'full' forgot") for line in beside)
    assert any(re.match(r"run: 91 % \(\d+ to \d+\) of what full gained is gained", line) for line in beside)


def test_changes_within_the_noise_between_seeds_are_marked() -> None:
    models = {"base": [0.05, 0.55, 0.4], "run": [0.55, 0.55, 0.38], "again": [0.55, 0.55, 0.2]}
    scores = make_scores(models, seed_groups=(("run", "again"),))
    assert any(
        "noise between seeds (standard deviation over those of run, again;" in line
        for line in sentences(Scores.of(scores))
    )
    lines = render(scores)
    assert "−3.3~" in next(line for line in lines if "arc_easy" in line)
    assert "~" not in next(line for line in lines if "law " in line)


def test_lost_items_and_verdicts_are_told_in_one_line_each() -> None:
    item = {"task": "arc", "line": 7, "reference": 1, "choices": ["a", "four\nlegs"], "after": {"pick": 0}}
    free = {"task": "law", "line": 9, "reference": "the buyer", "after": {"answer": "no " * 40}}
    loss = {"task": "drift", "line": 2, "reference": "Paris", "before": {"score": 1.25}, "after": {"score": 2.5}}
    assert list(example_lines("run", [item, free, loss])) == [
        "run lost arc:7: right is 'four legs', now it says 'a'",
        "run lost law:9: right is 'the buyer', now it says 'no no no no no no no no no no no no no …'",
        "run lost drift:2: right is 'Paris', scored 1.250 before and 2.500 now",
    ]
    verdict = {"require": "run:versatility>=-1", "met": False, "value": -3.24, "low": -5.0, "high": -1.0}
    assert (
        verdict_line(shaped(GateVerdict, verdict)) == "NOT MET run:versatility>=-1: the change is −3.2 (−5.0 to −1.0)"
    )
