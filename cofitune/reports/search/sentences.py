"""A search in sentences: who won and why, who ties with it, what was not tried, and what the proxy was worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cofitune.model.region import Region
from cofitune.reports.search.row import SCORES, Row
from cofitune.reports.text import many, region_text, weights_text

TRAINED_ONCE = (
    "Each region was trained once: these intervals are over items, and another seed may move a score by more."
)
# the best of many noisy scores is also the luckiest: its score falls when the same region is scored on other items
LUCKIEST = "Its score is the best of {count} on these items, and so too high by some luck: trust `eval` on test items."
SHOWN = 3  # regions that a sentence names before it says how many more there are


@dataclass(frozen=True)
class Aim:
    """What decided: a score's name and, where there is one, the floor of the other, in points against the base."""

    score: str = "unified"
    floor: float | None = None

    @property
    def kept(self) -> str:
        """The score that the floor is for."""
        return "versatility" if self.score == "speciality" else "speciality"

    def value(self, row: Row) -> float | None:
        """A row's deciding score."""
        value: float | None = getattr(row, self.score)
        return value


UNIFIED = Aim()


def winner_sentence(
    base: Row, rows: Sequence[Row], winner: str, runner_up: str | None = None, aim: Aim = UNIFIED
) -> str:
    """Who won and why, in one sentence, and who came second."""
    by_id = {row.id: row for row in rows}
    won = by_id[winner]
    gains = f"speciality {SCORES.change(won.speciality, base.speciality)}, versatility " + SCORES.change(
        won.versatility, base.versatility
    )
    text = (
        f"Winner: {region_text(won.region)}, with {_why(won, rows, aim)} ({SCORES.number(aim.value(won))}; against the "
        f"base: {gains})"
    )
    second = by_id.get(runner_up or "")
    if second is None:
        text += "; there is no runner-up."
    else:
        equal = (aim.value(second), second.missed) == (aim.value(won), won.missed)
        lead = f", tied, but it trains {_more(won, second)}" if equal else f" ({SCORES.number(aim.value(second))})"
        text += f"; runner-up: {region_text(second.region)}{lead}."
    before, after = aim.value(base), aim.value(won)
    if before is not None and after is not None and after <= before:
        text += f" No region beats the untouched base ({aim.score} {SCORES.number(before)}) in this many steps."
    return text


def tie_sentence(rows: Sequence[Row], winner: str) -> str | None:
    """Which regions cannot be told apart from the winner, and the smallest of them; None where nothing is known.

    What lies further below the floor than the winner has lost by that, whatever its deciding score: it is only counted.
    """
    won = next(row for row in rows if row.id == winner)
    known = [row for row in rows if row.behind is not None]
    compared = [row for row in known if row.missed <= won.missed]
    lost = len(known) - len(compared)
    left_out = f"Not counted: {many(lost, 'region')} {'further ' if won.missed else ''}below the floor." if lost else ""
    sentences = [_ties(won, compared), TRAINED_ONCE] if compared else []
    if any(row.tied for row in compared):
        sentences.append(LUCKIEST.format(count=len(compared) + 1))
    sentences.append(left_out)
    return " ".join(filter(None, sentences)) or None


def _ties(won: Row, compared: Sequence[Row]) -> str:
    tied = [row for row in compared if row.tied]
    if not tied:
        return "No other region is within chance of it: the 95 % interval of every paired difference lies below 0."
    verb = "region" if len(tied) == 1 else "regions"
    text = f"{len(tied)} {verb} cannot be told apart from it (the 95 % interval of the paired difference contains 0)"
    smallest = min(tied, key=lambda row: (row.num_trained, -(row.behind or (0.0,))[0]))
    if smallest.num_trained >= won.num_trained:
        return text + "; none of them has fewer weights."
    behind, low, high = smallest.behind or (0.0, 0.0, 0.0)
    return (
        f"{text}; the one with the fewest weights is {region_text(smallest.region)} "
        f"({weights_text(smallest.num_trained)} against {weights_text(won.num_trained)}; {behind:+.1f}, {low:+.1f} to "
        f"{high:+.1f})."
    )


def untried_sentence(reason: str | None, regions: Sequence[Region], levels: Sequence[str]) -> str | None:
    """What a budget left untried; None where the search went to its end."""
    if reason is None:
        return None
    missing = [f"{_some(regions)} not trained to the end"] if regions else []
    missing += [f"not begun: {'; '.join(levels)}"] if levels else []
    left = "; ".join(missing)
    return f"{reason} ended the search, and this is the best so far ({left}). With a larger one it continues from here."


def pruned_sentence(regions: Sequence[Region]) -> str | None:
    """What the proxy left out; None where it left out nothing."""
    return f"Left out by the proxy: {_some(regions)}." if regions else None


def proxy_sentence(correlation: float | None, count: int) -> str:
    """How well the proxy's order agrees with the scores."""
    trials = many(count, "finished trial")
    if correlation is None:
        return f"The proxy cannot be judged by {trials}."
    return f"The proxy's rank correlation with the scores of {trials} is {correlation:+.2f} (Spearman)."


def stopped_sentence(rows: Sequence[Row]) -> str | None:
    """How many trials were stopped on the way; None where none was."""
    stopped = [row for row in rows if row.status == "stopped"]
    if not stopped:
        return None
    steps = sorted({row.steps for row in stopped})
    return (
        f"{many(len(stopped), 'trial')} stopped early, after {' or '.join(map(str, steps))} steps, and could not win."
    )


def _why(won: Row, rows: Sequence[Row], aim: Aim) -> str:
    finished = [row for row in rows if row.finished]
    if aim.floor is None:
        return f"the highest {aim.score} score of {many(len(finished), 'finished trial')}"
    kept = [row for row in finished if not row.missed]
    floor = f"{aim.kept} of {aim.floor:+g} points against the base"
    if won.missed:
        return f"{aim.kept} nearest to the floor, which no finished trial keeps ({floor}): {won.missed:.1f} below it"
    return f"the highest {aim.score} of the {len(kept)} of {many(len(finished), 'finished trial')} that keep {floor}"


def _more(won: Row, second: Row) -> str:
    return "more weights" if second.num_trained > won.num_trained else "as many weights further up"


def _some(regions: Sequence[Region]) -> str:
    named = ", ".join(map(region_text, regions[:SHOWN]))
    return named + (f" and {len(regions) - SHOWN} more" if len(regions) > SHOWN else "")
