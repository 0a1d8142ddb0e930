"""The rows of a report's table of trials."""

from __future__ import annotations

from typing import Any

from cofitune.reports.search.rows import trial_rows


def entry(name: str, *points: tuple[float, float], **more: Any) -> dict[str, Any]:
    curve = [{"steps": 5 * n, "loss": loss, "drift": drift} for n, (loss, drift) in enumerate(points)]
    region = {"layers": "0", "modules": ["up_proj"]}
    return {"id": name, "parent": None, "region": region, "status": "done", "steps": 10, "curve": curve, **more}


def test_a_search_on_losses_tells_them_in_words() -> None:
    base = entry("base", (3.0, 0.0), region=None)
    won = entry("won", (2.0, 0.1), (1.5, 0.25), drift_at_common_loss=0.125)
    late = entry("late", (2.9, 0.0), drift_at_common_loss=None, tied=True)
    rows = trial_rows(base, [won, late], "won")
    assert [row.note for row in rows] == [
        "speciality loss 3.000 nats a token",
        "speciality loss 1.500 (-1.500), drift 0.250, at equal loss 0.125 nats a token",
        "speciality loss 2.900 (-0.100), drift 0.000 nats a token; not told apart from the winner",
    ]
