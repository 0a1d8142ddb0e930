"""The picture of an importance, and the table of its spread."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from cofitune.importance_file import ATTENTION_HEADS, FFN_NEURONS, FFN_OUTPUTS, Reliability
from cofitune.reports.figure import write_picture
from cofitune.reports.importance.plot import importance_picture
from cofitune.reports.importance.table import spread_csv


def make_vectors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    units = {ATTENTION_HEADS: 9, FFN_NEURONS: 1536, FFN_OUTPUTS: 576}
    return {kind: torch.rand(30, count, generator=generator) for kind, count in units.items()}


def test_the_picture_is_a_png_and_an_svg_with_units_on_their_axes(tmp_path: Path) -> None:
    png, svg = write_picture(tmp_path / "a", importance_picture("importance", make_vectors(), "a model"))
    with Image.open(png) as image:
        colours = len(set(image.convert("RGB").resize((200, 150)).getdata()))
        assert image.format == "PNG" and image.width >= 1000 and colours > 100
    text = svg.read_text()
    titles = ("heads, 9 a layer", "outputs, 576 a layer", "units, most important first (%)", "layer's mean")
    for expected in ("a model", *titles, "layer (index)", "0: free"):
        assert expected in text
    assert svg.stat().st_size < 400_000
    again = write_picture(tmp_path / "b", importance_picture("importance", make_vectors(), "a model"))
    assert [p.read_bytes() for p in again] == [png.read_bytes(), svg.read_bytes()]


def test_columns_of_seven_modules_have_a_panel_each() -> None:
    modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    vectors = {f"{module}_columns": torch.rand(4, 48) for module in modules}
    drawn = importance_picture("importance", vectors)
    for text in (drawn.wide, drawn.narrow):
        assert all(f"{module.removesuffix('_proj')} columns, 48 a layer" in text for module in modules)


def test_the_reliability_of_each_layer_is_drawn_and_listed(tmp_path: Path) -> None:
    vectors = make_vectors()
    by_layer = tuple(0.5 + layer / 100 for layer in range(29))
    reliable = {kind: Reliability((*by_layer, float("nan")), 0.64, 0.78) for kind in vectors}
    _, svg = write_picture(tmp_path / "a", importance_picture("importance", vectors, "", reliable))
    assert "halves, neurons" in svg.read_text() and "rank correlation" in svg.read_text()
    contradicting = {kind: Reliability((-1.0,) * 30, -1.0, 0.0) for kind in vectors}
    _, noise = write_picture(tmp_path / "b", importance_picture("importance", vectors, "", contradicting))
    assert "−1" in noise.read_text() and "−1" not in svg.read_text(), "the axis reaches below 0"
    rows = list(csv.DictReader(io.StringIO(spread_csv(vectors, reliable))))
    assert [row["split_half"] for row in rows[:30]] == [*(f"{r:.4f}" for r in by_layer), ""]


def test_the_spread_is_the_numbers_of_each_layer() -> None:
    vectors = make_vectors()
    rows = list(csv.DictReader(io.StringIO(spread_csv(vectors))))
    assert len(rows) == 90
    row = next(r for r in rows if r["kind"] == FFN_NEURONS and r["layer"] == "7")
    values = sorted(vectors[FFN_NEURONS][7].tolist())
    assert float(row["mean"]) == round(sum(values) / 1536, 4)
    assert abs(float(row["p50"]) - (values[767] + values[768]) / 2) < 1e-4
    assert float(row["above_0.9"]) == round(sum(v > 0.9 for v in values) / 1536, 4)
    assert int(row["top_unit"]) == int(vectors[FFN_NEURONS][7].argmax())
