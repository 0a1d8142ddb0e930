"""The evaluation's progress: items over all tasks, counted by the requests that are answered."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from cofitune.reports.evaluation.progress import EvalProgress


def test_items_are_counted_over_all_tasks() -> None:
    output = StringIO()
    with EvalProgress(Console(file=output, force_terminal=True, width=100), "run", items=30) as progress:
        counts = []
        for title, items, requests in (("law", 10, 10), ("mmlu", 20, 80)):
            progress.start(title, items)
            counts.append(progress.done)
            progress.advance(requests // 2, requests)
            counts.append(progress.done)
        progress.advance(80, 80)
    assert [*counts, progress.done] == [0, 5, 10, 20, 30]
    assert "run: mmlu" in output.getvalue() and "30/30" in output.getvalue() and "left" in output.getvalue()


def test_brackets_in_a_models_name_are_no_markup() -> None:
    output = StringIO()
    with EvalProgress(Console(file=output, force_terminal=True, width=100), "runs/[/law]", items=3) as progress:
        progress.start("[bold]", 3)
    assert "runs/[/law]: [bold]" in output.getvalue()


def test_without_a_terminal_nothing_is_drawn() -> None:
    output = StringIO()
    with EvalProgress(Console(file=output), "run", items=3) as progress:
        progress.start("law", 3)
        progress.advance(3, 3)
    assert output.getvalue() == ""
