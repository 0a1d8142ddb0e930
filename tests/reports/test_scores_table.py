"""The table before/after: what it says without colour, in a narrow terminal."""

from __future__ import annotations

import re
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from cofitune.evaluation.scores import put_together
from cofitune.reports.scores_table import scores_sentence, scores_table

TASKS = {
    "law": ("speciality", "exact_match", 120, 0.0),
    "openbookqa": ("gen_kn", "acc_norm", 80, 0.25),
    "arc_easy": ("gen_rs", "acc", 80, 0.25),
}


def make_scores(base: list[float], run: list[float] | None) -> dict[str, Any]:
    about = {
        title: {"category": c, "metric": metric, "items": items, "chance": chance}
        for title, (c, metric, items, chance) in TASKS.items()
    }

    def part(values: list[float]) -> dict[str, Any]:
        return {"tasks": {title: {"raw": v} for title, v in zip(TASKS, values, strict=True)}}

    return {"tasks": about, **put_together(about, part(base), part(run) if run else None)}


def render(scores: dict[str, Any], width: int = 80) -> list[str]:
    out = StringIO()
    Console(file=out, width=width, no_color=True, force_terminal=False).print(scores_table(scores))
    return out.getvalue().splitlines()


def cells(lines: list[str], name: str) -> list[str]:
    """The cells of the row that begins with `name`, those that are empty left out."""
    line = next(line for line in lines if line.strip().startswith(name + " "))
    return re.split(r"\s{2,}", line.strip())


@pytest.mark.parametrize("width", [80, 100])
def test_every_figure_stands_in_its_row_without_colour(width: int) -> None:
    lines = render(make_scores([0.05, 0.55, 0.4], [0.55, 0.55, 0.2]), width)
    assert max(map(len, lines)) <= width
    assert cells(lines, "law") == ["law", "exact_match", "120", "5.0 (0.050)", "55.0 (0.550)", "+50.0"]
    assert cells(lines, "arc_easy") == ["arc_easy", "acc", "80", "20.0 (0.400)", "−6.7 (0.200)", "−26.7"]
    assert cells(lines, "gen_kn")[-3:] == ["40.0", "40.0", "0.0"]
    assert cells(lines, "versatility")[-3:] == ["30.0", "16.7", "−13.3"]
    assert cells(lines, "unified")[-3:] == ["17.5", "35.8", "+18.3"]


def test_a_category_without_tasks_shows_no_number() -> None:
    lines = render(make_scores([0.05, 0.55, 0.4], [0.55, 0.55, 0.2]))
    assert cells(lines, "instruct") == ["instruct", "instructions", "–", "–", "–"]
    index = next(i for i, line in enumerate(lines) if "instruct " in line)
    assert "(no task)" in lines[index + 1]


def test_a_base_alone_shows_no_run_and_no_change() -> None:
    scores = make_scores([0.05, 0.55, 0.4], None)
    assert cells(render(scores), "law")[-3:] == ["5.0 (0.050)", "–", "–"]
    assert scores_sentence(scores) == "base: speciality 5.0, versatility 30.0"


def test_one_sentence_says_what_was_gained_and_what_it_cost() -> None:
    scores = make_scores([0.05, 0.55, 0.4], [0.55, 0.55, 0.2])
    assert scores_sentence(scores) == (
        "speciality +50.0, versatility −13.3: gen_kn 0.0, gen_rs −26.7, 56 % of versatility kept"
    )
