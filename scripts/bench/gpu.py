"""One GPU, random-weight LLaMA: what `scripts/bench/gpu` runs once the environment is there.

bfloat16, tokens that all carry the loss, no offload; by default sequences of 2048, micro-batch 1, activation
checkpointing. Ours
trains up_proj and down_proj of 25-50 % of the layers, without a mask and with one in update mode; the other side is
Hugging Face's Trainer with a LoRA adapter (r = 8) on every linear module. Each side has the card to itself. MFU: the
operations of one step without recomputation, counted on the meta device, over the card's bfloat16 peak. Several sizes,
kernels, micro-batches and ways of checkpointing are run in turn, and the files written after each side: a card that is
taken away leaves what was found until then.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sides import Job, Side, dump, machine, typed
from transformers import LlamaConfig

from cofitune.files import write_text
from cofitune.training.throughput import peak_flops

REPOSITORY = Path(__file__).resolve().parents[2]
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
VOCABULARY = 32000
PEAK_GIB = {"7b": 30.0, "13b": 55.0}  # the targets
MASK_SHARE = 0.02
PLAIN, MASKED, LORA = "region", "region, update mask", "LoRA r=8"
ATTENTION_MASK = "region, attention mask"  # where rows are ragged: what it costs to give them one
CHECKPOINTING = {"all": True, "auto": "auto", "none": False}


class Way(NamedTuple):
    """What all sides of a comparison have in common; `verdicts` compares those of one way."""

    size: str
    attention: str
    micro_batch: int
    checkpointing: str

    def __str__(self) -> str:
        """As the tables name it."""
        return f"{self.size}, {self.attention}, micro-batch {self.micro_batch}, {self.checkpointing} checkpointed"


def main() -> None:
    """Run every size and kernel and write the two files of figures."""
    arguments = parse()
    results: dict[str, Any] = {
        "command": typed("scripts/bench/gpu", sys.argv[1:], {arguments.out: "OUT"}),
        "machine": machine(),
        "peak_tflops": arguments.peak_tflops,
        "runs": [],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    ways = product(arguments.sizes, arguments.attention, arguments.micro_batch, arguments.checkpointing)
    for way in map(Way._make, ways):
        with tempfile.TemporaryDirectory() as work:
            for job in jobs(Path(work), way, arguments):
                results["runs"].append({**way._asdict(), **run(job, arguments)})
                print(dump(results["runs"][-1]), flush=True)
                write_text(arguments.out / "gpu.json", dump(results))
                write_text(arguments.out / "gpu.md", report(results))
    print(report(results))


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="scripts/bench/gpu", description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["7b", "13b"])
    parser.add_argument("--attention", nargs="+", default=["sdpa"], help="kernels, by transformers' names")
    parser.add_argument("--zero-stage", type=int, choices=(1, 2, 3), default=3)
    parser.add_argument("--length", type=int, default=2048, help="tokens of an item")
    parser.add_argument("--ragged", action="store_true", help="items of a half to one and a half of it")
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[1], help="items of a step")
    parser.add_argument(
        "--checkpointing",
        choices=CHECKPOINTING,
        nargs="+",
        default=["all"],
        help="layers computed again; under auto LoRA has none",
    )
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_const", const=["none"])
    parser.add_argument("--warm", type=int, default=3, help="steps before the measured ones")
    parser.add_argument("--steps", type=int, default=20, help="measured steps")
    parser.add_argument("--profile", action="store_true", help="profile one more step of each side")
    parser.add_argument("--peak-tflops", type=float, default=known_peak(), help="the card's dense bfloat16 peak")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "scripts" / "bench" / "results")
    return parser.parse_args()


def known_peak() -> float | None:
    """The card's peak, where `cofitune train` knows it."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = peak_flops(name, torch.bfloat16, tf32=False)
    return peak and peak / 1e12


def jobs(work: Path, way: Way, arguments: argparse.Namespace) -> list[Job]:
    """The sides of one way, each on a folder that holds a config.json and nothing more."""
    shape = SIZES[way.size]
    described = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=4096, dtype="bfloat16", **shape)
    described.save_pretrained(work / "model")
    count = (arguments.warm + arguments.steps + 2) * way.micro_batch
    longest = arguments.length + (arguments.length // 2 if arguments.ragged else 0)
    item = '{"instruction": "random tokens take its place", "output": "yes"}\n'
    (work / "train.jsonl").write_text(item * count, encoding="utf-8")

    def config(mask: str) -> dict[str, Any]:
        return {
            "model": {"name": str(work / "model"), "dtype": "bfloat16", "attn_implementation": way.attention},
            "data": {"train": str(work / "train.jsonl"), "max_length": longest},
            "region": {"layers": "25%-50%", "modules": ["up_proj", "down_proj"]},
            "softmask": {"apply_to": mask},
            "train": {
                "num_train_epochs": 1,
                "per_device_train_batch_size": way.micro_batch,
                "gradient_accumulation_steps": 1,
                "gradient_checkpointing": CHECKPOINTING[way.checkpointing],
            },
            "deepspeed": {"zero_stage": arguments.zero_stage},
            "output_dir": str(work / "run"),
        }

    def job(name: str, kind: str, mask: str = "none", attention_mask: bool = False) -> Job:
        return Job(name, kind, config(mask), arguments.length, arguments.ragged, attention_mask)

    sides = [job(PLAIN, "ours"), job(MASKED, "ours", "update"), job(LORA, "lora")]
    return [*sides, job(ATTENTION_MASK, "ours", attention_mask=True)] if arguments.ragged else sides


def run(job: Job, arguments: argparse.Namespace) -> dict[str, Any]:
    """One side alone on the card."""
    side = Side(job)
    try:
        answers = [side.step() for _ in range(arguments.warm + arguments.steps)][arguments.warm :]
        profiled = side.step("profile")
    finally:
        side.stop()
    seconds = statistics.median(a["seconds"] for a in answers)
    peak_flops = arguments.peak_tflops and arguments.peak_tflops * 1e12
    flops, tokens = side.told["model_flops"], statistics.mean(a["tokens"] for a in answers)
    return {
        "side": job.name,
        "trained": side.told["trained"],
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "mfu": flops / seconds / peak_flops if peak_flops and flops else None,
        "kernel_share": profiled["kernel_seconds"] / seconds,
        "peak_bytes": answers[-1]["peak_bytes"],
        "model_bytes": side.told["model_bytes"],
        "mask_share": statistics.median(a.get("mask_seconds", 0.0) / a["seconds"] for a in answers),
        "profile": profiled["profile"] if arguments.profile else None,
    }


def report(results: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["# One GPU, random weights", "", f"    {results['command']}", "", __doc__ or "", ""]
    lines += [f"Machine: {', '.join(f'{key} {value}' for key, value in results['machine'].items())}.", ""]
    columns = ["model", "attention", "micro-batch", "checkpointed", "side", "trained weights", "s a step", "tokens/s"]
    columns += ["MFU", "kernels' share", "peak", "mask's share"]
    lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for r in results["runs"]:
        mfu = "unknown" if r["mfu"] is None else f"{100 * r['mfu']:.1f} %"
        lines.append(
            f"| {r['size']} | {r['attention']} | {r['micro_batch']} | {r['checkpointing']} | {r['side']} | "
            f"{r['trained']:,} | {r['seconds']:.3f} | "
            f"{r['tokens_per_second']:,.0f} | {mfu} | {100 * r['kernel_share']:.0f} % | "
            f"{r['peak_bytes'] / 2**30:.2f} GiB | {100 * r['mask_share']:.1f} % |"
        )
    lines += ["", "| target | at most | found | |", "|---|---|---|---|", *verdicts(results["runs"])]
    for r in results["runs"]:
        if r["profile"]:
            lines += ["", f"## Profile: {way_of(r)}, {r['side']}", "", "```text", r["profile"], "```"]
    return "\n".join(lines) + "\n"


def verdicts(runs: list[dict[str, Any]]) -> list[str]:
    """Lines of the table of targets."""
    lines = []
    loras = {way_of(r): r for r in runs if r["side"] == LORA}
    for r in runs:
        where = way_of(r)
        if r["side"] != MASKED:
            continue
        if r["size"] in PEAK_GIB:
            lines.append(line(f"{where}: peak, GiB", PEAK_GIB[r["size"]], r["peak_bytes"] / 2**30))
        if where in loras:
            lines.append(line(f"{where}: time of a step, of LoRA's", 1.0, r["seconds"] / loras[where]["seconds"]))
        lines.append(line(f"{where}: the mask's share of a step", MASK_SHARE, r["mask_share"]))
    return lines


def way_of(run: dict[str, Any]) -> Way:
    """The way that a run was taken in."""
    return Way(*(run[name] for name in Way._fields))


def line(what: str, most: float, result: float) -> str:
    """One target."""
    return f"| {what} | {most:g} | {result:.3g} | {'met' if result <= most else '**missed**'} |"


if __name__ == "__main__":
    main()
