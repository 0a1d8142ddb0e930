"""`cofitune report`: one page of what a run learnt and forgot and how it was made, or of all runs in a folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from cofitune import __version__
from cofitune.errors import UserError, install
from cofitune.files import write_text
from cofitune.recipes.report.artifacts import Artifacts, made_of, read_artifacts
from cofitune.recipes.report.overview import make_overview
from cofitune.recipes.report.run import describe
from cofitune.reports.console import say
from cofitune.reports.figure import EXTRA, Picture, can_draw, writable, write_picture
from cofitune.reports.html import Page, render
from cofitune.reports.text import many

FOLDER = "report"  # below the run, beside the folders of the other commands
# what makes a folder a run; the compare folder holds runs itself, and is read as one with them
MARKS = (
    "eval/scores.json", "train/metrics.jsonl", "train/manifest.json", "search/trials.jsonl",
    "importance/manifest.json", "compare/compare.json",
)  # fmt: skip
DEPTH = 4  # folders between the one that was named and a run


def report(place: Path, to: Path | None = None, *, console: Console | None = None) -> Path:
    """Write report.html, and each of its plots as PNG and SVG.

    The same files give the same bytes: the page has no date but those in them.

    Args:
        place: a run (a config's output_dir), or a folder of runs, which are then put side by side.
        to: the folder to write; None: `report` in `place`.

    Returns:
        The page.

    Raises:
        UserError: there is no run, one of its files is damaged, or the folder cannot be written.
    """
    console = console or Console()
    runs = find_runs(place)
    to = to or place / FOLDER
    if to.exists() and not to.is_dir():
        raise UserError(f"--to {to}: is a file; name a folder")
    draws = can_draw()
    read = [read_artifacts(path, name) for path, name in runs]
    keys = [f"run-{number}" for number in range(1, len(read) + 1)]
    described = [describe(a, key, draws) for a, key in zip(read, keys, strict=True)]
    overview = made_of(place, lambda: make_overview(read, described, draws)) if len(read) > 1 else None
    title = place.resolve().name
    page = Page(title, described, overview, draws, __version__)
    text = made_of(place, lambda: writable(render(page)))
    pictures = list(_pictures(to, read, page))
    try:
        for folder, picture in pictures:
            write_picture(folder, picture)
        write_text(to / "report.html", text)
    except OSError as error:
        raise UserError(f"{to}: cannot be written: {error.strerror}") from error
    _tell(console, to / "report.html", len(read), len(pictures), draws)
    return to / "report.html"


def find_runs(place: Path) -> list[tuple[Path, str]]:
    """The runs in a folder with their names: it is one itself, or those below it, by their paths.

    Raises:
        UserError: there is none.
    """
    if not place.is_dir():
        raise UserError(f"{place}: is no folder; name a run (a config's output_dir) or a folder of runs")
    if _is_run(place):
        return [(place, place.resolve().name)]
    results = [(path, str(path.relative_to(place))) for path in _below(place, DEPTH)]
    if not results:
        raise UserError(
            f"{place}: holds no run and is none: neither here nor below is a file such as {', '.join(MARKS[:3])}"
        )
    return results


def _below(folder: Path, depth: int) -> Iterator[Path]:
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if _is_run(path):
            yield path
        elif depth > 1 and not path.is_symlink():
            yield from _below(path, depth - 1)


def _is_run(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in MARKS)


def _pictures(to: Path, read: Sequence[Artifacts], page: Page) -> Iterator[tuple[Path, Picture]]:
    """Each plot with the folder that it goes to: a run's own where there are several."""
    if page.overview and page.overview.picture:
        yield to, page.overview.picture
    for artifacts, run in zip(read, page.runs, strict=True):
        for picture in run.pictures.values():
            yield (to / artifacts.name if page.overview else to), picture


def _tell(console: Console, page: Path, runs: int, pictures: int, draws: bool) -> None:
    message = f"of {runs} runs, " if runs > 1 else ""
    say(console, f"→ {page}: {message}{many(pictures, 'plot')}, each as PNG and SVG")
    if not draws:
        say(console, f"no pictures: matplotlib is not installed ({install(EXTRA)})")
