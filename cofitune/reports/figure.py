"""A plot as a page needs it: SVG that follows the page from light to dark, once wide and once for a phone.

Colours are Okabe and Ito's (2008), which readers with and without colour blindness can tell apart, and a grey, as their
black is the ink; markers differ too, so that no series depends on its colour alone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cofitune.files import write_atomically, write_text

if TYPE_CHECKING:  # an extra
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

EXTRA = "plots"

INK, MUTED, GRID, PAPER = "#1b1f23", "#5c6670", "#dde2e7", "#fffffe"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f868d")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "h")
# the page's style sheet says what each variable is in light and in dark
VARIABLES = {
    INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper", **{c: f"s{n}" for n, c in enumerate(SERIES, start=1)}
}  # fmt: skip

WIDE, NARROW = 7.2, 3.5  # inches; the text of both is 8 points high, so that a phone need not shrink it
DOTS_AN_INCH = 160
_COLOUR = re.compile(r"(fill|stroke): (#[0-9a-f]{6})")

Paint = Callable[["Figure", bool], None]  # (an empty matplotlib Figure, whether it is the narrow one)


@dataclass(frozen=True)
class Picture:
    """One plot.

    Attributes:
        name: stem of its files.
        caption: what is drawn, with units.
        alt: what a reader who does not see it should know.
        svg, png: the wide one as files, in light.
        draw_narrow: draws the narrow one, as the SVG of a file.
    """

    name: str
    caption: str
    alt: str
    svg: str
    png: bytes
    draw_narrow: Callable[[], str]

    @cached_property
    def wide(self) -> str:
        """The wide one as an SVG element of a page, whose colours are CSS variables."""
        return _inline(self.svg, f"{self.name}-w", self.alt)

    @cached_property
    def narrow(self) -> str:
        """The narrow one as an SVG element of a page; drawn only now, for most commands write files alone."""
        return _inline(self.draw_narrow(), f"{self.name}-n", self.alt)


def draw(name: str, caption: str, alt: str, paint: Paint, heights: tuple[float, float]) -> Picture:
    """Let `paint` draw it wide, and narrow where that is asked for; the same input gives the same bytes.

    Args:
        heights: of the wide and the narrow figure, in inches.
    """

    def draw_narrow() -> str:
        with style(name):
            return _save(_figure(paint, NARROW, heights[1], narrow=True), "svg").decode()

    with style(name):
        figure = _figure(paint, WIDE, heights[0], narrow=False)
        svg, png = _save(figure, "svg").decode(), _save(figure, "png")
    return Picture(name, caption, alt, svg, png, draw_narrow)


def write_picture(folder: Path, picture: Picture) -> tuple[Path, Path]:
    """Write NAME.png and NAME.svg into the folder."""
    png, svg = folder / f"{picture.name}.png", folder / f"{picture.name}.svg"
    write_atomically(png, lambda to: to.write_bytes(picture.png))
    write_text(svg, writable(picture.svg))
    return png, svg


def writable(text: str) -> str:
    """A text as a file can hold it: half a character, which JSON can name, as its escape."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@contextmanager
def style(salt: str) -> Iterator[None]:
    """Matplotlib's settings of all pictures: text stays text, names with a dollar sign are no formulas."""
    import matplotlib

    settings: dict[Any, object] = {  # matplotlib's own type names each of its settings
        "svg.hashsalt": salt, "svg.fonttype": "none", "text.parse_math": False, "font.size": 8,
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED, "axes.titlecolor": INK,
        "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
        "xtick.labelsize": 7.5, "ytick.labelsize": 7.5, "axes.labelsize": 8, "axes.titlesize": 8, "legend.fontsize": 8,
        "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7, "axes.grid": True,
        "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.6, "xtick.major.width": 0.7,
        "ytick.major.width": 0.7, "xtick.major.size": 3, "ytick.major.size": 3, "legend.frameon": False,
        "axes.facecolor": "none", "figure.facecolor": "none", "lines.linewidth": 1.3, "axes.unicode_minus": True,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        yield


def shortened(text: str, most: int) -> str:
    """A name in few characters and without what XML cannot hold; the tables have it whole."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    return plain if len(plain) <= most else plain[: most - 1] + "…"


def series(index: int) -> tuple[str, str]:
    """Colour and marker of the n-th model, from 0."""
    return SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]


def legend(figure: Figure, columns: int) -> None:
    """One legend above all panels, each label once."""
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper left", ncols=min(columns, len(handles)),
        handletextpad=0.3, columnspacing=1.2, borderpad=0.1,
    )  # fmt: skip


def _figure(paint: Paint, width: float, height: float, narrow: bool) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DOTS_AN_INCH, layout="constrained")
    paint(figure, narrow)
    # once: a figure that has a layout engine is laid out, and drawn in vain, each time that it is saved
    if (layout := figure.get_layout_engine()) is not None:
        layout.execute(figure)
    figure.set_layout_engine(None)
    return figure


def _save(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    # a file may be shown on anything: it gets the page's light paper
    figure.savefig(
        buffer, format=kind, facecolor=PAPER, metadata={"Date": None} if kind == "svg" else {"Software": None}
    )
    return buffer.getvalue()


def _inline(svg: str, prefix: str, alt: str) -> str:
    """A file's SVG as an element of a page: its own ids, its colours as variables, its size the page's."""
    body = svg[svg.index("<svg") :]
    for part in ("metadata", "style"):
        body = re.sub(rf"<{part}.*?</{part}>", "", body, flags=re.DOTALL)
    used = set(re.findall(r"#([\w.]+)", body))
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'url\(#|href="#', lambda m: f"{m[0]}{prefix}-", body)
    body = _COLOUR.sub(lambda m: f"{m[1]}: var(--{VARIABLES[m[2]]})" if m[2] in VARIABLES else m[0], body)
    body = re.sub(r"font-family: [^;\"]*", "font-family: inherit", body)
    view = body[body.index("viewBox=") :].split('"')[1]
    head = f'<svg viewBox="{view}" role="img" aria-label="{escape(alt)}">'
    return head + re.sub(r"\n+", "\n", body[body.index(">") + 1 :])


def can_draw() -> bool:
    """Whether matplotlib, the extra `plots`, is installed."""
    return find_spec("matplotlib") is not None
