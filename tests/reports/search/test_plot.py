"""The picture of a search, drawn from the content of its tree.json."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cofitune.model.region import Region
from cofitune.reports.figure import write_picture
from cofitune.reports.search.plot import _paint_plane, frontier, search_picture
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
    picture = search_picture("search", make_tree())
    png, svg = write_picture(tmp_path, picture)
    assert (png.name, svg.name) == ("search.png", "search.svg")
    with Image.open(png) as image:
        colours = len(set(image.convert("RGB").resize((200, 150)).getdata()))
        assert image.format == "PNG" and image.width >= 1000 and colours > 100
    text = svg.read_text()
    for expected in (
        "★ 15-29 × all", "15-22 × gate+down", "no scores", "speciality (score, 0 is guessing", "versatility (score",
        "winner", "the base, nothing trained", "no trial has more of both", "not told apart from it", "another trial",
    ):  # fmt: skip
        assert expected in text, expected
    assert svg.stat().st_size < 200_000
    assert "95 % intervals" in picture.caption and "hollow dots" in picture.caption
    assert picture.alt == "Tree of 9 trials with dots. The winner is 15-29 × all, unified 46.6."
    again = search_picture("search", make_tree())
    assert (again.png, again.svg) == (picture.png, picture.svg)


def test_the_frontier_is_what_no_other_beats_in_both() -> None:
    draw = random.Random(0)
    places = {(float(draw.randint(0, 20)), float(draw.randint(0, 20))) for _ in range(60)}

    def beaten(one: tuple[float, float]) -> bool:
        return any(other != one and other[0] >= one[0] and other[1] >= one[1] for other in places)

    assert frontier(places) == sorted(place for place in places if not beaten(place))


def test_only_finished_trials_are_in_the_plane_and_bars_surround_the_base() -> None:
    from matplotlib.figure import Figure

    tree = make_tree()
    axes = Figure().subplots()
    _paint_plane(axes, tree["trials"], tree)
    drawn = [(str(line.get_marker()), np.asarray(line.get_xydata()).tolist()) for line in axes.lines]
    lines = [(marker, [tuple(place) for place in places]) for marker, places in drawn]
    points = {place for marker, places in lines if marker in "*oD" for place in places}
    done = [(t["speciality"], t["versatility"]) for t in tree["trials"] if t["status"] == "done"]
    assert points == {*done, (0.0, 58.6)} and ("*", [(46.9, 46.3)]) in lines
    assert ("None", [(30.0, 46.3), (60.0, 46.3)]) in lines, "the base's speciality is 0"


def test_a_search_on_losses_shows_the_way_of_each_training() -> None:
    tree = make_tree()
    ends = {"a": (1.5, 0.2), "b": (1.1, 0.4)}
    for one in (tree["base"], *tree["trials"]):
        one |= {"speciality": None, "versatility": None, "unified": None, "intervals": {}}
        loss, drift = ends.get(one["id"], (1.8, 0.1))
        points = ((5, (loss + 2) / 2, drift / 2), (9, loss, drift))
        one["curve"] = [{"steps": steps, "loss": x, "drift": y} for steps, x, y in points]
    tree["base"]["curve"] = [{"steps": 0, "loss": 2.0, "drift": 0.0}]
    picture = search_picture("search", tree)
    for expected in ("speciality loss", "drift (nats a token)", "change against the base (nats a token)"):
        assert expected in picture.svg, expected
    assert "versatility" not in picture.svg and picture.alt.endswith("The winner is 15-29 × all.")


def test_a_search_without_a_winner_or_without_speciality_is_drawn_too() -> None:
    tree = make_tree()
    del tree["winner"]
    assert "There is no winner yet" in search_picture("search", tree).alt
    for one in (tree["base"], *tree["trials"]):
        one["speciality"] = None
    assert len(search_picture("search", tree).png) > 10_000
