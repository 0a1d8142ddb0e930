"""The evaluation's progress: items over all tasks, counted by the requests that are answered."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from cofitune.reports.evaluation.progress import EvalProgress


def test_items_are_counted_over_all_tasks() -> None:
    said = StringIO()
    with EvalProgress(Console(file=said, force_terminal=True, width=100), "run", items=30) as progress:
        counts = []
        for title, items, requests in (("law", 10, 10), ("mmlu", 20, 80)):
            progress.start(title, items)
            counts.append(progress.done)
            progress.advance(requests // 2, requests)
            counts.append(progress.done)
        progress.advance(80, 80)
    assert [*counts, progress.done] == [0, 5, 10, 20, 30]
    assert "run: mmlu" in said.getvalue() and "30/30" in said.getvalue() and "left" in said.getvalue()


def test_without_a_terminal_nothing_is_drawn() -> None:
    said = StringIO()
    with EvalProgress(Console(file=said), "run", items=3) as progress:
        progress.start("law", 3)
        progress.advance(3, 3)
    assert said.getvalue() == ""
