"""The search's tree in 100 columns without colour."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console, RenderableType

from cofitune.model.layouts import GROUPS
from cofitune.model.region import Region
from cofitune.reports.search.row import Row
from cofitune.reports.search.sentences import (
    TRAINED_ONCE,
    Aim,
    proxy_sentence,
    stopped_sentence,
    tie_sentence,
    untried_sentence,
    winner_sentence,
)
from cofitune.reports.search.tree import PlanRow, plan_report, progress_line, search_report
from cofitune.reports.text import region_text

BASE = Row("base", None, None, 0, 0, 10.0, 50.0, 30.0, 60)
HALF = Row("half", None, Region.span(0, 15, GROUPS["all"]), 1, 3_000_000_000, 60.0, 30.0, 45.0, 1200)
QUARTER = Row("quarter", "half", Region.span(8, 15, GROUPS["all"]), 2, 1_600_000_000, 55.0, 40.0, 47.5, 1100)
OTHER = Row("other", "half", Region.span(0, 7, GROUPS["all"]), 2, 1_600_000_000, 100.0, 0.0, 50.0, 1100)
FAILED = Row(
    "bad", None, Region.span(16, 31, GROUPS["all"]), 1, 1, None, None, None, 3, "out\nof memory [red]" + "x" * 200
)
BEST = Row("best", "quarter", Region.span(8, 15, ("up_proj", "down_proj")), 3, 721_420_288, 54.0, 49.0, 51.5, 1000)
ROWS = [HALF, FAILED, OTHER, QUARTER, BEST]
SAID = [winner_sentence(BASE, ROWS, "best", "other")]


def show(what: RenderableType, width: int = 100) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, no_color=True, force_terminal=False).print(what, crop=False)
    return out.getvalue().splitlines()


def test_the_columns_stand_below_each_other_at_every_depth() -> None:
    lines = show(search_report(BASE, ROWS, "best", SAID))
    assert all(len(line) <= 100 for line in lines)
    scored = [line for line in lines if " M " in line]
    assert len(scored) == 4
    ends = {line.rindex(" M ") for line in scored} | {len(line) for line in scored}
    assert len(ends) == 2, "weights and seconds end in one column"
    assert len(lines[0]) == len(scored[0])


def test_a_narrow_console_cuts_no_score_off() -> None:
    wide, narrow = (show(search_report(BASE, ROWS, "best", SAID), width) for width in (100, 60))
    assert narrow[: len(ROWS) + 2] == wide[: len(ROWS) + 2]
    assert all(len(line) <= 60 for line in narrow[len(ROWS) + 2 :]), "sentences are wrapped"


def test_few_weights_are_counted_one_by_one() -> None:
    lines = show(search_report(BASE, [replace(BEST, parent=None, num_trained=18432)], "best"))
    assert " 18,432 " in lines[2]


def test_each_trial_stands_below_its_parent_and_the_best_path_is_marked() -> None:
    lines = show(search_report(BASE, ROWS, "best", SAID))
    place = {name: next(i for i, line in enumerate(lines) if f"{name} " in line) for name in ("0-15", "0-7", "up+down")}
    assert place["0-15"] < place["0-7"] < place["up+down"]
    assert "» 0-15 × all" in lines[place["0-15"]]
    assert "★ 8-15 × up+down" in lines[place["up+down"]]
    assert "»" not in lines[place["0-7"]] and "★" not in lines[place["0-7"]]
    indents = [len(lines[place[n]]) - len(lines[place[n]].lstrip("│├└─ ")) for n in ("0-15", "0-7", "up+down")]
    assert indents == [4, 8, 12]


def test_scores_carry_their_change_against_the_base() -> None:
    line = next(line for line in show(search_report(BASE, ROWS, "best")) if "★ 8" in line)
    assert "721.4 M" in line and "54.0 +44.0" in line and "49.0 -1.0" in line and "51.5 +21.5" in line
    base = show(search_report(BASE, ROWS, "best"))[1]
    assert "10.0" in base and "+" not in base


def test_a_failed_trial_says_why_in_its_own_line() -> None:
    lines = show(search_report(BASE, ROWS, "best"))
    line = next(line for line in lines if "16-31" in line)
    assert "failed: out of memory [red]xx" in line and line.endswith("…")


def test_the_winner_and_the_runner_up_in_one_sentence() -> None:
    text = winner_sentence(BASE, ROWS, "best", "other")
    assert text == (
        "Winner: 8-15 × up+down, with the highest unified score of 4 finished trials (51.5; against the base: "
        "speciality +44.0, versatility -1.0); runner-up: 0-7 × all (50.0)."
    )
    assert "there is no runner-up" in winner_sentence(BASE, [BEST], "best")


def test_a_tie_is_explained() -> None:
    tied = replace(QUARTER, unified=51.5)
    assert "tied, but it trains more weights" in winner_sentence(BASE, [*ROWS[:3], tied, BEST], "best", "quarter")
    twin = replace(BEST, id="twin", region=Region.span(16, 23, BEST.region.modules if BEST.region else ()))
    assert "tied, but it trains as many weights further up" in winner_sentence(BASE, [BEST, twin], "best", "twin")


def test_a_search_that_gained_nothing_says_so() -> None:
    assert "No region beats the untouched base (unified 60.0)" in winner_sentence(
        replace(BASE, unified=60.0), ROWS, "best", "other"
    )
    assert "No region beats" not in winner_sentence(BASE, ROWS, "best", "other")


def test_unknown_scores_leave_a_dash() -> None:
    base = replace(BASE, versatility=None)
    line = next(line for line in show(search_report(base, ROWS, "best")) if "★ 8" in line)
    assert "49.0 -" in line and "54.0 +44.0" in line


def test_regions_are_short_and_groups_have_their_names() -> None:
    assert region_text(Region.span(0, 7, GROUPS["mha"])) == "0-7 × mha"
    assert region_text(Region.span(0, 7, GROUPS["ffn"])) == "0-7 × ffn"
    assert region_text(Region.span(3, 3, ("q_proj", "v_proj"))) == "3 × q+v"
    assert region_text(None) == "the base"


def test_a_long_region_deep_in_the_tree_is_cut_and_keeps_the_columns() -> None:
    rows = [replace(HALF, id="0")]
    for depth in range(1, 9):
        rows.append(
            replace(BEST, id=str(depth), parent=str(depth - 1), region=Region.span(100, 127, GROUPS["all"][:6]))
        )
    lines = show(search_report(BASE, rows, "8"))
    assert any("…" in line for line in lines)
    assert all(len(line) <= 100 for line in lines)


def test_a_line_a_trial_while_it_runs() -> None:
    assert progress_line(BEST, BASE, 4, 13, False) == (
        "trial 4 of at most 13: 8-15 × up+down: unified 51.5 (+21.5 against the base), 1000 s"
    )
    assert progress_line(BEST, BASE, 14, 13, True).startswith("trial 14 of at most 14")
    assert progress_line(BEST, BASE, 4, 13, True).endswith("(from the store)")
    assert "failed: out" in progress_line(FAILED, BASE, 1, 13, False)


def test_the_plan_tells_exact_counts_from_bounds() -> None:
    rows = [
        PlanRow("layers: bottom1, top", (Region.span(0, 7, ("q_proj",)), Region.span(24, 31, ("q_proj",))), 2, True),
        PlanRow("modules: mha, ffn", (Region.span(0, 7, GROUPS["mha"]),), 4, False),
    ]
    text = "\n".join(show(plan_report(rows, 60, 1)))
    assert "at most 6 trials of 60 optimizer steps each, and the base once" in text
    assert "level 1: layers: bottom1, top  (2 trials)" in text and "24-31 × q" in text
    assert "(at most 4 trials of 1 region)" in text
    assert "In the store already, and not to be repeated: 1 trial." in text
    assert "\n".join(show(plan_report(rows[:1], 5))).startswith("2 trials of 5")


def test_what_was_stopped_tells_its_step_and_what_ties_is_marked() -> None:
    stopped = replace(OTHER, status="stopped", steps=15, reason="number 3 of 4 after 15 steps, of which 2 may go on")
    tied = replace(QUARTER, behind=(-4.0, -9.0, 1.0), tied=True)
    lines = show(search_report(BASE, [HALF, stopped, tied, BEST], "best"))
    assert "stopped after 15 steps: unified 50.0 (+20.0); number 3" in next(x for x in lines if "0-7" in x)
    assert any("» ≈ 8-15 × all" in x for x in lines)
    assert stopped_sentence([HALF, stopped]) == "1 trial stopped early, after 15 steps, and could not win."
    assert stopped_sentence([HALF]) is None
    assert progress_line(replace(HALF, status="paused", steps=15), BASE, 1, 9, False).endswith(
        "paused after 15 steps: unified 45.0 (+15.0)"
    )


def test_ties_name_the_one_with_the_fewest_weights() -> None:
    small = replace(QUARTER, id="small", region=Region.span(4, 5, ("q_proj",)), num_trained=9_000_000)
    tied = [replace(row, behind=(-2.0, -6.0, 2.5), tied=True) for row in (small, HALF)]
    lost = replace(OTHER, behind=(-20.0, -30.0, -9.0))
    text = tie_sentence([*tied, lost, BEST], "best") or ""
    assert text.startswith("2 regions cannot be told apart from it")
    assert "the one with the fewest weights is 4-5 × q (9.0 M against 721.4 M; -2.0, -6.0 to +2.5)" in text
    assert "Its score is the best of 4 on these items, and so too high by some luck" in text
    assert "some luck" not in (tie_sentence([lost, BEST], "best") or ""), "the winner is beyond chance"
    assert "none of them has fewer weights" in (tie_sentence([tied[1], BEST], "best") or "")
    assert "No other region is within chance" in (tie_sentence([lost, BEST], "best") or "")
    assert tie_sentence(ROWS, "best") is None, "nothing is known of the items"


def test_what_misses_the_floor_ties_with_nothing_and_is_counted() -> None:
    missed = replace(HALF, behind=(20.0, 9.0, 30.0), missed=3.0)
    lost = replace(OTHER, behind=(-20.0, -30.0, -9.0))
    assert tie_sentence([missed, lost, BEST], "best") == (
        "No other region is within chance of it: the 95 % interval of every paired difference lies below 0. "
        f"{TRAINED_ONCE} Not counted: 1 region below the floor."
    )
    assert tie_sentence([missed, BEST], "best") == "Not counted: 1 region below the floor."
    nearest = replace(BEST, missed=1.0)
    assert tie_sentence([missed, nearest], "best") == "Not counted: 1 region further below the floor."


def test_a_floor_is_told_with_the_winner() -> None:
    aim = Aim("speciality", -5.0)
    text = winner_sentence(BASE, [HALF, replace(BEST, parent=None), replace(QUARTER, missed=5.0)], "best", None, aim)
    assert "with the highest speciality of the 2 of 3 finished trials that keep versatility of -5 points" in text
    text = winner_sentence(BASE, [replace(BEST, missed=1.5)], "best", None, aim)
    assert "nearest to the floor, which no finished trial keeps" in text and "1.5 below it" in text


def test_what_was_not_tried_is_told() -> None:
    regions = [Region.span(n, n, ("q_proj",)) for n in range(5)]
    text = untried_sentence("search.budget_trials: 5", regions, ["modules: mha, ffn"]) or ""
    assert "search.budget_trials: 5 ended the search, and this is the best so far" in text
    assert "0 × q, 1 × q, 2 × q and 2 more not trained to the end; not begun: modules: mha, ffn" in text
    assert untried_sentence(None, [], []) is None


def test_the_proxy_is_judged_or_it_is_said_that_it_cannot_be() -> None:
    assert "of 13 finished trials is -0.25 (Spearman)" in proxy_sentence(-0.25, 13)
    assert "cannot be judged by 2 finished trials" in proxy_sentence(None, 2)
