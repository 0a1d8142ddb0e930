"""A training step side by side on SmolLM2-135M: what `scripts/bench/step` runs once the environment is there.

Every side loads the model once, in a process of its own, and then takes steps in turn with the others, on the same
batches of 8. The first epoch warms up and fills the prefix cache. After it a turn has two steps, and the second one is
measured: between its turns a side hands its heap back to the machine, four being more than it has, and the first step
takes it again page by page, as no training does. Ratios are taken step by step before their median. Two more steps
count floating-point operations, and what the forward pass keeps for the backward pass.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sides import Job, Side, a_round, dump, machine, typed

REPOSITORY = Path(__file__).resolve().parents[2]
COLUMNS = ("region", "region, prefix kept", "LoRA r=8", "full")
OURS, KEPT, LORA, FULL = COLUMNS


@dataclass(frozen=True)
class Target:
    """A promise: one side's figure is at most `most` of another's."""

    data: str
    what: str
    side: str
    against: str
    most: float


TARGETS = (
    Target("law", "seconds", OURS, FULL, 0.50),
    Target("law", "seconds", OURS, LORA, 0.62),
    Target("law", "seconds", KEPT, FULL, 0.44),
    Target("law", "memory_above_model", OURS, FULL, 0.50),
    Target("law", "saved_bytes", OURS, FULL, 0.42),
)
WORDS = {
    "seconds": "time of a step",
    "memory_above_model": "memory above the model",
    "saved_bytes": "kept for backward",
    "flops": "counted FLOPs",
}


def main() -> None:
    """Run all sides on each data set and write the two files of figures."""
    arguments = parse()
    paths = {arguments.data: "DATA", arguments.model: "MODEL", arguments.out: "OUT"}
    command = typed("scripts/bench/step", sys.argv[1:], paths)
    results: dict[str, Any] = {"command": command, "machine": machine(), "data": {}}
    for name in arguments.sets:
        print(f"{name}:", flush=True)
        results["data"][name] = compare(name, arguments)
    results["targets"] = [verdict(t, results["data"]) for t in TARGETS if t.data in results["data"]]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "step.json").write_text(dump(results), encoding="utf-8")
    text = report(results)
    (arguments.out / "step.md").write_text(text, encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="scripts/bench/step", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with law/train.jsonl and math/train.jsonl")
    parser.add_argument("--sets", nargs="+", default=["law", "math"], help="folders in it")
    parser.add_argument("--model", type=Path, default=REPOSITORY / ".cache" / "SmolLM2-135M-Instruct")
    parser.add_argument("--batch", type=int, default=8, help="items of a batch")
    parser.add_argument("--batches", type=int, default=3, help="batches in an epoch")
    parser.add_argument(
        "--steps", type=int, default=4, help="measured steps of each side; one that is not measured goes before each"
    )
    parser.add_argument("--seed", type=int, default=1234, help="which items, and their order")
    parser.add_argument("--profile", action="store_true", help="profile every side, not only where a target is missed")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "scripts" / "bench" / "results")
    return parser.parse_args()


def compare(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All sides on one data set, a step each in turn."""
    with tempfile.TemporaryDirectory() as work:
        items = sample(arguments.data / name / "train.jsonl", arguments.batch * arguments.batches, arguments.seed)
        (Path(work) / "train.jsonl").write_text("".join(items), encoding="utf-8")
        sides = [Side(job) for job in jobs(Path(work), arguments)]
        try:
            rounds = [same_batch(sides, number, "time") for number in range(arguments.batches)]
            rounds += [same_batch(sides, number, "time", warm=True) for number in range(arguments.steps)]
            counted, saved = same_batch(sides, 0, "flops"), same_batch(sides, 1, "saved")
            results = summary(sides, rounds, arguments.batches, counted, saved)
            missed = [verdict(t, {name: results}) for t in TARGETS if t.data == name]
            if arguments.profile or not all(v["met"] for v in missed):
                results["profiles"] = {name: a["profile"] for name, a in a_round(sides, 0, "profile").items()}
            return results
        finally:
            for side in sides:
                side.stop()


def sample(path: Path, count: int, seed: int) -> list[str]:
    """So many lines of a file, drawn at random."""
    return random.Random(seed).sample(path.read_text(encoding="utf-8").splitlines(keepends=True), count)


def jobs(work: Path, arguments: argparse.Namespace) -> list[Job]:
    """The sides. Epochs are more than are measured: two steps are left for counting and one for profiling."""
    epochs = 1 + -(-(2 * arguments.steps + 3) // arguments.batches)
    config: dict[str, Any] = {
        "model": {"name": str(arguments.model), "dtype": "float32"},
        "data": {"train": str(work / "train.jsonl"), "max_length": 512},
        "region": {"layers": "25%-50%", "modules": ["up_proj", "down_proj"]},
        "train": {
            "num_train_epochs": epochs,
            "per_device_train_batch_size": arguments.batch,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False,
            "seed": arguments.seed,
        },
        "output_dir": str(work / "run"),
    }
    kept = config | {"train": config["train"] | {"prefix_cache": "memory"}}
    return [Job(OURS, "ours", config), Job(KEPT, "ours", kept), Job(LORA, "lora", config), Job(FULL, "full", config)]


def same_batch(sides: Sequence[Side], number: int, what: str, warm: bool = False) -> dict[str, dict[str, Any]]:
    """One step of each side on the same batch."""
    answers = a_round(sides, number, what, warm=warm)
    counts = {(a["tokens"], a["supervised"]) for a in answers.values()}
    if len(counts) > 1:
        raise SystemExit(f"the sides were given different batches: {answers}")
    print("  " + "  ".join(f"{n} {answers[n]['seconds']:.2f} s" for n in COLUMNS), flush=True)
    return answers


def summary(
    sides: Sequence[Side],
    rounds: list[dict[str, Any]],
    warm: int,
    counted: dict[str, dict[str, Any]],
    saved: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Medians of each side, and of its ratios to each other side."""
    measured = rounds[warm:]
    results: dict[str, Any] = {
        "tokens": [r[FULL]["tokens"] for r in measured],
        "supervised": [r[FULL]["supervised"] for r in measured],
        "sides": {},
    }
    for side in sides:
        name = side.job.name
        results["sides"][name] = {
            "seconds": statistics.median(r[name]["seconds"] for r in measured),
            "cpu_seconds": statistics.median(r[name]["cpu_seconds"] for r in measured),  # of all its threads
            "all_seconds": [r[name]["seconds"] for r in measured],
            "flops": counted[name]["flops"],
            "saved_bytes": saved[name]["saved_bytes"],
            "saved_of_tokens": saved[name]["tokens"],
            # of the steps after the first epoch; the peak so far, and so the last is the whole run's
            "memory_above_model": measured[-1][name]["memory_above_model"],
            "trained": side.told["trained"],
            "first_loss": rounds[0][name]["loss"],
        }
    results["ratios"] = {
        a: {b: statistics.median(r[a]["seconds"] / r[b]["seconds"] for r in measured) for b in COLUMNS if b != a}
        for a in COLUMNS
    }
    return results


def verdict(target: Target, data: dict[str, Any]) -> dict[str, Any]:
    """Whether a promise is kept."""
    result = data[target.data]
    if target.what == "seconds":
        ratio = result["ratios"][target.side][target.against]
    else:
        ratio = result["sides"][target.side][target.what] / result["sides"][target.against][target.what]
    return {**vars(target), "ratio": ratio, "met": ratio <= target.most}


def report(results: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["# A training step, side by side", "", f"    {results['command']}", "", __doc__ or "", ""]
    lines += [f"Machine: {', '.join(f'{key} {value}' for key, value in results['machine'].items())}.", ""]
    for name, result in results["data"].items():
        tokens, supervised = statistics.median(result["tokens"]), statistics.median(result["supervised"])
        lines += [f"## {name}: {tokens:,.0f} tokens a batch, {supervised:,.0f} of them carry the loss", ""]
        lines += ["| side | trained weights | s a step | of full | of LoRA | FLOPs of full | of LoRA | memory above "
                  "the model | of full | kept for backward | of full |", "|" + "---|" * 11]  # fmt: skip
        lines += [row(name, result) for name in COLUMNS]
        lines += [""]
    lines += [
        "Memory is the peak of the resident set during the steps, less what it was when the model was loaded. What the",
        "forward pass of one batch keeps for its backward pass is counted, weights left out; the peak is the largest",
        "batch's.",
        "",
    ]
    lines += ["| target | at most | found | |", "|---|---|---|---|"]
    for t in results["targets"]:
        message = f"{t['data']}: {WORDS[t['what']]}, {t['side']} against {t['against']}"
        lines.append(f"| {message} | {t['most']:.2f} | {t['ratio']:.2f} | {'met' if t['met'] else '**missed**'} |")
    for name, result in results["data"].items():
        for side, profile in result.get("profiles", {}).items():
            lines += ["", f"## Profile of a step: {name}, {side}", "", "```text", profile.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def row(name: str, results: dict[str, Any]) -> str:
    """One side as a line of the table."""
    side, full, lora = results["sides"][name], results["sides"][FULL], results["sides"][LORA]
    ratios = results["ratios"][name]
    cells = [
        name,
        f"{side['trained']:,}",
        f"{side['seconds']:.2f}",
        f"{ratios.get(FULL, 1):.2f}",
        f"{ratios.get(LORA, 1):.2f}",
        f"{side['flops'] / full['flops']:.2f}",
        f"{side['flops'] / lora['flops']:.2f}",
        f"{side['memory_above_model'] / 2**20:,.0f} MiB",
        f"{side['memory_above_model'] / full['memory_above_model']:.2f}",
        f"{side['saved_bytes'] / 2**20:,.0f} MiB",
        f"{side['saved_bytes'] / full['saved_bytes']:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
