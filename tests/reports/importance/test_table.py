"""The importance table: right figures, and narrow enough for a terminal."""

from __future__ import annotations

import torch
from rich.console import Console, RenderableType
from torch import Tensor

from cofitune.importance_file import ATTENTION_HEADS, FFN_NEURONS, FFN_OUTPUTS, Reliability
from cofitune.reports.importance.table import importance_report, importance_table, reliability_text, summary


def render(thing: RenderableType, width: int = 80) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(thing)
    return capture.get()


def make_vectors() -> dict[str, Tensor]:
    return {
        ATTENTION_HEADS: torch.tensor([[0.95, 0.5, 0.05, 0.5], [0.0, 0.0, 0.0, 0.0]]),
        FFN_NEURONS: torch.tensor([[0.2, 0.4], [1.0, 0.92]]),
        FFN_OUTPUTS: torch.tensor([[0.3, 0.3], [0.5, 0.62]]),
    }


def test_a_layers_row_gives_mean_shares_and_top_unit_of_each_kind() -> None:
    rows = [line.split() for line in render(importance_table(make_vectors())).splitlines()]
    assert ["0", "0.50", "25%", "25%", "0", "0.30", "0%", "0%", "1", "0.30", "0%", "0%", "0"] in rows
    assert ["1", "0.00", "0%", "100%", "-", "0.96", "100%", "0%", "0", "0.56", "0%", "0%", "1"] in rows
    assert ["all", "0.25", "12%", "62%", "0.63", "50%", "0%", "0.43", "0%", "0%"] in rows


def test_forty_layers_of_a_13b_fit_80_columns() -> None:
    vectors = {
        kind: torch.rand(40, units)
        for kind, units in ((ATTENTION_HEADS, 40), (FFN_NEURONS, 13824), (FFN_OUTPUTS, 5120))
    }
    for row in vectors.values():
        row[:, -1] = 1.0  # the widest index
        row[7] = 0.95
    text = render(importance_report(vectors))
    assert "…" not in text
    assert "13823" in text
    assert max(len(line) for line in text.splitlines()) <= 80
    assert len(text.splitlines()) <= 40 + 9


def test_columns_of_seven_modules_stand_below_one_another() -> None:
    modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    vectors = {f"{module}_columns": torch.rand(4, 27648) for module in modules}
    text = render(importance_report(vectors))
    assert text.count("Importance of input columns") == 3 and "gate" in text and "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "for the q columns" in " ".join(text.split())
    reliable = {kind: Reliability((0.9,), 0.9, 0.95) for kind in vectors}
    assert "o columns 0.95 (halves 0.90)" in reliability_text(reliable, "wanda")


def test_the_summary_says_what_is_held_back_and_what_says_nothing() -> None:
    text = summary(make_vectors())
    assert "75% for the heads, 37% for the neurons and 57% for the outputs" in text
    assert "holds layer 1 back most and layer 0 least" in text
    assert "heads of layer 1" in text
    assert "all equal" in text


def test_nothing_is_said_of_silent_layers_where_there_are_none() -> None:
    vectors = {FFN_NEURONS: torch.tensor([[0.2, 0.4], [1.0, 0.92]])}
    assert "equal" not in summary(vectors)
    assert "update: 37% for the neurons;" in summary(vectors)


def test_what_is_mostly_noise_is_said_with_what_helps() -> None:
    good, poor = Reliability((0.8,), 0.8, 0.889), Reliability((0.2,), 0.2, 0.333)
    text = reliability_text({ATTENTION_HEADS: good, FFN_NEURONS: poor, FFN_OUTPUTS: Reliability((), None, None)})
    assert "heads 0.89 (halves 0.80), neurons 0.33 (halves 0.20), outputs –" in text
    assert "Below 0.5 it is mostly noise" in text and "importance.passes" in text
    assert "passes" not in reliability_text({FFN_NEURONS: poor}, "fisher"), "which takes no draws"
    assert "noise" not in reliability_text({ATTENTION_HEADS: good})
    assert "two micro-batches" in reliability_text({})
