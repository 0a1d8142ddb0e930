"""The page and the picture of `scripts/bench/grid`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grid_truth import TITLES, UNITS, Grid, Results, rank_in

from cofitune.model.region import region_from_dict
from cofitune.reports.text import number, region_text
from cofitune.search.proxy import Statistics, rank_correlation

LEAST_CORRELATION = 0.7  # aimed at: between two seeds, over all regions, under losses
MOST_SECONDS = 0.65  # aimed at: seconds of a trial under losses, of those of the same region's under scores


def report(
    results: Sequence[Results],
    settings: Mapping[str, Any],
    machine: Mapping[str, Any],
    targets: Mapping[str, float],
    regions: int,
) -> str:
    """The page.

    Args:
        targets: by search the share of the grid's seconds that it may take.
        regions: of the whole grid.
    """
    parts = [head(results, settings, machine, regions), comparison(results, regions)]
    for one in results:
        title = f"## Under `measure: {one.grid.measure}` ({TITLES[one.grid.measure]})"
        parts += [title, words(one), searches(one, targets, regions), table(one.grid)]
    return "\n\n".join(parts) + "\n"


def head(results: Sequence[Results], settings: Mapping[str, Any], machine: Mapping[str, Any], regions: int) -> str:
    """What was run, and what is missing of it."""
    missing = [
        f"`{one.grid.measure}`: {len(one.grid.first)} of {regions} regions, {len(one.grid.both)} with both seeds"
        for one in results
        if len(one.grid.both) < regions
    ]
    partial = f"\n\n**Partial**: {'; '.join(missing)}. Call it again with more `--hours`." if missing else ""
    seeds = " and ".join(map(str, sorted(results[0].grid.seeds)))
    where = ", ".join(f"{name} {value}" for name, value in machine.items())
    rehearsed = " a fifth of each step is rehearsal of the base's own answers;" if settings["rehearse"] else ""
    items = settings["items"]
    return f"""# Every region of a small space, and what the searches find of it

`{settings["command"]}`, {where}.{partial}

The model learns law items of at most {settings["max_length"]} tokens for {settings["steps"]} steps of 8, rate 4e-4,
seeds {seeds};{rehearsed} {regions} regions. Under losses: speciality loss on the answers of {items} law items, drift on
half of the base's answers to {settings["prompts"]} general prompts, margins on {items} items of arc_easy and {items} of
piqa; nothing is generated. Under scores: the same {items} law items (squad_match), {items} of arc_easy, {items} of
piqa, {max(1, items // 3)} of ifeval. Other jobs may have run beside, so seconds are noisy.

![the two seeds]({settings["name"]}.png)"""


def comparison(results: Sequence[Results], regions: int) -> str:
    """The measures side by side, and what was aimed at."""
    rows = [
        "## The measures",
        "",
        "`tie`: regions whose mean over the seeds is not told from the best one's by a 95 % t-interval with the pooled",
        "deviation of a training; `by items`: by the paired interval over the items, as one seed alone would say.",
        "",
        "| measure | regions with both seeds | rank correlation between the seeds | deviation of a training | tie with"
        " the best | by items | seconds a trial | of them training, measuring |",
        "|" + "---|" * 8,
    ]
    for one in results:
        grid, parts = one.grid, one.grid.parts()
        total = sum(parts.values()) or 1.0
        rows.append(
            f"| {grid.measure} | {len(grid.both)} of {regions} | {number_text(grid.correlation(), '+.2f')} | "
            f"{number_text(grid.judged().deviation, '.3g')} | {_of(grid.ties())} | {_of(one.tied_by_items)} | "
            f"{grid.seconds() / len(grid.first):.1f} | {parts['train'] / total:.0%}, {parts['evaluate'] / total:.0%} |"
        )
    return "\n".join([*rows, "", *verdicts(results, regions)])


def verdicts(results: Sequence[Results], regions: int) -> list[str]:
    """What was aimed at, and whether it was met."""
    grids = {one.grid.measure: one.grid for one in results}
    loss, score = grids.get("loss"), grids.get("score")
    lines = []
    if loss and (correlation := loss.correlation()) is not None:
        met = "met" if correlation >= LEAST_CORRELATION else "**missed**"
        part = "" if len(loss.both) == regions else f" (over {len(loss.both)} of {regions} regions)"
        lines.append(f"- Rank correlation between two seeds under losses, at least {LEAST_CORRELATION}: {met}{part}.")
    shared = [region for region in loss.first if region in score.first] if loss and score else []
    if loss and score and shared:
        ratio = loss.seconds(shared) / score.seconds(shared)
        met = "met" if ratio <= MOST_SECONDS else "**missed**"
        lines.append(
            f"- Seconds of a trial under losses, at most {MOST_SECONDS} of those under scores: {ratio:.2f} over "
            f"{len(shared)} regions, {met}."
        )
    return lines


def words(one: Results) -> str:
    """What a measure says of the regions, in sentences."""
    grid = one.grid
    truth = grid.truth()
    best = next(iter(truth))
    lines = [
        f"- The best region by the mean over its seeds is **{region_text(best)}** "
        f"({UNITS[grid.measure]}: {_mean(grid, best)})."
    ]
    if grid.common is not None:
        behind = sum(grid.figure(trial) is None for trial in grid.first.values())
        lines.append(
            f"- Compared at a speciality loss of {grid.common:.3f} nats a token; {behind} of {len(grid.first)} regions "
            "do not come down to it with the first seed, and rank behind."
        )
    weights = rank_correlation([float(grid.first[r].num_trained) for r in truth], [-value for value in truth.values()])
    lines.append(
        f"- Rank correlation of the rank (high is good) with the number of trained weights: "
        f"{number_text(weights, '+.2f')}."
    )
    fast = one.searches.get("fast")
    if fast and fast["proxy"]:
        proxy = Statistics(**{name: {m: tuple(v) for m, v in part.items()} for name, part in fast["proxy"].items()})
        guesses = [proxy.proxy_score(region, 0.5) for region in truth]
        correlation = rank_correlation(guesses, [-value for value in truth.values()])
        lines.append(
            f"- Rank correlation of the proxy with the rank of all {len(truth)} regions: "
            f"{number_text(correlation, '+.2f')}."
        )
    return "\n".join(lines)


def searches(one: Results, targets: Mapping[str, float], regions: int) -> str:
    """What each search found, and for how much of the grid's seconds."""
    grid = one.grid
    truth, other = grid.truth(), grid.by_seed(max(grid.seeds))
    rows = [
        "The tree's seconds are those that its trials took inside the grid, whose prefix cache had been filled by",
        "other regions as well; the fast search's are its own run's, its proxy's among them (not among its steps), and",
        "its budget is its share of the grid's seconds. A search sees the first seed alone: the rank of its find with",
        "the other one is unbiased.",
        "",
        "| search | trials | stopped early | left out by the proxy | finds | rank by the mean of seeds | by the other"
        " seed alone | of the grid's steps | of its measurements | of its seconds | aimed at |",
        "|" + "---|" * 11,
    ]
    for name, found in one.searches.items():
        if found is None:
            rows.append(f"| {name} | not run yet |{' |' * 8} {targets[name]:.0%} |")
            continue
        region = region_from_dict(found["winner"])
        share = (found["seconds"] + found["proxy_seconds"]) / grid.seconds()
        verdict = ("met" if share <= targets[name] else "**missed**") if len(grid.first) == regions else "partial grid"
        steps, measured = (part / whole for part, whole in zip(found["work"], grid.work, strict=True))
        rows.append(
            f"| {name} | {found['trials']} | {found['stopped']} | {found['pruned']} | {region_text(region)} | "
            f"{rank_in(truth, region) or '-'} of {len(truth)} | {rank_in(other, region) or '-'} of {len(other)} | "
            f"{steps:.1%} | {measured:.1%} | {share:.1%} | {targets[name]:.0%}: {verdict} |"
        )
    return "\n".join(rows)


def table(grid: Grid) -> str:
    """Every region, the best first."""
    seeds = sorted(grid.seeds)
    ties = set(grid.judged().ties(grid.first[next(iter(grid.truth()))].id))
    what = "speciality loss and drift at the end" if grid.measure == "loss" else "speciality and versatility"
    rows = [
        f"| region | weights | {' | '.join(f'seed {seed}' for seed in seeds)} | tie | {what} | seconds |",
        "|" + "---|" * (5 + len(seeds)),
    ]
    for region in grid.truth():
        trial = grid.first[region]
        own = [grid.seeds[seed].get(region) for seed in seeds]
        cells = " | ".join("" if one is None else _figure(grid, one) for one in own)
        ended = (
            f"{trial.loss:.3f}, {trial.drift:.3f}"
            if grid.measure == "loss"
            else f"{number(trial.speciality)}, {number(trial.versatility)}"
        )
        tie = "≈" if trial.id in ties else ""
        rows.append(
            f"| {region_text(region)} | {trial.num_trained / 1e6:.1f} M | {cells} | {tie} | {ended} | "
            f"{trial.seconds:.0f} |"
        )
    return "\n".join(rows)


def _figure(grid: Grid, trial: Any) -> str:
    value = grid.figure(trial)
    return "behind" if value is None else f"{value:.4f}" if grid.measure == "loss" else f"{value:.1f}"


def _mean(grid: Grid, region: Any) -> str:
    """The figures of a region, seed by seed."""
    return ", ".join(
        _figure(grid, grid.seeds[seed][region]) for seed in sorted(grid.seeds) if region in grid.seeds[seed]
    )


def number_text(value: float | None, form: str) -> str:
    """A number in a form, or a dash."""
    return "–" if value is None else format(value, form)


def _of(pair: tuple[int, int] | None) -> str:
    return "–" if pair is None else f"{pair[0]} of {pair[1]}"
