"""What a model learnt and what it forgot, in sentences, instruction following apart. Reads what `scores.json` holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cofitune.reports.text import number, signed

Entry = Mapping[str, Any]
PARTS = {"gen_kn": "knowledge", "gen_rs": "reasoning"}


@dataclass(frozen=True)
class Finding:
    """One model against the base; a change counts as shown where its 95 % interval leaves 0 out."""

    model: str
    learnt: str
    forgot: str
    instruct: str


def findings(scores: Entry) -> list[Finding]:
    """One finding a model besides the base, in the order of the table."""
    base = next(iter(scores["models"]))
    return [_finding(scores, base, c) for c in scores["comparisons"] if c["against"] == base]


def interval_text(change: Entry, digits: int = 1) -> str:
    """`+1.2 (−0.3 to +2.7)`."""
    value, low, high = (signed(change[part], digits) for part in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _finding(scores: Entry, base: str, comparison: Entry) -> Finding:
    before, after = scores["models"][base], scores["models"][comparison["model"]]
    changes = comparison["summary"]

    def told(name: str, what: str, rose: str, fell: str, neither: str) -> str:
        change = changes[name]
        if change is None:
            return f"Not known: the evaluation has no task of {name}."
        ends = f"from {number(_score(before, name))} to {number(_score(after, name))}"
        points = f"{interval_text(change)} points{', less than the seeds differ' if change['within_noise'] else ''}"
        if change["low"] > 0:
            return f"{rose.format(what=what)} {ends}: {points}."
        if change["high"] < 0:
            return f"{fell.format(what=what)} {ends}: {points}."
        return f"{neither} {what[0].upper()}{what[1:]} went {ends}: {points}, and the interval contains 0."

    parts = [f"{word} {interval_text(changes[name])}" for name, word in PARTS.items() if changes[name]]
    return Finding(
        model=comparison["model"],
        learnt=told("speciality", "speciality", "The {what} rose", "Nothing: the {what} fell", "Not shown."),
        forgot=told("versatility", "versatility", "Nothing: {what} rose", "Its {what} fell", "No loss is shown.")
        + (f" Of it, {' and '.join(parts)}." if parts else ""),
        instruct=told(
            "instruct", "the score", "It follows more of them: {what} rose", "It follows fewer of them: {what} fell",
            "No change is shown.",
        ),
    )  # fmt: skip


def _score(model: Entry, name: str) -> float | None:
    value: float | None = model["categories"][name] if name in model["categories"] else model[name]
    return value
