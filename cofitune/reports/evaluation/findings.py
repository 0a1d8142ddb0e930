"""What a model learnt and what it forgot, in sentences, instruction following apart."""

from __future__ import annotations

from dataclasses import dataclass

from cofitune.reports.evaluation.scores import Change, Comparison, Scores
from cofitune.reports.text import number, signed

PARTS = {"gen_kn": "knowledge", "gen_rs": "reasoning"}


@dataclass(frozen=True)
class Finding:
    """One model against the base; a change counts as shown where its 95 % interval leaves 0 out."""

    model: str
    learnt: str
    forgot: str
    instruct: str


def findings(scores: Scores) -> list[Finding]:
    """One finding a model besides the base, in the order of the table."""
    return [_finding(scores, comparison) for comparison in scores.against_base.values()]


def interval_text(change: Change, digits: int = 1) -> str:
    """`+1.2 (−0.3 to +2.7)`."""
    return f"{signed(change.value, digits)} ({signed(change.low, digits)} to {signed(change.high, digits)})"


def _finding(scores: Scores, comparison: Comparison) -> Finding:
    before, after = scores.models[scores.base], scores.models[comparison.model]
    changes = comparison.summary

    def told(name: str, what: str, rose: str, fell: str, neither: str) -> str:
        change = changes[name]
        if change is None:
            return f"Not known: the evaluation has no task of {name}."
        ends = f"from {number(before.score(name))} to {number(after.score(name))}"
        points = f"{interval_text(change)} points{', no more than a seed alone changes' if change.within_noise else ''}"
        if change.sign:
            return f"{(rose if change.sign > 0 else fell).format(what=what)} {ends}: {points}."
        return f"{neither} {what[0].upper()}{what[1:]} went {ends}: {points}, and the interval contains 0."

    parts = [f"{word} {interval_text(change)}" for name, word in PARTS.items() if (change := changes[name])]
    return Finding(
        model=comparison.model,
        learnt=told("speciality", "speciality", "The {what} rose", "Nothing: the {what} fell", "Not shown."),
        forgot=told("versatility", "versatility", "Nothing: {what} rose", "Its {what} fell", "No loss is shown.")
        + (f" Of it, {' and '.join(parts)}." if parts else ""),
        instruct=told(
            "instruct", "the score", "It follows more of them: {what} rose", "It follows fewer of them: {what} fell",
            "No change is shown.",
        ),
    )  # fmt: skip
