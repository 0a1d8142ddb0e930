"""The tree of a search that is running, by a clock that the test turns."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from cofitune.model.region import Region
from cofitune.reports.search.live import SearchLive
from cofitune.reports.search.row import Row

FFN, MHA = ("gate_proj", "up_proj", "down_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")
BASE = Row("base", None, None, 0, 0, 0.0, 58.6, 29.3, 20)


class Clock:
    """Seconds."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def waiting(name: str, parent: str | None = None, level: int = 1, first: int = 0) -> Row:
    return Row(name, parent, Region.span(first, 29, FFN), level, 1_000_000, None, None, None, 0.0)


def ended(row: Row, unified: float, seconds: float) -> Row:
    return replace(row, speciality=unified, versatility=unified, unified=unified, seconds=seconds)


def make(
    at_most: int, at_once: int | None = 1, height: int = 40, width: int = 110
) -> tuple[SearchLive, Clock, Console]:
    clock = Clock()
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    return SearchLive(console, at_most, at_once, clock), clock, console


def show(live: SearchLive, console: Console) -> list[str]:
    with console.capture() as captured:
        console.print(live.render())
    return [line.rstrip() for line in captured.get().splitlines()]


def test_what_runs_what_waits_and_what_ended_stand_in_the_tree() -> None:
    live, clock, console = make(at_most=5)
    assert show(live, console) == ["0 of at most 5 trials"]
    live.on_base(BASE)
    a, b, c = waiting("a"), waiting("b", first=10), waiting("c", first=20)
    live.on_start([a, b, c])
    clock.now = 60
    live.on_outcome(ended(a, 40.0, 60), best="a")
    clock.now = 75
    account, heading, base, first, second, third = show(live, console)
    assert account == "1 of at most 5 trials; best so far 0-29 × ffn (40.0); at most 0:03:45 left"
    assert heading.split()[0] == "region" and "the base, nothing trained" in base
    assert "★ 0-29 × ffn" in first and "40.0 +10.7" in first
    assert "10-29 × ffn" in second and second.endswith("runs, 0:00:15")
    assert "20-29 × ffn" in third and third.endswith("waits")


def test_a_child_stands_below_its_parent_and_the_way_to_the_best_is_marked() -> None:
    live, _, console = make(at_most=2)
    live.on_base(BASE)
    parent, child = waiting("p"), waiting("c", "p", 2, 20)
    live.on_outcome(ended(parent, 30.0, 10), best="p")
    live.on_start([child])
    live.on_outcome(ended(child, 35.0, 10), best="c")
    above, below = show(live, console)[-2:]
    assert "└── » 0-29 × ffn" in above and "    └── ★ 20-29 × ffn" in below


@pytest.mark.parametrize("at_once", [1, 2, None])
def test_the_time_left_is_the_mean_of_whole_trials_times_what_is_to_come(at_once: int | None) -> None:
    live, clock, _ = make(at_most=5, at_once=at_once)
    live.on_base(BASE)
    rows = [waiting(str(n), first=n) for n in range(4)]
    live.on_start(rows)
    assert live.seconds_left() is None, "nobody knows"
    clock.now = 30 if at_once != 1 else 60
    for row in rows[:2]:
        live.on_outcome(ended(row, 1.0, 30.0))
    live.on_outcome(replace(rows[2], reason="out of memory", status="failed", seconds=1.0))
    assert live.seconds_left() == {1: 60, 2: 30, None: 30}[at_once], "two of five: one runs, one is not begun"
    live.on_start([rows[2]])
    assert live.seconds_left() == {1: 90, 2: 45, None: 45}[at_once], "the failed one is tried once more"


def test_a_paused_trial_has_a_part_behind_it() -> None:
    live, clock, console = make(at_most=2)
    live.on_base(BASE)
    one, other = waiting("1"), waiting("2", first=9)
    live.on_start([one, other])
    for row in (one, other):
        live.on_outcome(replace(ended(row, 5.0, 10.0), status="paused", steps=15))
    assert live.seconds_left() is None
    assert "paused after 15 steps" in show(live, console)[-1]
    live.on_start([one])
    clock.now = 20
    live.on_outcome(ended(one, 9.0, 30.0), best="1")
    assert live.seconds_left() == 20, "30 less the 10 that the other has behind it"
    live.on_outcome(replace(ended(other, 5.0, 10.0), status="stopped", steps=15), best="1")
    assert live.seconds_left() == 0


def test_a_tree_above_terminal_height_keeps_the_best_running_and_newest() -> None:
    live, _, console = make(at_most=60, height=14)
    live.on_base(BASE)
    rows = [waiting(str(n), first=n) for n in range(25)]
    live.on_start(rows)
    for n, row in enumerate(rows[:20]):
        live.on_outcome(ended(row, float(n == 3), 10.0), best="3")
    lines = show(live, console)
    assert len(lines) <= 14
    assert any("★ 3-29" in line for line in lines)
    assert any("20-29" in line and "runs" in line for line in lines)
    assert "… and" in lines[-1] and "more trials" in lines[-1]


def test_a_narrow_terminal_shows_the_score_that_decides() -> None:
    live, _, console = make(at_most=1, width=70)
    live.on_base(BASE)
    live.on_outcome(ended(waiting("a"), 40.0, 60), best="a")
    _, heading, base, trial = show(live, console)
    assert heading.endswith(" unified") and base.endswith(" 29.3") and trial.endswith(" 40.0 +10.7")
    assert heading.index("unified") == base.index("29.3") == trial.index("40.0"), "in one column"


def test_the_tree_is_gone_at_the_end_and_stays_after_an_interruption() -> None:
    live, _, console = make(at_most=1)
    with live:
        live.on_base(BASE)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().endswith("\x1b[2K") or "\x1b[1A" in console.file.getvalue().split("base")[-1]
    live, _, console = make(at_most=1)
    with pytest.raises(KeyboardInterrupt), live:
        live.on_base(BASE)
        raise KeyboardInterrupt
    assert isinstance(console.file, io.StringIO)
    assert "\x1b[1A" not in console.file.getvalue().split("the base")[-1]
