"""A gate: requirements on what a model may have lost and must have learnt, such as `versatility>=-1.0`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cofitune.errors import UserError, did_you_mean
from cofitune.evaluation.statistics.scores import SUMMARIES

ENDS = ("low", "high")
_FORM = re.compile(r"^\s*(?:(?P<model>[^:<>=]+):)?(?P<score>[^:<>=]+?)\s*(?P<sign>>=|<=)\s*(?P<bound>[^<>=]+)$")


@dataclass(frozen=True)
class Requirement:
    """`[MODEL:]SCORE[.low|.high] >= BOUND` on the change of a score against the base, in points.

    Attributes:
        model: whose change.
        score: a summary score (`SUMMARIES`) or a task's title.
        end: the change itself, or an end of its 95 % interval.
    """

    model: str
    score: str
    end: Literal["value", "low", "high"]
    sign: Literal[">=", "<="]
    bound: float

    @property
    def text(self) -> str:
        """The requirement as one would type it."""
        end = "" if self.end == "value" else f".{self.end}"
        return f"{self.model}:{self.score}{end}{self.sign}{self.bound:+g}"

    def met_by(self, change: Mapping[str, float]) -> bool:
        """Whether a change (`value`, `low` and `high`) satisfies it."""
        return change[self.end] >= self.bound if self.sign == ">=" else change[self.end] <= self.bound


@dataclass(frozen=True)
class Verdict:
    """A requirement, the change that it was held against (`value`, `low`, `high`), and whether it is met."""

    requirement: Requirement
    change: Mapping[str, float]

    @property
    def met(self) -> bool:
        """Whether the requirement is met."""
        return self.requirement.met_by(self.change)

    def as_dict(self) -> dict[str, object]:
        """As JSON takes it."""
        return {"require": self.requirement.text, "met": self.met, **self.change}


def read_requirements(
    texts: Sequence[str], categories: Mapping[str, str], models: Sequence[str], meant: str | None
) -> list[Requirement]:
    """Read what `--require` was given, before any weights load.

    Args:
        categories: each task's category, by title.
        models: names of the models that are compared with the base.
        meant: the one that a requirement without a name speaks of; None where that is not clear.

    Raises:
        UserError: a requirement is malformed, names a score or a model that is not there, or there is no model at all.
    """
    return [_read(text, categories, models, meant) for text in texts]


def judge(
    requirements: Sequence[Requirement], changes: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> list[Verdict]:
    """Hold each requirement against the changes of its model, by the score's name (`value`, `low`, `high`)."""
    return [Verdict(r, {k: changes[r.model][r.score][k] for k in ("value", *ENDS)}) for r in requirements]


def _read(text: str, categories: Mapping[str, str], models: Sequence[str], meant: str | None) -> Requirement:
    where = f"--require {text!r}"
    form = _FORM.match(text)
    bound = _number(form["bound"]) if form else None
    if form is None or bound is None:
        raise UserError(
            f"{where}: write [MODEL:]SCORE>=POINTS or <=, for example 'versatility>=-1.0' (the change against the "
            "base) or 'versatility.low>=-1.0' (the lower end of its interval)"
        )
    if not models:
        raise UserError(f"{where}: there is no model to compare with the base; train the run or name one (--model)")
    model = form["model"] or meant
    if model is None:
        raise UserError(f"{where}: say of which model, as in '{models[0]}:{text.strip()}' (here: {_list(models)})")
    model = model.strip()
    if model not in models:
        raise UserError(f"{where}: no model is called '{model}'{did_you_mean(model, models)} (here: {_list(models)})")
    score, end = _split(form["score"].strip(), categories)
    have = {*categories.values(), "versatility" if set(categories.values()) - {"speciality"} else ""}
    have |= {"unified"} if {"speciality", "versatility"} <= have else set()
    if score not in categories and score not in SUMMARIES:
        known = [*SUMMARIES, *categories]
        raise UserError(f"{where}: no score is called '{score}'{did_you_mean(score, known)} (here: {_list(known)})")
    if score not in categories and score not in have:
        raise UserError(f"{where}: there is no task that {score} could be taken from")
    return Requirement(model, score, end, form["sign"], bound)  # type: ignore[arg-type]


def _split(name: str, titles: Mapping[str, str]) -> tuple[str, Literal["value", "low", "high"]]:
    """A score and the end of its interval; a task's title may end with .low itself."""
    for end in ENDS:
        if name.endswith(f".{end}") and name not in titles:
            return name.removesuffix(f".{end}"), end  # type: ignore[return-value]
    return name, "value"


def _number(text: str) -> float | None:
    try:
        value = float(text.strip().replace("−", "-"))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)
