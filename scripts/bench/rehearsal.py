"""A step without rehearsal, with nll and with kl, side by side; and KL(base ‖ run) from k probabilities against all.

What `scripts/bench/rehearsal` runs. The steps take the run's own items in its own order, forward and backward, without
the optimizer, which is the same for all three.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sides import dump, typed
from torch.utils.flop_counter import FlopCounterMode

from cofitune.config.load import load_config
from cofitune.config.schema import Config
from cofitune.data.batches import Batch, collate, rank_micro_batches, step_indices
from cofitune.data.top_k import TopK
from cofitune.model.region import freeze_outside
from cofitune.recipes.from_config import load_base
from cofitune.recipes.train.plan import TrainPlan, plan_train
from cofitune.rehearsal.items import RehearsalExamples, read_rehearsal
from cofitune.training.delta import delta_applied, read_delta
from cofitune.training.loss import kl_from_base, rehearsal_loss, summed_loss, supervised_logits, top_k_of

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "scripts" / "bench" / "results"
KINDS = ("none", "nll", "kl")
CLASSES = (1, 4, 8, 32, 128)


def main() -> None:
    """Measure both, and write them down."""
    arguments = parse()
    config = load_config(arguments.run / "train" / "config.yaml")
    steps = measure_steps(config, arguments.rounds)
    divergence = measure_divergence(config, arguments.run, arguments.items)
    write_results(arguments, steps, divergence)


def parse() -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=REPOSITORY / "runs" / "demo", help="a run trained with rehearsal")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="steps of each kind, taken in turn (default: %(default)s)"
    )
    parser.add_argument("--items", type=int, default=40, help="answers for the KL divergence (default: %(default)s)")
    arguments = parser.parse_args()
    arguments.command = typed("scripts/bench/rehearsal", sys.argv[1:], {arguments.run: "RUN", arguments.out: "OUT"})
    return arguments


def measure_steps(config: Config, rounds: int) -> dict[str, dict[str, Any]]:
    """FLOPs, seconds and tokens of a step's forward and backward passes; the kinds take turns."""
    requested = config.train.rehearsal
    if requested is None:
        raise SystemExit("the run was trained without rehearsal")
    kl = config.train.model_copy(update={"rehearsal": requested.model_copy(update={"loss": "kl"})})
    plan = plan_train(config.model_copy(update={"train": kl}), 1)
    model = load_base(config.model)
    freeze_outside(model, set(plan.trained))
    batches = [step_batches(plan, config.train.seed, number) for number in range(rounds + 1)]
    results: dict[str, dict[str, Any]] = {kind: {"seconds": []} for kind in KINDS}
    for number, step in enumerate(batches):
        for kind in KINDS:
            with FlopCounterMode(display=False) if number == 0 else _Timer() as measured:
                take(model, plan, step, kind)
            if isinstance(measured, FlopCounterMode):
                results[kind]["flops"] = measured.get_total_flops()
                used = step if kind != "none" else step[: plan.steps.accumulation]
                results[kind]["tokens"] = sum(int(b["attention_mask"].sum()) for b in used)
            else:
                results[kind]["seconds"].append(measured.seconds)
    return results


def step_batches(plan: TrainPlan, seed: int, number: int) -> list[Batch]:
    """The micro-batches of one step: the task's, then the rehearsal's."""
    steps = replace(plan.steps, num_steps=number + 1)
    *_, indices = step_indices(steps, seed)
    return rank_micro_batches(plan.examples, indices, plan.steps, 0, 0)


def take(model: Any, plan: TrainPlan, batches: Sequence[Batch], kind: str) -> None:
    """Forward and backward of a step."""
    model.zero_grad()
    for number, batch in enumerate(batches):
        if number < plan.steps.accumulation:
            summed_loss(model, batch).backward()
        elif kind != "none":
            rehearsal_loss(model, batch, kind).backward()


def measure_divergence(config: Config, run: Path, items: int) -> dict[str, float]:
    """KL(base ‖ run), nats a token of held-out answers: over the whole vocabulary, and from k classes and the rest."""
    manifest = json.loads((run / "train" / "manifest.json").read_text())
    rehearsal = read_rehearsal(Path(manifest["used"]["rehearsal"]["path"]).parent)
    held_out = RehearsalExamples(rehearsal, True, config.data.max_length, with_top_k=False, on_bad_item="drop")
    model = load_base(config.model)
    delta = read_delta(run / "train", manifest["base_fingerprint"])
    sums = dict.fromkeys(("tokens", "all", *(f"{k} and the rest" for k in CLASSES)), 0.0)
    for example in held_out[:items]:
        batch = collate([example], 0)
        with torch.inference_mode():
            base = supervised_logits(model, batch)[0]
            with delta_applied(model, delta):
                tuned = supervised_logits(model, batch)[0]
            p, q = base.double().log_softmax(-1), tuned.double().log_softmax(-1)
            sums["tokens"] += len(p)
            sums["all"] += float((p.exp() * (p - q)).sum())
            for k in CLASSES:
                stored: TopK = top_k_of(base, k)
                sums[f"{k} and the rest"] += float(kl_from_base(tuned, stored).double().sum())
    tokens = sums.pop("tokens")
    return {"tokens": tokens, **{name: value / tokens for name, value in sums.items()}}


class _Timer:
    def __enter__(self) -> _Timer:
        self.began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.began


def write_results(
    arguments: argparse.Namespace, steps: dict[str, dict[str, Any]], divergence: dict[str, float]
) -> None:
    """One page and all figures."""
    none = steps["none"]
    rows = [
        f"| {kind} | {result['tokens']:,} | {result['flops'] / 1e9:,.0f} | {result['flops'] / none['flops']:.2f} | "
        f"{statistics.median(result['seconds']):.2f} | "
        f"{statistics.median(result['seconds']) / statistics.median(none['seconds']):.2f} |"
        for kind, result in steps.items()
    ]
    whole = divergence["all"]
    classes = [
        f"| {name} | {value:.5f} | {100 * (value / whole - 1):+.2f} % |"
        for name, value in divergence.items()
        if name != "tokens"
    ]
    kl = statistics.median(steps["kl"]["seconds"]) / statistics.median(steps["nll"]["seconds"])
    machine = f"{os.cpu_count()} CPU cores, torch {torch.__version__}, threads: {torch.get_num_threads()}"
    text = (
        f"# What rehearsal costs, and how exact stored probabilities are\n\n`{arguments.command}`\n\n"
        "A step's forward and backward passes on the run's own items, without the optimizer; medians of "
        f"{arguments.rounds} steps that take turns. `kl` takes {kl:.2f} of the time of `nll`.\n\n"
        "| rehearsal | tokens | GFLOPs | of none | seconds | of none |\n|---|---|---|---|---|---|\n"
        + "\n".join(rows)
        + f"\n\nKL(base ‖ run) on {divergence['tokens']:,.0f} tokens of held-out answers, nats a token:\n\n"
        "| classes | KL | against all |\n|---|---|---|\n" + "\n".join(classes) + f"\n\n{machine}.\n"
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "rehearsal.md").write_text(text)
    content = {"command": arguments.command, "machine": machine, "steps": steps, "divergence": divergence}
    (arguments.out / "rehearsal.json").write_text(dump(content))
    print(text)


if __name__ == "__main__":
    main()
