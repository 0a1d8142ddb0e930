"""A comparison in words: what is matched, what is not and why, and that nothing is claimed which intervals do not."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cofitune.reports.compare.content import Comparison
from cofitune.reports.compare.page import _points
from cofitune.reports.compare.plot import methods_picture
from cofitune.reports.compare.table import comparison_tables, sentences
from cofitune.reports.figure import write_picture

SCORES = {"speciality": 40.0, "versatility": 20.0, "gen_kn": 25.0, "gen_rs": None, "instruct": 15.0}


def difference(value: float, low: float | None, high: float | None) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "draws_inside": 0.6 if low is None else 1.0}


@pytest.fixture
def content() -> dict[str, Any]:
    """Two methods; one of them does not reach what the other learnt."""
    row = {"reason": None, "between": ["m", "m"], "versatility": 25.0, "instruct": 12.0}
    against = {
        "versatility_against_reference": difference(5.04, 0.1, 9.0),
        "instruct_against_reference": difference(-3.0, None, None),
    }
    full = {"reason": None, "between": ["f", "f"], "versatility": 20.0, "instruct": 15.0}
    short = {
        "reason": "mask reaches a speciality of 30.0 at most",
        "between": None,
        "versatility": None,
        "instruct": None,
    }
    about = {"alpha": 1.0, "learning_rate": 1e-4, "seeds": 1, "scores": SCORES, "on_frontier": True}
    return {
        "reference": "full",
        "partial": None,
        "methods": {"full": {}, "mask": {}},
        "seeds": [1],
        "base": SCORES | {"speciality": 5.0, "versatility": 30.0},
        "points": [about | {"id": "f", "method": "full"}, about | {"id": "m", "method": "mask", "on_frontier": False}],
        "frontiers": {"full": ["base", "f"], "mask": ["base"]},
        "matched": [
            {"speciality": 30.0, "point": "m", "why": "why not", "rows": {"full": full, "mask": row | against}},
            {"speciality": 40.0, "point": "f", "why": "a point", "rows": {"full": full, "mask": short}},
        ],
        "runs": [],
    }


def printed(content: dict[str, Any], width: int = 120) -> str:
    out = StringIO()
    console = Console(file=out, width=width, no_color=True)
    for table in comparison_tables(Comparison.of(content)):
        console.print(table)
    return out.getvalue()


def test_the_tables_hold_every_figure_and_null_where_there_is_none(content: dict[str, Any]) -> None:
    output = printed(content)
    assert "at a speciality of 30.0 (m: why not)" in output and "to full, 95 %" in output
    rows = [" ".join(line.split()) for line in output.splitlines()]
    assert "mask 25.0 +5.0 (+0.1 to +9.0) 12.0 −3.0 (no interval; 60 % inside)" in rows
    assert "mask – –" in rows and "full 20.0 15.0" in rows
    assert "mask 0.0001 1 · 40.0 20.0 25.0 – 15.0" in rows and "full 0.0001 1 ● 40.0 20.0 25.0 – 15.0" in rows
    narrow = printed(content, 80)
    assert "+5.0 (+0.1 to +9.0)" in narrow


def test_the_sentences_claim_what_the_intervals_do_and_no_more(content: dict[str, Any]) -> None:
    output = list(sentences(Comparison.of(content)))
    assert output[0] == "mask at speciality 30.0: versatility +5.0 (+0.1 to +9.0) against full"
    assert output[1].startswith("no interval, as") and output[1].endswith(": mask at 30.0 (60 % inside)")
    assert output[2] == "not matched (–): mask reaches a speciality of 30.0 at most"
    assert len(output) == 4 and output[3].startswith("one seed")
    content["seeds"] = [1, 2]
    assert list(sentences(Comparison.of(content)))[3].startswith("2 seeds")
    content["matched"][0]["rows"]["mask"]["versatility_against_reference"] = difference(5.0, -0.1, 9.0)
    content["points"].append(content["points"][0] | {"id": "f2"})
    content["partial"] = {"runs": 3, "done": 2, "missing": ["late"]}
    content["runs"] = [{"run": "late", "status": "failed", "reason": "it diverged"}]
    output = list(sentences(Comparison.of(content)))
    assert output[0] == "PARTIAL: 2 of 3 runs; missing: late. The same command continues"
    assert output[1] == "failed: late: it diverged"
    assert "no method is told apart from full at matched speciality: every interval contains 0" in output
    assert any(line.startswith("points by method: full 2, mask 1;") for line in output)


def test_what_holds_on_one_level_alone_is_not_told_of_several(content: dict[str, Any]) -> None:
    row = difference(5.0, 0.1, 9.0)
    content["matched"][0]["rows"]["mask"]["versatility_against_reference"] = row
    claim = "mask at speciality 30.0: versatility +5.0 (+0.1 to +9.0) against full"
    assert claim in list(sentences(Comparison.of(content)))
    row |= {"low_corrected": -0.4, "high_corrected": 9.6}
    output = list(sentences(Comparison.of(content)))
    assert claim not in output
    message = (
        "no method is told apart from full at matched speciality: every interval contains 0, corrected for 2 levels"
    )
    assert message in output


def test_what_equally_many_points_do_not_show_is_not_told_of_all(content: dict[str, Any]) -> None:
    row = difference(5.0, 0.1, 9.0) | {"with_equal_points": difference(2.0, -3.0, 7.0) | {"points": 1}}
    content["matched"][0]["rows"]["mask"]["versatility_against_reference"] = row
    message = "every interval contains 0, or does so with equally many points of each method"
    assert f"no method is told apart from full at matched speciality: {message}" in list(
        sentences(Comparison.of(content))
    )


def test_a_mask_is_told_against_each_control_whatever_comes_of_it(content: dict[str, Any]) -> None:
    row = {"reason": None, "versatility": 1.0, "instruct": 1.0}
    against = row | {"versatility_against_reference": difference(0.5, -1.0, 2.0) | {"draws_inside": 0.967}}
    level = {"speciality": 30.0, "point": "u", "why": "a point", "rows": {"uniform": row, "mask": against}}
    content["against_controls"] = [{"control": "uniform", "matched": [level]}]
    expected = "+0.5 (−1.0 to +2.0; 96 % inside)"
    message = f"mask against the control uniform: versatility {expected} at speciality 30.0"
    assert message in list(sentences(Comparison.of(content)))
    assert expected in printed(content) and "to uniform, 95 %" in printed(content)


def test_the_page_names_the_point_that_another_equals(content: dict[str, Any]) -> None:
    twin = content["points"][0] | {"id": "twin", "on_frontier": False, "dominated_by": None}
    content["points"] = [content["points"][0], twin]
    assert [row[3] for row in _points(Comparison.of(content)).rows] == ["", "yes", "no: as good as f"]


def test_the_picture_is_the_same_bytes_for_the_same_content(content: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first, second = (methods_picture("frontier", Comparison.of(content)) for _ in range(2))
    files = write_picture(tmp_path, first)
    assert [f.name for f in files] == ["frontier.png", "frontier.svg"]
    assert [f.read_bytes() for f in files] == [second.png, second.svg.encode()]
    assert "speciality (score" in first.svg and first.png.startswith(b"\x89PNG") and "partial" not in first.svg
    content["partial"] = {"runs": 8, "done": 3, "missing": ["a"]}
    assert "partial: 3 of 8 runs" in methods_picture("frontier", Comparison.of(content)).svg
