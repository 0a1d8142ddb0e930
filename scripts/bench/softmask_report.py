"""From the store of runs to softmask.md: tables, and in words what the mask did and did not do."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Chosen = dict[str, Any]  # set → the items of each resample, int64 [R, items]
GENERAL = ("replay", "math", "user")
RESAMPLES = 2000
COMMAND = "scripts/bench/softmask --data FOLDER"
USUAL = {"steps": 24, "test_items": 48, "importance_items": 66, "adamw_rate": 4e-4, "sgd_rate": 0.2, "device": "cpu"}


@dataclass(frozen=True)
class Run:
    """One condition under one seed (of the order of the data, and of a shuffled mask)."""

    optimizer: str
    mask: str
    importance: str = "kl"
    control: str = "none"
    region: str = "up+down"
    seed: int = 0

    @property
    def title(self) -> str:
        """The condition in words, without its seed."""
        if self.mask == "none":
            return f"{self.optimizer}, {self.region}, no mask"
        control = "" if self.control == "none" else f", {self.control}"
        return f"{self.optimizer}, {self.region}, {self.mask}, {self.importance}{control}"


def _block(optimizer: str, region: str, seed: int, rows: Iterable[tuple[str, str, str]]) -> list[Run]:
    return [Run(optimizer, mask, importance, control, region, seed) for mask, importance, control in rows]


PAPERS = [  # mask, importance, control
    ("none", "kl", "none"),
    ("update", "kl", "none"),
    ("update", "kl", "uniform"),
    ("update", "kl", "shuffled"),
    ("gradient", "kl", "none"),
]
OTHERS = [
    ("update", "fisher", "none"),
    ("update", "fisher", "uniform"),
    ("update", "fisher", "shuffled"),
    ("update", "absolute", "none"),
]
GRADIENT_CONTROLS = [("gradient", "kl", "uniform"), ("gradient", "kl", "shuffled")]
CONDITIONS = (  # the study, in the order of importance: what is cut off by the time matters least
    _block("AdamW", "up+down", 0, PAPERS + OTHERS)
    + _block("AdamW", "up+down", 1, PAPERS[:4])
    + _block("SGD", "up+down", 0, [PAPERS[0], PAPERS[1], PAPERS[4]])
)
FURTHER = (  # what `--further` adds
    _block("AdamW", "up+down", 1, PAPERS[4:] + OTHERS)
    + _block("SGD", "up+down", 0, PAPERS[2:4])
    + _block("AdamW", "all", 0, PAPERS[:4])
    + _block("SGD", "up+down", 1, PAPERS)
    + _block("AdamW", "all", 1, PAPERS[:4])
    + [run for s in (0, 1) for run in _block("AdamW", "up+down", s, [("update", "absolute", "shuffled")])]
    + [run for s in (0, 1) for run in _block("SGD", "up+down", s, GRADIENT_CONTROLS)]
)
COMPARED = [  # what is asked of the runs: condition, its control, in words
    (("update", "kl", "none"), ("update", "kl", "uniform"), "the paper's importance against one factor for all"),
    (("update", "kl", "none"), ("update", "kl", "shuffled"), "the paper's importance against itself shuffled"),
    (("update", "fisher", "none"), ("update", "fisher", "uniform"), "fisher against one factor for all"),
    (("update", "fisher", "none"), ("update", "fisher", "shuffled"), "fisher against itself shuffled"),
    # ranks have one mean, so that fisher's one factor is absolute's too
    (("update", "absolute", "none"), ("update", "fisher", "uniform"), "absolute against one factor for all"),
    (("update", "absolute", "none"), ("update", "absolute", "shuffled"), "absolute against itself shuffled"),
    (("gradient", "kl", "none"), ("none", "kl", "none"), "the gradient mask against none"),
    (("gradient", "kl", "none"), ("gradient", "kl", "uniform"), "the gradient mask against one factor for all"),
    (("gradient", "kl", "none"), ("gradient", "kl", "shuffled"), "the gradient mask against itself shuffled"),
    (("update", "kl", "none"), ("none", "kl", "none"), "the update mask against none"),
]


@dataclass(frozen=True)
class Result:
    """A finished run: `losses[set]` is [1 + evaluations, items, 2] (nats, tokens), the base first; `steps` alike."""

    run: Run
    steps: Array
    losses: dict[str, Array]
    displacement: list[float]
    mean_factor: float
    seconds: float

    def curve(self, chosen: Chosen | None = None) -> tuple[Array, Array]:
        """Law loss and change of the general loss at each evaluation: [E], or [E, R] for R resamples of the items."""
        means = {}
        for name, losses in self.losses.items():
            sums = losses.sum(axis=1) if chosen is None else losses[:, chosen[name]].sum(axis=2)
            means[name] = sums[..., 0] / sums[..., 1]
        general = np.mean([means[name] - means[name][0] for name in GENERAL], axis=0)
        return means["law"], general


def is_same_study(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether runs of both may stand in one table: the same settings, model and data, on the same kind of device."""
    alike = all(one[part] == other[part] for part in ("settings", "model", "data"))
    return alike and one.get("device", "cpu") == other.get("device", "cpu")


def write_report(store: Path, report: Path) -> None:
    """Make the report again from the store's runs of its latest settings; what is unfinished is called so."""
    lines = [json.loads(line) for line in store.read_text(encoding="utf-8").splitlines()]
    study = lines[-1]["study"]
    same = [line for line in lines if is_same_study(line["study"], study)]
    results = {run: result for run, result in ((r.run, r) for r in map(_result, same)) if run in CONDITIONS + FURTHER}
    parts = [
        _head(study, results, store.name, len(lines) - len(same)),
        _verdict(results),
        _equal_steps(results),
        _equal_law(results),
        _deciles(results),
        _reliability(study["reliability"]),
    ]
    report.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _result(line: dict[str, Any]) -> Result:
    points = [{"step": 0, **line["study"]["base"]}, *line["trajectory"]]
    losses = {name: np.array([p[name] for p in points], dtype=float) for name in ("law", *GENERAL)}
    return Result(
        Run(**line["run"]), np.array([p["step"] for p in points], dtype=float), losses, line["displacement"],
        line["mean_factor"], line["seconds"],
    )  # fmt: skip


def _typed(study: dict[str, Any], made: Iterable[Run]) -> str:
    """The command that makes the study: what differs from the usual options is named."""
    given = study["settings"] | {"device": study.get("device", "cpu")}
    options = "".join(f" --{n.replace('_', '-')} {given[n]}" for n, usual in USUAL.items() if given[n] != usual)
    return COMMAND + (" --further" if set(made) & set(FURTHER) else "") + options


def _head(study: dict[str, Any], results: dict[Run, Result], store: str, others: int) -> str:
    settings, missing = study["settings"], [r for r in CONDITIONS if r not in results]
    state = f"The study's {len(CONDITIONS)} runs are there.{_not_in_it(results)}" if not missing else (
        f"**Partial: {len(CONDITIONS) - len(missing)} of {len(CONDITIONS)} runs.** Not made yet: "
        + "; ".join(f"{r.title} (seed {r.seed})" for r in missing[:4]) + ("; …" if len(missing) > 4 else "") + "."
    )  # fmt: skip
    base = {n: sum(s for s, _ in study["base"][n]) / sum(t for _, t in study["base"][n]) for n in study["base"]}
    message = ", ".join(f"{name} {loss:.3f}" for name, loss in base.items())
    return f"""# What the soft mask does

Made by `{_typed(study, results)}` from `{store}`, which holds every run. {state}

SmolLM2-135M-Instruct (from a 4-bit GGUF, dequantised to fp32), layers {settings["layers"]}, trained on law (short
answers): {settings["steps"]} steps × {settings["items_a_step"]} items, cosine, clip 1, AdamW {settings["adamw_rate"]:g}
(weight decay 0.1), SGD {settings["sgd_rate"]:g} (no momentum, no decay).
Tested on {settings["test_items"]} law items and {settings["test_items"]} general ones (a third each of replay, math and
user_oriented); importance from {settings["importance_items"]} other general items. Losses are nats an answer token;
base: {message}. Only items of at most {settings["longest"]} tokens.
{study.get("machine", "CPU")}; {sum(r.seconds for r in results.values()) / 60:.0f} minutes of runs.{_ignored(others)}

*uniform*: one factor, the mask's mean, for every unit of a weight, which is a smaller learning rate and nothing else.
*shuffled*: the mask's own factors, dealt to other units of the layer. A benefit counts only over both."""


def _not_in_it(results: Iterable[Run]) -> str:
    """What of `--further` was not made, in one sentence."""
    made = set(results)
    missing = [run for run in FURTHER if run not in made]
    parts = {
        "more seeds": any(r.seed > 0 for r in missing),
        "SGD's controls": any(r.optimizer == "SGD" and r.control != "none" and r.seed == 0 for r in missing),
        "the region of all modules": any(r.region == "all" and r.seed == 0 for r in missing),
        "absolute shuffled": any((r.importance, r.control, r.seed) == ("absolute", "shuffled", 0) for r in missing),
    }
    names = [name for name, lacks in parts.items() if lacks]
    return f" Not among them (`--further` makes them): {', '.join(names)}." if names else ""


def _ignored(others: int) -> str:
    return f" {others} runs of other settings in the store are left out." if others else ""


def _conditions(results: dict[Run, Result]) -> list[tuple[str, list[Result]]]:
    """Titles with their seeds' results, in the order of the study."""
    every = CONDITIONS + FURTHER
    titles = dict.fromkeys(r.title for r in every)
    found = [(t, [results[r] for r in every if r.title == t and r in results]) for t in titles]
    return [(title, seeds) for title, seeds in found if seeds]


def _equal_steps(results: dict[Run, Result]) -> str:
    rows = [
        "## After equal steps",
        "",
        "General is the mean change of the three sets' losses against the base: positive is forgetting.",
        "",
        "| condition | seeds | mean factor | law loss | general | replay | math | user |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for title, seeds in _conditions(results):
        law, general = ([s.curve()[i][-1] for s in seeds] for i in (0, 1))
        each = [np.mean([_set_change(s, name) for s in seeds]) for name in GENERAL]
        rows.append(
            f"| {title} | {len(seeds)} | {np.mean([s.mean_factor for s in seeds]):.2f} | {_spread(law, '.3f')} | "
            f"{_spread(general, '+.3f')} | " + " | ".join(f"{value:+.3f}" for value in each) + " |"
        )
    return "\n".join(rows)


def _set_change(result: Result, name: str) -> float:
    means = result.losses[name][..., 0].sum(axis=1) / result.losses[name][..., 1].sum(axis=1)
    return float(means[-1] - means[0])


def _spread(values: list[float], form: str) -> str:
    """The seeds' mean, and each seed's value where there are several."""
    mean = f"{np.mean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ({', '.join(f'{v:{form}}' for v in values)})"


def _equal_law(results: dict[Run, Result]) -> str:
    rows = [
        "## At equal speciality",
        "",
        "General loss where each run's law loss first reaches the best that all runs of its optimizer, region and seed "
        "reach, linear between evaluations; difference to the control with a 95 % interval over items (paired "
        f"bootstrap, {RESAMPLES} resamples; it knows nothing of the spread between seeds). Negative: forgets less.",
        "",
        "| optimizer, region | question | condition | control | difference | 95 % | at equal steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for where, question, pairs in _questions(results):
        target = _targets(results)
        one, other = (np.mean([_at_law(p[i], target[_group(p[i].run)]) for p in pairs]) for i in (0, 1))
        difference, low, high = _interval(pairs, results)
        steps = np.mean([p[0].curve()[1][-1] - p[1].curve()[1][-1] for p in pairs])
        rows.append(
            f"| {where} ({len(pairs)} seed{'s' if len(pairs) > 1 else ''}) | {question} | {one:+.3f} | {other:+.3f} | "
            f"{difference:+.3f} | {low:+.3f} … {high:+.3f} | {steps:+.3f} |"
        )
    return "\n".join(rows)


Pairs = list[tuple[Result, Result]]


def _questions(results: dict[Run, Result]) -> list[tuple[str, str, Pairs]]:
    """Each question that the finished runs can answer: where, in words, a pair of results a seed."""
    found = []
    for optimizer, region in dict.fromkeys((r.optimizer, r.region) for r in CONDITIONS + FURTHER):
        for condition, control, words in COMPARED:
            pairs = []
            for seed in (0, 1):
                both = [Run(optimizer, m, i, c, region, seed) for m, i, c in (condition, control)]
                if all(run in results for run in both):
                    pairs.append((results[both[0]], results[both[1]]))
            if pairs:
                found.append((f"{optimizer}, {region}", words, pairs))
    return found


def _group(run: Run) -> tuple[str, str, int]:
    return (run.optimizer, run.region, run.seed)


def _targets(results: dict[Run, Result], chosen: Chosen | None = None) -> dict[tuple[str, str, int], Any]:
    """The law loss that every run of a group reaches, the worst of the runs' best: a number, or [R] for resamples."""
    found: dict[tuple[str, str, int], Any] = {}
    for run, result in results.items():
        best = result.curve(chosen)[0].min(axis=0)
        found[_group(run)] = np.maximum(found.get(_group(run), -np.inf), best)
    return found


def _at_law(result: Result, target: Any, chosen: Chosen | None = None) -> Any:
    """The general change at the first point where the law loss falls to `target` (a number, or [R] for resamples).

    Where it never does, the general change at the last evaluation.
    """
    law, general = result.curve(chosen)
    found, reached = np.array(general[-1]), np.zeros_like(general[-1], dtype=bool)
    for i in range(1, len(law)):
        fall = law[i - 1] - law[i]
        share = np.clip((law[i - 1] - target) / np.where(fall > 0, fall, 1.0), 0.0, 1.0)
        here = ~reached & (law[i] <= target)
        found = np.where(here, general[i - 1] + share * (general[i] - general[i - 1]), found)
        reached |= law[i] <= target
    return found


def _interval(pairs: Pairs, results: dict[Run, Result]) -> tuple[float, float, float]:
    """The seeds' mean difference at equal law loss, and its 95 % interval over items.

    A resample is read off as the items themselves are: where all runs of the group, not the pair alone, get to on it.
    """
    generator = np.random.default_rng(0)
    losses = pairs[0][0].losses.items()
    chosen = {name: generator.integers(0, v.shape[1], (RESAMPLES, v.shape[1])) for name, v in losses}
    groups = {_group(one.run) for one, _ in pairs}
    group = {run: result for run, result in results.items() if _group(run) in groups}
    point = np.mean(_differences(pairs, _targets(group)))
    resampled = np.mean(_differences(pairs, _targets(group, chosen), chosen), axis=0)
    low, high = np.quantile(resampled, (0.025, 0.975))
    return float(point), float(low), float(high)


def _differences(pairs: Pairs, targets: dict[tuple[str, str, int], Any], chosen: Chosen | None = None) -> list[Any]:
    """Of each pair, the first's general change minus the second's, both at their group's law loss."""
    at = [(one, other, targets[_group(one.run)]) for one, other in pairs]
    return [_at_law(one, target, chosen) - _at_law(other, target, chosen) for one, other, target in at]


def _verdict(results: dict[Run, Result]) -> str:
    """Each question's answer, from its interval: less, more, or nothing that these items can show."""
    rows = ["## In words", ""]
    for where, question, pairs in _questions(results):
        difference, low, high = _interval(pairs, results)
        seen = "forgets less" if high < 0 else "forgets more" if low > 0 else "no difference is seen"
        rows.append(
            f"- {where}: {question}, at equal law loss: **{seen}** ({difference:+.3f}, {low:+.3f} … {high:+.3f})."
        )
    for (title, seeds), free in _moved(results):
        least, most = (np.mean([s.displacement[i] / free.displacement[i] for s in seeds]) for i in (0, -1))
        rows.append(
            f"- {title}: the least important tenth of the units moves {least:.0%} and the most important tenth "
            f"{most:.0%} as far as without a mask."
        )
    return "\n".join(rows)


def _moved(results: dict[Run, Result]) -> list[tuple[tuple[str, list[Result]], Result]]:
    """Masks by the paper's importance, each with the unmasked run of its first seed."""
    found = []
    for title, seeds in _conditions(results):
        run = seeds[0].run
        free = results.get(Run(run.optimizer, "none", "kl", "none", run.region, run.seed))
        if free is not None and run.mask != "none" and run.importance == "kl":
            found.append(((title, seeds), free))
    return found


def _deciles(results: dict[Run, Result]) -> str:
    rows = [
        "## Displacement by importance",
        "",
        "Mean ‖Δw‖/‖w‖ (%) of the units' rows, by tenths of the importance named (for no mask: the paper's).",
        "",
        "| condition | least | " + " | ".join(str(i) for i in range(2, 10)) + " | most |",
        "|---|" + "---|" * 10,
    ]
    for title, seeds in _conditions(results):
        means = np.mean([s.displacement for s in seeds], axis=0)
        rows.append(f"| {title} | " + " | ".join(f"{100 * m:.2f}" for m in means) + " |")
    return "\n".join(rows)


def _reliability(reliability: dict[str, dict[str, float]]) -> str:
    rows = [
        "## Is the importance itself reproducible?",
        "",
        "Rank correlation, within a layer, of the importance from one half of its data with that from the other half.",
        "",
        "| importance | attention heads | FFN neurons | FFN outputs |",
        "|---|---|---|---|",
    ]
    for name, kinds in reliability.items():
        rows.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in kinds.values()) + " |")
    return "\n".join(rows)
