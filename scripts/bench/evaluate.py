"""Base, CoFiTune's region and full fine-tuning on the small real model: what `scripts/bench/evaluate` runs.

The runs learn law items for a few steps each, through `cofitune train`; `cofitune eval` then puts all of them into one
table. Full fine-tuning here is every projection of every layer; embeddings, norms and head stay frozen.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch
import yaml
from command import cofitune
from rich.console import Console

from cofitune.reports.evaluation.scores import Scores
from cofitune.reports.evaluation.table import scores_table, sentences

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "scripts" / "bench" / "results"
SUITE = REPOSITORY / "configs" / "suites" / "folder.yaml"
LAW = {"path": "law/test.jsonl", "kind": "generate", "metric": "squad_match", "max_new_tokens": 24}


@dataclass(frozen=True)
class Run:
    """One training: what it trains, and its peak rate."""

    name: str
    layers: str
    modules: str
    learning_rate: float
    seed: int = 1234


def main() -> None:
    """Train, evaluate, and write the table down."""
    arguments = parse()
    seeds = [1234 + n for n in range(arguments.seeds)]
    runs = [Run("region" if s == 1234 else f"region-{s}", "25%-50%", "[up_proj,down_proj]", 4e-4, s) for s in seeds]
    full = Run("full_sft", "all", "all", 1e-4)
    config = write_config(arguments)
    for run in (*runs, full):
        cofitune(
            "train", config, f"region.layers={run.layers}", f"region.modules={run.modules}", f"train.seed={run.seed}",
            f"train.learning_rate={run.learning_rate}", f"output_dir={arguments.work / run.name}",
        )  # fmt: skip
    models = [word for run in runs for word in ("--model", f"{run.name}={arguments.work / run.name}")]
    cofitune("eval", config, *models, "--full-sft", arguments.work / full.name)
    write_results(arguments, [*runs, full])


def parse() -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with law/train.jsonl and the tasks' test.jsonl"
    )
    parser.add_argument("--model", type=Path, default=REPOSITORY / ".cache" / "SmolLM2-135M-Instruct")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "runs" / "bench-evaluate", help="where runs go")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of 8 items each (default: %(default)s)")
    parser.add_argument("--items", type=int, default=24, help="items a task (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="training seeds of the region (default: %(default)s)")
    return parser.parse_args()


def write_config(arguments: argparse.Namespace) -> Path:
    """The one config of all commands; each run's own words are overrides."""

    config = {
        "model": {"name": str(arguments.model), "dtype": "float32"},
        "data": {"train": str(arguments.data / "law" / "train.jsonl"), "max_length": 384, "on_bad_item": "drop"},
        "train": {"max_steps": arguments.steps, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
        "eval": {
            "suite": str(SUITE),
            "data": str(arguments.data),
            "limit": arguments.items,
            "speciality": [LAW],
            "batch_size": 16,
        },
        "output_dir": str(arguments.work / "eval"),
    }
    path = Path(arguments.work) / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def write_results(arguments: argparse.Namespace, runs: list[Run]) -> None:
    """The table as `cofitune eval` prints it, and every number of it."""
    path = arguments.work / "eval" / "eval" / "scores.json"
    scores, told = json.loads(path.read_text()), Scores.read(path)
    out = StringIO()
    console = Console(file=out, width=160, no_color=True)
    console.print(scores_table(told))
    console.print(*sentences(told), sep="\n", markup=False, highlight=False, soft_wrap=True)
    table = "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")
    changed = f" --steps {arguments.steps} --items {arguments.items} --seeds {arguments.seeds}"
    typed = f"scripts/bench/evaluate --data FOLDER{'' if changed == ' --steps 40 --items 24 --seeds 1' else changed}"
    trained = "\n".join(
        f"- `{r.name}`: layers {r.layers}, modules {r.modules}, peak rate {r.learning_rate:g}, seed {r.seed}"
        for r in runs
    )
    items = sum(about["items"] for about in scores["tasks"].values())
    machine = f"{os.cpu_count()} CPU cores, torch {torch.__version__}, threads: {torch.get_num_threads()}"
    # of the runs' own accounts: what was done by an earlier call took its time then
    seconds = {
        r.name: json.loads((arguments.work / r.name / "train/manifest.json").read_text())["seconds"] for r in runs
    }
    scoring = sum(task["seconds"] for model in scores["models"].values() for task in model["tasks"].values())
    took = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    text = (
        f"# Base, region and full fine-tuning on law\n\n`{typed}`\n\n"
        f"SmolLM2-135M-Instruct (4-bit GGUF, dequantised to fp32) learns law items for {arguments.steps} steps of 8 "
        f"items; {items} test items in all, the first of each task. One evaluation: read it with its intervals.\n\n"
        f"{trained}\n\n```text\n{table}\n```\n\n{machine}. Training steps: {took}; "
        f"answers of {len(scores['models'])} models: {scoring:.0f} s.\n"
    )
    for task in scores["tasks"].values():
        task["path"] = Path(task["path"]).relative_to(arguments.data).as_posix()
    for model in scores["models"].values():
        model["path"] = Path(model["path"]).name
    scores |= {"command": typed, "machine": machine, "training_seconds": seconds}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "evaluate.md").write_text(text)
    (arguments.out / "evaluate.json").write_text(json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
    print(text)


if __name__ == "__main__":
    main()
