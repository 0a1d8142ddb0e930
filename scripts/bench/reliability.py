"""How far importance repeats itself, against items and dropout draws: what `scripts/bench/reliability` runs.

The demo's model and its general data. Each micro-batch's gate gradients are made once and added to every estimator's
sums of even and odd micro-batches, so that one pass gives all estimators at all numbers of items. Reliability is
`cofitune.importance.reliability`: 1 where other data of this size would rank a layer's units alike, 0 for noise.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sides import dump, machine, typed
from torch import Tensor

from cofitune.config.load import load_config
from cofitune.data.batches import Batch
from cofitune.importance.estimate import FISHER, KL_DROPOUT, REDUCTIONS, gate_gradients
from cofitune.importance.gates import virtual_gates
from cofitune.importance.normalize import NORMALIZATIONS
from cofitune.importance.reliability import reliability
from cofitune.importance.sums import HALVES
from cofitune.importance_file import unit_counts
from cofitune.ranks import Rank
from cofitune.recipes.from_config import load_base
from cofitune.recipes.importance.plan import plan_importance
from cofitune.reports.figure import MARKERS, SERIES, draw, write_picture
from cofitune.reports.importance.table import TITLES

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLED = "fisher, sampled labels"  # the Monte Carlo of the expected KL's exact second-order form


@dataclass(frozen=True)
class Estimator:
    """A way from gate gradients to importance; `pairs` of dropout passes are averaged before the reduction."""

    name: str
    source: str
    reduce: str
    normalize: str
    pairs: int = 1


def main() -> None:
    """Measure and write the page, the figures and the picture."""
    given = parse()
    estimators = [
        *(Estimator(f"kl_dropout, {p} draw(s)", KL_DROPOUT, "signed", "zscore_tanh", p) for p in _powers(given.pairs)),
        *(Estimator(f"kl absolute, {p} draw(s)", KL_DROPOUT, "absolute", "rank", p) for p in (1, given.pairs)),
        Estimator("fisher", FISHER, "squared", "rank"),
        Estimator(SAMPLED, SAMPLED, "squared", "rank"),
    ]
    began = time.monotonic()
    rows = list(measure(given, estimators))
    command = typed("scripts/bench/reliability", sys.argv[1:], {given.out: "OUT"})
    content = {"command": command, "machine": machine(), "minutes": round((time.monotonic() - began) / 60, 1),
               "rows": rows}  # fmt: skip
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "reliability.json").write_text(dump(content), encoding="utf-8")
    write_picture(given.out / "reliability", picture(rows))
    page = report(content)
    (given.out / "reliability.md").write_text(page, encoding="utf-8")
    print(page)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="scripts/bench/reliability", description=__doc__)
    parser.add_argument("--items", type=int, default=120, help="general items (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=4, help="dropout draws a micro-batch at most (a power of 2)")
    parser.add_argument("--batch-size", type=int, default=4, help="items a micro-batch (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "scripts" / "bench" / "results")
    return parser.parse_args()


def measure(given: argparse.Namespace, estimators: list[Estimator]) -> Iterator[dict[str, Any]]:
    """One row an estimator and number of items: each unit kind's reliability, and that of its halves."""
    settings = [
        f"importance.max_items={given.items}", f"importance.per_device_batch_size={given.batch_size}",
        f"output_dir={given.out / 'none'}",
    ]  # fmt: skip
    config = load_config(REPOSITORY / "configs" / "demo" / "ledger.yaml", settings)
    plan = plan_importance(config)
    model, anatomy = load_base(config.model), plan.anatomy
    sums = {
        one.name: {
            kind: torch.zeros(HALVES, anatomy.num_layers, n).double() for kind, n in unit_counts(anatomy).items()
        }
        for one in estimators
    }
    at = {round(given.items * share / given.batch_size) for share in (1 / 6, 1 / 3, 1 / 2, 2 / 3, 1)}
    for index, batch in plan.micro_batches(Rank()):
        gradients = every_gradient(model, plan, index, batch, given.pairs, config.importance.dropout)
        for one in estimators:
            for kind, gradient in gradients(one).items():
                sums[one.name][kind][index % HALVES] += REDUCTIONS[one.reduce](gradient)
        print(f"micro-batch {index + 1} of {len(plan.batches)}", file=sys.stderr, flush=True)
        if index and (index + 1 in at or index + 1 == len(plan.batches)):
            for one in estimators:
                found = reliability(
                    sums[one.name], dict.fromkeys(sums[one.name], NORMALIZATIONS[one.normalize]), index + 1
                )
                kinds = {kind: {"whole": r.whole, "split_half": r.split_half} for kind, r in found.items()}
                items = min(given.items, (index + 1) * given.batch_size)
                yield {"estimator": one.name, "draws": one.pairs, "items": items, "kinds": kinds}


def every_gradient(
    model: Any, plan: Any, index: int, batch: Batch, pairs: int, dropout: float
) -> Callable[[Estimator], dict[str, Tensor]]:
    """All gate gradients of a micro-batch; gives those of an estimator."""
    made: dict[tuple[str, int], dict[str, Tensor]] = {}
    with virtual_gates(model, dropout, plan.anatomy) as gates:
        total: dict[str, Tensor] = {}
        for pair in range(pairs):
            found = gate_gradients(model, gates, batch, index, plan.settings.seed, KL_DROPOUT, pair)
            total = {kind: total.get(kind, 0) + gradient for kind, gradient in found.items()}
            made[KL_DROPOUT, pair + 1] = {kind: gradient / (pair + 1) for kind, gradient in total.items()}
    with virtual_gates(model, 0.0, plan.anatomy) as gates:
        made[FISHER, 1] = gate_gradients(model, gates, batch, index, 0, FISHER)
        made[SAMPLED, 1] = gate_gradients(model, gates, sampled(model, batch, index), index, 0, FISHER)
    return lambda one: made[one.source, one.pairs]


def sampled(model: Any, batch: Batch, index: int) -> dict[str, Tensor]:
    """The batch with labels that the model itself draws at every real token, given the tokens before it."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        chances = model(input_ids=ids, attention_mask=mask).logits.float().softmax(-1)
    drawn = torch.multinomial(chances.flatten(0, 1), 1, generator=torch.Generator().manual_seed(index)).view_as(ids)
    labels = torch.full_like(ids, -100)
    labels[:, 1:] = torch.where(mask[:, 1:].bool(), drawn[:, :-1], -100)  # a label says what its own place holds
    return {**batch, "labels": labels}


def picture(rows: list[dict[str, Any]]) -> Any:
    """Reliability against items: a panel a unit kind, a line an estimator."""
    kinds = list(rows[0]["kinds"])
    names = list(dict.fromkeys(row["estimator"] for row in rows))

    def paint(figure: Any, narrow: bool) -> None:
        panels = figure.subplots(*((len(kinds), 1) if narrow else (1, len(kinds))), squeeze=False, sharey=True).ravel()
        for axes, kind in zip(panels, kinds, strict=True):
            for number, name in enumerate(names):
                points = [(row["items"], row["kinds"][kind]["whole"]) for row in rows if row["estimator"] == name]
                style = {"color": SERIES[number % len(SERIES)], "marker": MARKERS[number], "label": name}
                axes.plot(*zip(*points, strict=True), markersize=3, **style)
            axes.set_title(TITLES[kind], loc="left")
            axes.set_xlabel("items")
            axes.set_ylim(0, 1)
        panels[0].set_ylabel("reliability")
        panels[-1].legend(fontsize=5)

    last = [row for row in rows if row["items"] == rows[-1]["items"]]
    told = "; ".join(f"{row['estimator']} {_least(row):.2f}" for row in last)
    caption = "Reliability of importance against the number of items: 1 is best, below 0.5 it is mostly noise."
    return draw("reliability", caption, f"With all items, the least reliable kind: {told}.", paint, (2.6, 6.0))


def report(content: dict[str, Any]) -> str:
    """The figures as a page."""
    rows, where = content["rows"], ", ".join(f"{name} {value}" for name, value in content["machine"].items())
    kinds = list(rows[0]["kinds"])
    lines = [
        "# How far importance repeats itself",
        "",
        f"`{content['command']}`, {where}; {content['minutes']} minutes.",
        "",
        "SmolLM2-135M-Instruct and the demo's general data. Split-half reliability of the normalised importance within",
        "a layer, mean over the layers, for the whole data (Spearman-Brown): 1 is best, below 0.5 it is mostly",
        "noise. A draw is a pair of dropout passes over each micro-batch. `fisher, sampled labels` takes labels that",
        "the model draws at every token: the Monte Carlo of the expected KL's second-order form, without dropout.",
        "",
        f"| estimator | items | {' | '.join(TITLES[kind] for kind in kinds)} |",
        f"|---|---|{'---|' * len(kinds)}",
    ]
    for row in sorted(rows, key=lambda row: (row["estimator"], row["items"])):
        cells = " | ".join(f"{_number(row['kinds'][kind]['whole']):.2f}" for kind in kinds)
        lines.append(f"| {row['estimator']} | {row['items']} | {cells} |")
    return "\n".join([*lines, "", "![reliability](reliability.png)"]) + "\n"


def _least(row: dict[str, Any]) -> float:
    return min(_number(kind["whole"]) for kind in row["kinds"].values())


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _powers(most: int) -> list[int]:
    return [2**n for n in range(most.bit_length()) if 2**n <= most]


if __name__ == "__main__":
    main()
