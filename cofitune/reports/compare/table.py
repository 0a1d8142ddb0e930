"""A comparison on the terminal: versatility at matched speciality, and every point."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from cofitune.reports.compare.content import MATCHED, SCORES, Comparison, Difference, Level
from cofitune.reports.console import plain_table
from cofitune.reports.text import NONE, number, signed


def comparison_tables(content: Comparison) -> Iterator[Table]:
    """A table for each level of speciality, those of the masks against their controls, and that of all points."""
    for reference, level in content.levels:
        yield matched_table(level, reference)
    yield points_table(content)


def matched_table(level: Level, reference: str) -> Table:
    """A row a method: versatility and its difference to the reference's, and instruction following by itself."""
    title = Text(f"at a speciality of {number(level.speciality)} ({level.point}: {level.why})", style="bold")
    table = plain_table(title, title_justify="left")
    table.add_column("method", overflow="fold")
    for name in ("versatility", f"to {reference}, 95 %", "instruct", f"to {reference}, 95 %"):
        table.add_column(Text(name), justify="right", overflow="fold")
    for method, row in level.rows.items():
        cells: list[Text | str] = []
        for score in MATCHED:
            cells += [number(row.values[score]), _difference(row.differences[score])]
        table.add_row(Text(method), *cells)
    return table


def points_table(content: Comparison) -> Table:
    """Every point, method by method: its scores, and whether it is on its method's frontier."""
    table = plain_table("every point, means over seeds; ● on its method's frontier, · dominated", title_style="")
    for name in ("method", "rate", "alpha", "", *SCORES):
        table.add_column(name, justify="left" if name == "method" else "right", overflow="fold")
    table.add_row("base", "", "0", "", *(number(content.base[s]) for s in SCORES))
    for method in content.methods:
        table.add_section()
        for point in content.of_method(method):
            scores, mark = [number(point.scores[s]) for s in SCORES], "●" if point.on_frontier else "·"
            table.add_row(Text(method), f"{point.learning_rate:g}", f"{point.alpha:g}", mark, *scores)
    return table


def sentences(content: Comparison) -> Iterator[str]:
    """What can be said, and what cannot, one line each."""
    if partial := content.partial:
        yield (
            f"PARTIAL: {partial.done} of {partial.runs} runs; missing: {', '.join(partial.missing)}. "
            "The same command continues"
        )
    for run in content.runs:
        if run.status == "failed":
            yield f"failed: {run.run}: {run.reason}"
    yield from _against_reference(content)
    yield from _against_controls(content)
    reasons = [row.reason for level in content.matched for row in level.rows.values() if row.reason]
    if reasons:
        yield f"not matched ({NONE}): {'; '.join(dict.fromkeys(reasons))}"
    counts = {method: len(content.of_method(method)) for method in content.methods}
    if len({count for count in counts.values() if count}) > 1:
        told_counts = ", ".join(f"{method} {count}" for method, count in counts.items())
        yield (
            f"points by method: {told_counts}; the best of many is luckier than the best of few, so that two methods "
            "count as told apart only where they also are with equally many points of each"
        )
    if len(content.seeds) == 1:
        yield "one seed: the intervals are over items alone, and say nothing of another training"
    elif len(content.seeds) == 2:
        yield "2 seeds: the intervals hold for other trainings as far as two of each method can tell how these differ"


def _against_reference(content: Comparison) -> Iterator[str]:
    """Which methods are told apart from the reference, and where that is not known."""
    reference, messages, unsure = content.reference, 0, list[str]()
    for level in content.matched:
        for method, row in level.rows.items():
            for score in MATCHED:
                result = row.differences[score]
                if result and result.low is None:
                    unsure.append(f"{method} at {number(level.speciality)} ({draws_share(result)} inside)")
                elif result and result.is_shown:
                    messages += 1
                    yield (
                        f"{method} at speciality {number(level.speciality)}: {score} {signed(result.value)} "
                        f"{_interval(result)} against {reference}"
                    )
    if unsure:
        yield (
            "no interval, as the speciality lies outside of the points' range in too many draws: "
            f"{'; '.join(dict.fromkeys(unsure))}"
        )
    if not content.matched:
        yield f"nothing is matched: no run of {reference} has learnt anything, or none has finished"
    elif not messages:
        rows = [row for level in content.matched for row in level.rows.values()]
        results = [result for row in rows for result in row.differences.values() if result]
        wide = any(result.low_corrected is not None for result in results)
        corrected = f", corrected for {len(content.matched)} levels" if wide else ""
        fewer = any(result.leaves_out_zero for result in results)
        equal = ", or does so with equally many points of each method" if fewer else ""
        yield (
            f"no method is told apart from {reference} at matched speciality: every interval contains 0{corrected}"
            f"{equal}"
        )


def _against_controls(content: Comparison) -> Iterator[str]:
    """A sentence for each masked method and each control: the mask's own worth, told apart from nothing or not."""
    for held in content.against_controls:
        control = held.control
        for method in dict.fromkeys(m for level in held.matched for m in level.rows if m != control):
            parts = [
                f"{signed(result.value)} {_interval(result)} at speciality {number(level.speciality)}"
                for level in held.matched
                if (result := level.rows[method].differences["versatility"])
            ]
            message = ", ".join(parts) or "nowhere matched"
            yield f"{method} against the control {control}: versatility {message}"


def _difference(result: Difference | None) -> Text:
    """A difference and its interval; without one where the level lies outside of a method's range in most draws."""
    if result is None:
        return Text("")
    style = "" if not result.is_shown else "green" if result.value > 0 else "red"
    return Text.assemble((signed(result.value), style), " ", _interval(result))


def _interval(result: Difference) -> str:
    """An interval, with the share of the draws that it rests on where that is not all of them."""
    if result.low is None:
        return f"(no interval; {draws_share(result)} inside)"
    part = "" if result.draws_inside == 1 else f"; {draws_share(result)} inside"
    return f"({signed(result.low)} to {signed(result.high)}{part})"


def draws_share(result: Difference) -> str:
    """The share of the draws with the speciality inside of the points' range; all of them alone is 100 %."""
    return f"{math.floor(100 * result.draws_inside)} %"
