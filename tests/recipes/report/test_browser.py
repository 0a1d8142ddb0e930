"""The report in Chromium, as its reader has it: on a phone and a desktop, in light and in dark."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cofitune.recipes.report.recipe import report
from tests import chromium

CASES = [(width, scheme) for width in (360, 1280) for scheme in ("light", "dark")]
# the ratio of WCAG 2.2 between the colours of an element's text and of the page
CONTRAST = """(selector => {
  const light = colour => {
    const parts = colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255);
    const [r, g, b] = parts.map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [...document.querySelectorAll(selector)];
  const paper = light(getComputedStyle(document.body).backgroundColor);
  return found.map(e => {
    const ink = light(getComputedStyle(e).color);
    return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  });
})"""
# of every drawing that is shown: how far its texts reach beyond it, and how high the smallest is, in CSS pixels
DRAWN = """[...document.querySelectorAll('figure svg')].filter(s => s.clientWidth).map(s => {
  const box = s.getBoundingClientRect(), texts = [...s.querySelectorAll('text')];
  const inside = texts.map(t => t.getBoundingClientRect());
  const scale = box.width / s.viewBox.baseVal.width;
  return {
    beyond: Math.max(
      ...inside.flatMap(t => [box.left - t.left, t.right - box.right, box.top - t.top, t.bottom - box.bottom])
    ),
    smallest: Math.min(...texts.map(t => parseFloat(getComputedStyle(t).fontSize))) * scale,
    texts: texts.length, label: s.getAttribute('aria-label'), fill: getComputedStyle(texts[0]).fill,
  };
})"""


PATH = chromium.find_chromium()
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(
        PATH is None, reason="no Chromium that starts here; .ci/run installs it, or apt-get install chromium"
    ),
]


@pytest.fixture(scope="module")
def tab() -> Iterator[Any]:
    with chromium.browser(str(PATH)) as opened:
        yield opened


@pytest.fixture(scope="module")
def scores(by_hand: Any, place: Path) -> Any:
    return by_hand.run(place / "law", others=("lora, all linear", by_hand.hostile))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def page(place: Path, scores: Any) -> Path:
    return report(place / "law")


@pytest.fixture(scope="module")
def pages(place: Path, page: Path, by_hand: Any) -> list[Path]:
    """The page of one run, and that of a folder of two."""
    by_hand.run(place / "a_run_with_a_name_that_is_rather_long_and_has_no_place_to_break", 0.4)
    return [page, report(place, place / "all")]


def test_the_scores_are_what_a_reader_reads(tab: Any, page: Path, scores: Any) -> None:
    tab.open(page, 1280, "light")
    result = "[...document.querySelectorAll('#run-1-scores ~ .scroll tbody tr')]"
    rows = tab.run(f"{result}.map(r => [...r.children].map(c => c.innerText))")
    by_name = {row[0].split("\n")[0].strip(): row[1:] for row in rows}
    assert set(by_name) >= set(scores["tasks"]) | {"speciality", "gen_kn", "versatility", "unified"}

    def text(value: float, digits: int, sign: bool = False) -> str:
        return (
            f"{round(value, digits) + 0.0:{'+' if sign and abs(round(value, digits)) > 0 else ''}.{digits}f}".replace(
                "-", "−"
            )
        )

    for title, about in scores["tasks"].items():
        digits = 1 if about["unit"] == "share" else 3
        base, *others = by_name[title]
        assert base.split("\n")[0] == text(scores["models"]["base"]["tasks"][title]["score"], digits)
        comparisons = [c for c in scores["comparisons"] if c["against"] == "base"]
        for comparison, figure, change in zip(comparisons, others[::2], others[1::2], strict=True):
            model, message = scores["models"][comparison["model"]], comparison["tasks"][title]
            assert figure.split("\n")[0] == text(model["tasks"][title]["score"], digits)
            value, interval, *_ = change.split("\n")
            assert value == text(message["value"], digits, sign=True)
            assert interval == " to ".join(text(message[end], digits, sign=True) for end in ("low", "high"))


@pytest.mark.parametrize(("width", "scheme"), CASES)
def test_nothing_overflows_complains_or_is_fetched(tab: Any, pages: list[Path], width: int, scheme: str) -> None:
    for page in pages:
        tab.open(page, width, scheme)
        tab.run("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert tab.run("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
        assert tab.complaints == []
        assert [r for r in tab.requests if not r.startswith("data:")] == [page.resolve().as_uri()]


def test_on_a_phone_a_row_is_no_tower_of_letters(tab: Any, pages: list[Path]) -> None:
    for page in pages:
        tab.open(page, 360, "light")
        result = "[...document.querySelectorAll('tbody tr')].map(r => [r.offsetHeight, r.innerText])"
        assert all(height <= 120 for height, _ in tab.run(result)), max(tab.run(result))


@pytest.mark.parametrize(("width", "scheme"), CASES)
def test_drawings_are_whole_and_large_enough_to_read(tab: Any, page: Path, width: int, scheme: str) -> None:
    tab.open(page, width, scheme)
    drawn = tab.run(DRAWN)
    assert len(drawn) == 6, "one of the wide and the narrow of each"
    for drawing in drawn:
        assert drawing["texts"] > 3 and drawing["label"]
        assert drawing["beyond"] < 1.5, drawing
        assert drawing["smallest"] >= 8.5, drawing
        assert (drawing["fill"] == "rgb(27, 31, 35)") == (scheme == "light"), "its ink is the page's"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_paper(tab: Any, page: Path, scheme: str) -> None:
    tab.open(page, 1280, scheme)
    for selector in ("p", "a", "th", ".note", ".caption", "figcaption", ".sub", ".better", ".worse", "dt", "summary"):
        ratios = tab.run(f"{CONTRAST}({selector!r})")
        assert ratios and min(ratios) >= 4.5, selector


def test_light_and_dark_and_phone_and_desktop_are_four_pictures(tab: Any, page: Path) -> None:
    shots = []
    for width, scheme in CASES:
        tab.open(page, width, scheme)
        with Image.open(io.BytesIO(tab.screenshot())) as image:
            grey = image.convert("L").resize((64, 64))
            shots.append(grey.tobytes())
            mean = sum(grey.tobytes()) / len(grey.tobytes())
        assert (mean > 128) == (scheme == "light")
    assert all(a != b for a, b in pairwise(shots))


def test_a_hostile_item_runs_nothing(tab: Any, page: Path, by_hand: Any) -> None:
    tab.open(page, 1280, "light")
    assert tab.run("window.owned === undefined && document.scripts.length === 0 && document.images.length === 0")
    assert by_hand.hostile in tab.run("document.body.textContent")


def test_the_check_itself_sees_a_script_an_overflow_and_a_request(tab: Any, page: Path, tmp_path: Path) -> None:
    html = page.read_text(encoding="utf-8").replace("default-src 'none'", "default-src * 'unsafe-inline'")
    broken = tmp_path / "broken.html"
    script = "<script>window.owned = 1; console.error('no')</script>"
    extra = f"<div style='width: 2000px'>x</div>{script}<img src='missing.png'>"
    broken.write_text(html.replace("</main>", extra + "</main>"), encoding="utf-8")
    tab.open(broken, 360, "light")
    assert tab.run("window.owned") == 1
    assert tab.run("document.documentElement.scrollWidth") > 1000
    assert tab.complaints and any(r.endswith("missing.png") for r in tab.requests)
