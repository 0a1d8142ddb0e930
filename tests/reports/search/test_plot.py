"""The picture of a search, drawn from the content of its tree.json."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

from PIL import Image

from cofitune.model.region import Region
from cofitune.reports.search.dots import frontier, place_of, place_rows, read_picture
from cofitune.reports.search.plot import draw_search
from cofitune.search.trial import Trial

MHA, FFN = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def trial(
    name: str, parent: str | None, level: int, region: Region | None, *scores: float, **more: Any
) -> dict[str, Any]:
    speciality, versatility = scores or (None, None)
    unified = (speciality + versatility) / 2 if speciality is not None and versatility is not None else None
    made = Trial(
        id=name,
        region=region,
        status="done" if scores else "failed",
        level=level,
        seed=1,
        num_trained=1000,
        seconds=60.0,
        parent=parent,
        speciality=speciality,
        versatility=versatility,
        unified=unified,
    )
    return {**json.loads(made.to_json()), **more}


def make_tree() -> dict[str, Any]:
    """What `cofitune search` found in the demo, with a failed trial."""
    whole = (*MHA, *FFN)
    trials = [
        trial("a", None, 1, Region.span(0, 14, whole), 18.8, 33.1, to_winner={"tied": True}),
        trial("b", None, 1, Region.span(15, 29, whole), 46.9, 46.3, intervals={"speciality": (30.0, 60.0)}),
        trial("c", "b", 2, Region.span(15, 22, whole), 12.5, 38.2),
        trial("d", "b", 2, Region.span(23, 29, whole), 3.1, 42.4),
        trial("e", "c", 3, Region.span(15, 22, MHA), 0.0, 44.2),
        trial("f", "c", 3, Region.span(15, 22, FFN), 6.2, 40.3),
        trial("g", "f", 4, Region.span(15, 22, ("up_proj", "down_proj")), 6.2, 44.4),
        trial("h", "f", 4, Region.span(15, 22, ("gate_proj", "down_proj"))),
        trial("i", "f", 4, Region.span(15, 22, ("up_proj",)), 4.0, 45.0, status="stopped", steps=15),
    ]
    tries = ("layers: bottom-plus, top-plus", "layers: middle, top", "modules: mha, ffn", "modules: up_proj+down_proj")
    return {
        "winner": "b",
        "runner_up": "a",
        "reason": "Winner: 15-29 × all.",
        "levels": [{"tries": text, "expanded": []} for text in tries],
        "base": trial("base", None, 0, None, 0.0, 58.6),
        "trials": trials,
        "identity": {"train": {"steps": 60}},
    }


def test_the_picture_is_a_png_and_an_svg_of_the_same_bytes_each_time(tmp_path: Path) -> None:
    png, svg = draw_search(tmp_path / "a", make_tree())
    with Image.open(png) as image:
        colours = len(set(image.convert("RGB").resize((200, 150)).getdata()))
        assert image.format == "PNG" and image.width >= 1000 and colours > 100
    text = svg.read_text()
    for expected in (
        "8 trials", "level 2: layers", "level 4: modules", "15-29 × all", "15-22 × gate+down  failed", "46.6",
        "versatility (points; 0: chance, 100: all right)", "speciality (points", "unified score (points", "winner",
        "the base, nothing trained", "no trial has more of both", "not told apart from it",
        "95 % interval of the change", "15-22 × up  24.5, stopped at step 15", "not trained to the end (above)",
    ):  # fmt: skip
        assert expected.replace("8 trials", "7 finished trials of 60 optimizer steps") in text, expected
    assert svg.stat().st_size < 200_000
    again = draw_search(tmp_path / "b", make_tree())
    assert [p.read_bytes() for p in again] == [png.read_bytes(), svg.read_bytes()]


def test_no_two_trials_of_a_level_stand_in_one_place_and_parents_stand_in_the_middle() -> None:
    picture = read_picture(make_tree())
    rows = place_rows(picture)
    for level in range(5):
        places = [rows[dot.id] for dot in (picture.base, *picture.dots) if dot.level == level]
        assert all(abs(a - b) >= 1 for a, b in itertools.combinations(places, 2)), level
    assert rows["f"] == (rows["g"] + rows["i"]) / 2
    assert rows["base"] == (rows["a"] + rows["b"]) / 2


def test_the_frontier_is_what_no_other_beats_in_both() -> None:
    draw = random.Random(0)
    tree = make_tree()
    tree["trials"] = [
        trial(str(n), None, 1, Region.span(n, n, FFN), draw.randint(0, 20), draw.randint(0, 20)) for n in range(60)
    ]
    dots = read_picture(tree).dots
    places = {place for dot in dots if (place := place_of(dot))}

    def beaten(one: tuple[float, ...]) -> bool:
        return any(other != one and other[0] >= one[0] and other[1] >= one[1] for other in places)

    assert frontier(places) == sorted(place for place in places if not beaten(place))


def test_bars_are_the_interval_of_the_change_around_the_base_and_only_what_ran_to_its_end_is_compared() -> None:
    picture = read_picture(make_tree())
    by_id = {dot.id: dot for dot in picture.dots}
    assert by_id["b"].bars == {"speciality": (30.0, 60.0)}, "the base's speciality is 0"
    assert by_id["a"].tied and not by_id["c"].tied
    assert {dot.id for dot in picture.finished} == {"a", "b", "c", "d", "e", "f", "g"}


def test_a_search_whose_scores_lie_beside_no_axis_is_drawn_too(tmp_path: Path) -> None:
    tree = make_tree()
    for one in (tree["base"], *tree["trials"]):
        one["speciality"] = None
    png, _ = draw_search(tmp_path, tree)
    assert png.stat().st_size > 10_000
