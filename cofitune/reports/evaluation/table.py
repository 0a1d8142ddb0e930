"""The table of an evaluation on the terminal, and the sentences below it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from cofitune.reports.console import plain_table
from cofitune.reports.evaluation.rows import NOISE, Cell, score_rows
from cofitune.reports.evaluation.scores import CATEGORIES, DRIFT, Comparison, GateVerdict, Scores
from cofitune.reports.shape import Entry
from cofitune.reports.text import NONE, number, signed

STYLES = {"better": "green", "worse": "red", "": ""}


def scores_table(scores: Scores) -> Table:
    """One row a category, its tasks below, then versatility and unified; one column a model.

    Returns:
        A table of 0–100 scores (0 is guessing) and their changes against the base with 95 % intervals; readable
        without colour in 80 columns for two models, where task names are not long.
    """
    base, others = scores.base, scores.others
    table = plain_table(
        "0 is guessing, 100 all right; in brackets the share of right answers"
        if len(others) < 2
        else f"0 is guessing, 100 all right; below, the change against {base} and its 95 % interval",
        title_style="",
    )
    table.add_column("task", overflow="fold")
    columns = ["items", base, *others]
    if len(others) == 1:
        columns += ["change", "95 % interval"]
    for name in columns:
        # many models in a narrow terminal break their cells at spaces; no figure is cut
        table.add_column(Text(name), justify="right", no_wrap=len(others) < 2, overflow="fold")
    rows = score_rows(scores)
    drift = set(scores.titles(DRIFT))
    for index, row in enumerate(rows):
        is_task = row.kind == "task"
        if row.name in drift and is_task and rows[index - 1].kind == "summary":
            table.add_section()
            table.add_row("drift (nats a token)", style="bold")
        name, style = (f"  {row.name}", "") if is_task else (row.name, "bold")
        table.add_row(Text(name), row.items, *_cells(row.cells), style=style)
        if row.kind == "category" and not scores.titles(row.name):
            table.add_row("  (no task)")
        if row.kind != "summary" and index + 1 < len(rows) and rows[index + 1].kind in ("category", "summary"):
            table.add_section()
    return table


def sentences(scores: Scores) -> Iterator[str]:
    """What each model gained and what it cost, what is not known and why, one line each."""
    if not scores.others:
        own = scores.models[scores.base]
        yield f"{scores.base}: speciality {number(own.score('speciality'))}, versatility {number(own.versatility)}"
    for comparison in scores.comparisons:
        if comparison.against == scores.base:
            yield _gain(comparison)
        yield from _ratio_lines(comparison)
    yield from _closing(scores)


def notes(scores: Scores) -> Iterator[str]:
    """Of the sentences those that the table's own figures do not tell: ratios, items lost and gained, noise."""
    for comparison in scores.comparisons:
        yield from _ratio_lines(comparison)
    yield from _closing(scores)


def example_lines(model: str, lost: Sequence[Entry], most: int = 3) -> Iterator[str]:
    """The first few items that a model lost, each with what is right and what it says now."""
    for item in lost[:most]:
        right, now = item["reference"], item["after"].get("answer", item["after"].get("pick"))
        if now is None:  # a loss, or a choice that the harness judged
            yield (
                f"{model} lost {item['task']}:{item['line']}: right is {_shortened(right)}, scored "
                f"{item['before']['score']:.3f} before and {item['after']['score']:.3f} now"
            )
            continue
        if "choices" in item:
            right, now = (item["choices"][n] if isinstance(n, int) else n for n in (right, now))
        yield (
            f"{model} lost {item['task']}:{item['line']}: right is {_shortened(right)}, now it says {_shortened(now)}"
        )


def verdict_line(verdict: GateVerdict) -> str:
    """One requirement of the gate: met or not, and the change that it was held against."""
    met = "met    " if verdict.met else "NOT MET"
    change = f"{signed(verdict.value)} ({signed(verdict.low)} to {signed(verdict.high)})"
    return f"{met} {verdict.require}: the change is {change}"


def _shortened(value: object) -> str:
    text = " ".join(str(value).split())
    return repr(text if len(text) <= 40 else text[:39] + "…")


def _gain(comparison: Comparison) -> str:
    changes = {name: None if change is None else change.value for name, change in comparison.summary.items()}
    parts = [f"{name} {signed(changes[name])}" for name in ("speciality", "versatility")]
    details = [f"{name} {signed(changes[name])}" for name in CATEGORIES[1:] if changes[name] is not None]
    return f"{comparison.model}: {', '.join(parts)}" + (f" ({', '.join(details)})" if details else "")


def _ratio_lines(comparison: Comparison) -> Iterator[str]:
    against = comparison.against
    words = {
        "versatility_retained": "of versatility kept",
        "vers_recovery": f"of what {against} forgot is not forgotten",
        "spec_gain_kept": f"of what {against} gained is gained",
    }
    for name, ratio in comparison.ratios.items():
        if ratio.value is None:
            yield f"{comparison.model}: {NONE} % {words[name]}: {ratio.reason}"
        else:
            value, low, high = (number(part, 0) for part in (ratio.value, ratio.low, ratio.high))
            yield f"{comparison.model}: {value} % ({low} to {high}) {words[name]}"


def _closing(scores: Scores) -> Iterator[str]:
    """The items that each model lost and gained, and the noise between seeds."""
    for comparison in scores.against_base.values():
        tasks = comparison.tasks
        lost, gained = sum(len(c.lost) for c in tasks.values()), sum(len(c.gained) for c in tasks.values())
        beyond = [title for title, c in tasks.items() if c.p_holm is not None and c.p_holm < 0.05]
        result = f"changed beyond chance (McNemar, Holm, 5 %): {', '.join(beyond) or 'no task'}"
        yield f"{comparison.model}: {lost} items lost, {gained} gained; {result}"
    noise = scores.noise_floor
    if noise.scores is not None:
        known, limits = noise.scores.summary, noise.limits.base.summary if noise.limits else {}
        parts = ", ".join(
            f"{n} {number(known.get(n))}" + (f" (±{number(limits[n])})" if n in limits else "")
            for n in ("speciality", "versatility", "unified")
        )
        runs = "; ".join(", ".join(group) for group in noise.runs)
        yield (
            f"noise between seeds (standard deviation over those of {runs}; ± what a seed alone changes against the "
            f"base in 95 % of cases): {parts}; {NOISE} marks changes that a seed alone could make"
        )
    elif scores.others:
        yield f"noise between seeds: not known ({noise.reason})"


def _cells(cells: Sequence[Cell]) -> list[Text]:
    """The cells of a row after `items`: beside one model its change, below each of several its own."""
    base, *others = cells
    if len(others) > 1:
        return [Text(base.figure), *(stacked(cell) for cell in others)]
    figures = [Text(cell.figure + _share(cell)) for cell in cells]
    return [*figures, *(part for cell in others for part in (_coloured(cell), Text(cell.interval)))]


def _share(cell: Cell) -> str:
    """The share of right answers; spaces in its place, so that decimals stand one below the other."""
    if cell.share is not None:
        return f" ({cell.share:.3f})"
    return "" if cell.unit or cell.figure == NONE else " " * len(" (0.000)")


def stacked(cell: Cell) -> Text:
    """A figure with its change behind it and the interval below."""
    if not cell.interval:
        return Text(cell.figure)
    return Text.assemble(cell.figure, " ", _coloured(cell), "\n", cell.interval)


def _coloured(cell: Cell) -> Text:
    """Green or red where the interval excludes 0; marked where a training seed alone could make it."""
    return Text(cell.change, STYLES[cell.verdict])
