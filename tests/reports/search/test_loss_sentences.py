"""A search on losses in the terminal: its columns, its winner, and how sure that is."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from cofitune.model.layouts import GROUPS
from cofitune.model.region import Region
from cofitune.reports.search.loss_sentences import loss_winner_sentence, margin_sentence, reliability_sentence
from cofitune.reports.search.row import LOSSES, Row
from cofitune.reports.search.tree import progress_line, search_report

BASE = Row("base", None, None, 0, 0, 3.5, 0.0, None, 60, scale=LOSSES, margins={"gen_kn": 1.0})
HALF = Row("half", None, Region.span(0, 15, GROUPS["all"]), 1, 3_000_000_000, 1.0, 0.5, 0.2, 1200, scale=LOSSES)
BEST = Row(
    "best", "half", Region.span(8, 15, ("up_proj", "down_proj")), 2, 721_420_288, 1.5, 0.125, 0.0625, 1000,
    tied=False, scale=LOSSES, margins={"gen_kn": 0.75},
)  # fmt: skip
LATE = replace(HALF, id="late", speciality=3.25, versatility=0.001, unified=None)
ROWS = [HALF, LATE, BEST]


def test_losses_stand_in_the_columns_with_their_unit_and_direction() -> None:
    out = io.StringIO()
    Console(file=out, width=100, no_color=True).print(search_report(BASE, ROWS, "best"), crop=False)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 100 and "loss ↓      drift ↓   at equal ↓" in lines[0]
    best = next(line for line in lines if "★ 8-15" in line)
    assert "1.500 -2.000" in best and best.split()[-3:] == ["0.125", "0.062", "1000"], (
        "of the base's drift there is no change"
    )
    late = [line for line in lines if "3.250 -0.250" in line]
    assert len(late) == 1 and late[0].split()[-2] == "-", "it has no drift at a loss that it does not reach"
    assert "nats a token, lower is better" in out.getvalue()


def test_a_line_as_a_trial_ends_tells_loss_and_drift() -> None:
    line = progress_line(replace(BEST, seed=7), BASE, 2, 4, known=False)
    assert line == (
        "trial 2 of at most 4: 8-15 × up+down (seed 7): loss 1.500 (-2.000 against the base), drift 0.125, 1000 s"
    )
    stopped = replace(LATE, status="stopped", steps=3, reason="number 3 of 3")
    assert "stopped after 3 steps: loss 3.250 (-0.250), drift 0.001; number 3 of 3" in progress_line(
        stopped, BASE, 1, 4, known=False
    )


def test_the_winner_says_at_which_loss_and_who_does_not_reach_it() -> None:
    text = loss_winner_sentence(BASE, ROWS, "best", "half", 2.0)
    assert text.startswith(
        "Winner: 8-15 × up+down, with the least drift at equal speciality loss of the 2 of 3 finished"
    )
    assert "0.062 nats a token at a loss of 2.000; the base's is 3.500, lower is better" in text
    assert text.endswith("runner-up: 0-15 × all (0.200).")
    tied = replace(BEST, unified=0.21, tied=False)
    text = loss_winner_sentence(BASE, [HALF, LATE, tied], "best", "half", 2.0)
    assert "with the fewest weights of those that tie for the least drift at equal speciality loss" in text
    fewer = replace(LATE, unified=0.2, num_trained=BEST.num_trained - 1, tied=True)
    text = loss_winner_sentence(BASE, [HALF, fewer, tied], "best", "half", 2.0)
    assert "with the lowest loss of those with about the fewest weights that tie for the least drift at" in text
    assert "does not reach that loss" in loss_winner_sentence(BASE, ROWS, "best", "late", 2.0)
    assert "there is no runner-up" in loss_winner_sentence(BASE, [BEST], "best", None, 2.0)


def test_where_nobody_learnt_drift_decided_nothing() -> None:
    text = loss_winner_sentence(BASE, ROWS, "half", "best", None)
    assert (
        "with the lowest speciality loss of 3 finished trials" in text and "No region lowers the base's (3.500)" in text
    )


def test_margins_are_told_with_their_change() -> None:
    assert "gen_kn +0.750 (-0.250)" in str(margin_sentence(BASE, BEST))
    assert margin_sentence(BASE, HALF) is None


def test_reliability_names_ties_or_why_there_are_none() -> None:
    text = reliability_sentence(2, 4, 0.4, 0.0123, "nats a token", 1, 6)
    assert text == (
        "2 seeds of the 4 leading regions: the rank correlation between seeds is +0.40 (Spearman), the standard error "
        "of a region's mean 0.012 nats a token; 1 of 6 other regions ties with the winner within it (95 %)."
    )
    assert "cannot be told (fewer than three regions)" in reliability_sentence(2, 2, None, 0.1, "points", 0, 1)
    assert "too few of them" in reliability_sentence(2, 2, None, None, "points", 0, 1)
