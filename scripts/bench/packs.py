"""Packs side by side: attention under a mask, conversation by conversation, and the same items without packs.

Each side is `cofitune train`'s own plan, engine and loop in a process of its own, on legal items; the sides take
turns of two steps, the second of which is measured (the first takes again the memory that a side hands back while the
others have their turns). Both packed sides get the same packs. A step of the side without packs has as many items as a
pack has on average, so that its time is told a real token.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from sides import Job, Side, a_round, dump, machine, typed
from step import sample

REPOSITORY = Path(__file__).resolve().parents[2]
MASK, VARLEN, ITEMS = "packs, mask", "packs, by conversation", "items, padded"
WARM = 1  # turns that are not measured
A_TURN = 2  # steps: one that is not measured, which takes the memory again, and one that is


def main() -> None:
    """Run the sides for each length of pack and write the two files of figures."""
    arguments = parse()
    paths = {arguments.data: "DATA", arguments.model: "MODEL", arguments.out: "OUT"}
    results: dict[str, Any] = {"command": typed("scripts/bench/packs", sys.argv[1:], paths), "machine": machine()}
    results["lengths"] = {length: compare(length, arguments) for length in arguments.lengths}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "packs.json").write_text(dump(results), encoding="utf-8")
    text = report(results)
    (arguments.out / "packs.md").write_text(text, encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="scripts/bench/packs", description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with law/train.jsonl")
    parser.add_argument("--model", type=Path, default=REPOSITORY / ".cache" / "SmolLM2-135M-Instruct")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], help="tokens of a pack at most")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of each side, a pack each")
    parser.add_argument("--seed", type=int, default=1234, help="which items, and their order")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "scripts" / "bench" / "results")
    return parser.parse_args()


def compare(length: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """All sides at one length of packs, a step each in turn."""
    print(f"packs of {length} tokens:", flush=True)
    with tempfile.TemporaryDirectory() as work:
        items = sample(arguments.data / "law" / "train.jsonl", 400, arguments.seed)
        (Path(work) / "train.jsonl").write_text("".join(items), encoding="utf-8")
        sides = [Side(job) for job in jobs(Path(work), length, arguments)]
        try:
            rounds = [one_turn_each(sides, number) for number in range(WARM + arguments.steps)]
        finally:
            for side in sides:
                side.stop()
    measured = rounds[WARM:]
    return {
        "tokens": [r[MASK]["tokens"] for r in measured],
        "seconds": {name: [r[name]["seconds"] for r in measured] for name in rounds[0]},
        "losses": {name: [r[name]["loss"] for r in measured] for name in rounds[0]},
        "of_mask": statistics.median(r[VARLEN]["seconds"] / r[MASK]["seconds"] for r in measured),
        "a_1000_tokens": {
            name: statistics.median(1000 * r[name]["seconds"] / r[name]["tokens"] for r in measured)
            for name in rounds[0]
        },
        "memory_above_model": {name: measured[-1][name]["memory_above_model"] for name in rounds[0]},
    }


def jobs(work: Path, length: int, arguments: argparse.Namespace) -> list[Job]:
    """The sides: the first two differ by `model.attn_implementation` alone."""
    config: dict[str, Any] = {
        "model": {"name": str(arguments.model)},
        "data": {"train": str(work / "train.jsonl"), "max_length": length, "packing": True},
        "region": {"layers": "25%-50%", "modules": ["up_proj", "down_proj"]},
        "train": {
            "max_steps": A_TURN * (WARM + arguments.steps),
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False,
            "seed": arguments.seed,
        },
        "output_dir": str(work / "run"),
    }
    masked = config | {"model": config["model"] | {"attn_implementation": "sdpa"}}
    several = config["train"] | {"per_device_train_batch_size": max(1, length // 200)}
    single = config | {"data": config["data"] | {"packing": False}, "train": several}
    return [Job(MASK, "ours", masked), Job(VARLEN, "ours", config), Job(ITEMS, "ours", single)]


def one_turn_each(sides: list[Side], number: int) -> dict[str, dict[str, Any]]:
    """One measured step of each side."""
    answers = a_round(sides, number, warm=True)
    print("  " + "  ".join(f"{name} {answer['seconds']:.2f} s" for name, answer in answers.items()), flush=True)
    return answers


def report(results: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["# Attention to packs, side by side", "", f"    {results['command']}", "", __doc__ or ""]
    lines += [f"Machine: {', '.join(f'{key} {value}' for key, value in results['machine'].items())}.", ""]
    lines += ["| tokens of a pack | side | s per 1,000 tokens | of the mask's | memory above the model | last loss |",
              "|---|---|---|---|---|---|"]  # fmt: skip
    for length, found in results["lengths"].items():
        for name, seconds in found["a_1000_tokens"].items():
            ratio = found["of_mask"] if name == VARLEN else seconds / found["a_1000_tokens"][MASK]
            memory = found["memory_above_model"][name] / 2**30
            lines.append(
                f"| {length} | {name} | {seconds:.2f} | {ratio:.2f} | {memory:.2f} GiB | "
                f"{found['losses'][name][-1]:.6f} |"
            )
    lines += ["", "Of the two packed sides the ratio is the median of the steps'; the other is of two medians.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
