"""What a training step asks of the host: what `scripts/bench/host` runs once the environment is there.

A GPU waits where the host cannot launch kernels fast enough, and at small micro-batches that is what bounds a step. On
a Llama of 32 layers of width 32 arithmetic is next to nothing, so that the operations of a step, and its CPU seconds,
are the host's part. Two ways to take the same step under ZeRO-2 stand side by side: `now`, as `cofitune train` takes it
where memory is no matter, and `before`, with every layer from the region up computed again and an attention mask given.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sides import dump, machine, random_examples, typed

REPOSITORY = Path(__file__).resolve().parents[2]
WIDTH, VOCABULARY, TOKENS, WARM = 32, 256, 64, 2
MOST = 0.6  # of the operations and seconds of `before`
WAYS = ("before", "now")


def main() -> None:
    """Take the steps of both ways in turn, and write the two files of figures."""
    parser = argparse.ArgumentParser(prog="scripts/bench/host", description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each way")
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "scripts" / "bench" / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    results: dict[str, Any] = {"command": typed("scripts/bench/host", sys.argv[1:], {arguments.out: "OUT"})}
    results |= {"machine": machine(), "ways": {way: measure(way, arguments) for way in WAYS}}
    before, now = (results["ways"][way] for way in WAYS)
    results["ratios"] = {what: now[what] / before[what] for what in ("operations", "cpu_seconds")}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "host.json").write_text(dump(results), encoding="utf-8")
    text = report(results)
    (arguments.out / "host.md").write_text(text, encoding="utf-8")
    print(text)


def measure(way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A step's operations, counted once, and its CPU seconds, the median of all measured steps."""
    from cofitune.training.engine import release, start_distributed
    from cofitune.training.loop import FitSettings, fit

    start_distributed()
    engine, plan = start(way, arguments)
    counted, seconds = [0], []
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    since = [time.process_time()]

    def on_step(record: Any, _: int) -> None:
        seconds.append(time.process_time() - since[0])
        if record.step == plan.num_steps - 1:
            profiler.__enter__()
        if record.step == plan.num_steps:
            profiler.__exit__(None, None, None)
            counted[0] = sum(e.count for e in profiler.key_averages() if e.key.startswith("aten::"))
        since[0] = time.process_time()

    examples = random_examples(plan.num_examples, TOKENS, VOCABULARY)
    with mask_given(way == "before"):
        fit(engine, examples, FitSettings(plan, 0, 0), on_step)
    release(engine)
    return {"operations": counted[0], "cpu_seconds": statistics.median(seconds[WARM:-1])}


def start(way: str, arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The engine of a way, and its steps."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from cofitune.config.schema import DeepSpeed, Train
    from cofitune.data.batches import plan_steps
    from cofitune.model.anatomy import anatomy_of
    from cofitune.model.region import freeze_outside, resolve_region
    from cofitune.recipes.train.resolve import engine_settings
    from cofitune.training.engine import checkpoint_layers, start_engine
    from cofitune.training.fused import fuse_operations

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=arguments.layers,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    anatomy = anatomy_of(model)
    region = resolve_region("25%-50%", ["up_proj", "down_proj"], arguments.layers)
    freeze_outside(model, set(region.parameter_names(anatomy)))
    layers = anatomy.layout.layers
    checkpoint_layers(model, layers, region.first, None if way == "before" else 0)
    if way == "now":
        fuse_operations(model, layers, region.first)
    steps = WARM + arguments.steps + 1
    plan = plan_steps(steps * arguments.micro_batch, arguments.micro_batch, 1, 1, 1, steps)
    train = Train(per_device_train_batch_size=arguments.micro_batch, gradient_accumulation_steps=1)
    return start_engine(model, engine_settings(train, DeepSpeed(zero_stage=2), torch.float32, plan)), plan


@contextmanager
def mask_given(given: bool) -> Iterator[None]:
    """Inside, right-padded rows get an attention mask, as they did before they needed none."""
    from cofitune.training import loss

    real = loss.works_without_mask
    if given:
        loss.works_without_mask = lambda model: False
    try:
        yield
    finally:
        loss.works_without_mask = real


def report(results: dict[str, Any]) -> str:
    """The figures as a page."""
    rows = [
        f"| {way} | {found['operations']:,} | {found['cpu_seconds']:.4f} |" for way, found in results["ways"].items()
    ]
    ratios, on = results["ratios"], ", ".join(f"{what} {value}" for what, value in results["machine"].items())
    met = "met" if max(ratios.values()) <= MOST else "missed"
    found = f"{ratios['operations']:.2f} of the operations, {ratios['cpu_seconds']:.2f} of the CPU seconds"
    table = ["| | operations of PyTorch | CPU seconds |", "|---|---|---|", *rows]
    verdict = f"Now / before: {found} (at most {MOST:.2f} is the aim: {met})."
    head = ["# A step's work for the host", "", f"    {results['command']}", "", f"{on}.", ""]
    return "\n".join([*head, *table, "", verdict, ""])


if __name__ == "__main__":
    main()
