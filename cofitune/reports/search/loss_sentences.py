"""A search by losses in sentences: who drifts least at equal speciality loss, and how far another seed moves that."""

from __future__ import annotations

from collections.abc import Sequence

from cofitune.reports.search.row import LOSSES, Row
from cofitune.reports.text import many, region_text

ONE_SEED = (
    "Each region was trained with one seed: what ties lies within search.tolerance of the least drift; how far another "
    "seed moves it search.repeat: 2 finds out."
)


def loss_winner_sentence(
    base: Row, rows: Sequence[Row], winner: str, runner_up: str | None, common: float | None
) -> str:
    """Who won and why, and who came second.

    Args:
        common: the speciality loss at which trials are compared, in nats a token; None: none came below the base's.
    """
    by_id = {row.id: row for row in rows}
    won, second = by_id[winner], by_id.get(runner_up or "")
    number, finished = LOSSES.number, [row for row in rows if row.finished]
    if common is None:
        return (
            f"Winner: {region_text(won.region)}, with the lowest speciality loss of "
            f"{many(len(finished), 'finished trial')} ({number(won.speciality)} nats a token). No region lowers the "
            f"base's ({number(base.speciality)}) in this many steps, so drift could not decide."
        )
    reached = [row for row in finished if row.unified is not None]
    least = min((row.unified for row in reached if row.unified is not None), default=None)
    tied = least is not None and won.unified is not None and won.unified > least
    what = "the least drift"
    if tied and any(row.tied and row.num_trained < won.num_trained for row in reached):
        what = "the lowest loss of those with about the fewest weights that tie for the least drift"
    elif tied:
        what = "the fewest weights of those that tie for the least drift"
    text = (
        f"Winner: {region_text(won.region)}, with {what} at equal speciality loss of the {len(reached)} of "
        f"{many(len(finished), 'finished trial')} that reach it ({number(won.unified)} nats a token at a loss of "
        f"{number(common)}; the base's is {number(base.speciality)}, lower is better); its whole training ends at "
        f"{LOSSES.brief(won, None)}"
    )
    if second is None:
        return text + "; there is no runner-up."
    lead = f"{number(second.unified)}" if second.unified is not None else "it does not reach that loss"
    return f"{text}; runner-up: {region_text(second.region)} ({lead})."


def margin_sentence(base: Row, won: Row) -> str | None:
    """What became of the likelihood of right choices; None where none were asked."""
    parts = [
        f"{name} {won.margins[name]:+.3f} ({LOSSES.change(won.margins[name], base.margins.get(name))})"
        for name in sorted(won.margins)
    ]
    if not parts:
        return None
    return (
        "Its margins of the right choice over the likeliest wrong one, in nats, with the change against the base "
        f"(higher is better): {', '.join(parts)}."
    )


def reliability_sentence(
    seeds: int, regions: int, correlation: float | None, error: float | None, unit: str, tied: int, others: int
) -> str:
    """How far a seed moves what decides.

    Args:
        seeds: that each of `regions` was trained with.
        correlation: Spearman's between seeds, their mean where there are several pairs.
        error: standard error of a region's mean over the seeds, in `unit`.
        tied: regions that cannot be told from the winner by it, of `others`.
    """
    begin = f"{many(seeds, 'seed')} of the {many(regions, 'leading region')}"
    if error is None:
        return f"{begin}: too few of them ended with a figure to say how far a seed moves it."
    agree = "cannot be told (fewer than three regions)" if correlation is None else f"{correlation:+.2f} (Spearman)"
    verb = "ties" if tied == 1 else "tie"
    return (
        f"{begin}: the rank correlation between seeds is {agree}, the standard error of a region's mean {error:.2g} "
        f"{unit}; {tied} of {many(others, 'other region')} {verb} with the winner within it (95 %)."
    )


def race_sentence(
    leaders: int,
    further: int,
    seeds: int,
    left: int,
    reason: str,
    deviation: float | None,
    unit: str,
    tied: int,
    others: int,
) -> str:
    """How rounds of further seeds ended.

    Args:
        leaders: regions that the rounds began with.
        further: trainings with a further seed.
        seeds: that those which stayed longest have.
        left: regions that no round told from the best beyond chance.
        reason: why the rounds ended.
        deviation: of one training, in `unit`; None where it is not known.
        tied: regions that cannot be told from the winner by it, of `others`.
    """
    begin = f"Rounds of seeds over the {many(leaders, 'leading region')}: {many(further, 'further training')}"
    if deviation is None:
        return f"{begin}, too few with a figure to say how far a seed moves it (ended by {reason})."
    verb = "ties" if tied == 1 else "tie"
    return (
        f"{begin}, up to {many(seeds, 'seed')} a region, until {left} of them "
        f"{'was' if left == 1 else 'were'} left that no round told from the best beyond chance (95 % for all rounds "
        f"together; ended by {reason}). A seed moves one training by {deviation:.2g} {unit} (standard deviation); "
        f"{tied} of {many(others, 'other region')} {verb} with the winner within it (95 %)."
    )
