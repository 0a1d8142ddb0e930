"""Full fine-tuning, LoRA, the pull to the base, CoFiTune and its controls: what `scripts/bench/compare` runs.

All is done by `cofitune importance` and `cofitune compare`, through configs/methods/; this file writes the config,
sized for an hour on two CPU cores, and puts what comes out into scripts/bench/results/. On a GPU that so small a model
leaves idle, `--at-once 4` trains so many runs beside each other first; `cofitune compare` then finds them trained.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import yaml
from command import cofitune
from rich.console import Console
from sides import typed

from cofitune.config.load import dump_config, load_config
from cofitune.files import write_text
from cofitune.recipes.compare.plan import Run, plan_compare
from cofitune.recipes.compare.recipe import resolve_search
from cofitune.reports.compare.content import Comparison
from cofitune.reports.compare.table import comparison_tables, sentences
from cofitune.reports.console import say

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "scripts" / "bench" / "results"
METHODS = REPOSITORY / "configs" / "methods"
# peak rates: 24 steps of 8 items teach so small a model nothing at the paper's 4e-5 (`--times` is for other lengths). A
# mask lets about half of an update through, so that the masked runs get twice the rate of the region without one
RATES: dict[str, list[float]] = {
    "full": [3e-5, 1e-4, 3e-4],
    "cofitune_none": [4e-4],
    "cofitune_update": [8e-4],
    "control_uniform": [8e-4],
    "control_shuffled": [8e-4],
    "lora_mlp": [5e-4],
    "l2": [1e-4],
}
PULL = 0.6  # steps × mean rate × λ: nearly half of the way back; the file's λ would go a tenth in so few small steps
CHOICES = {"gen_kn": ("arc_easy", "commonsenseqa"), "gen_rs": ("hellaswag", "arc_challenge")}
SPECIALITIES: dict[str, dict[str, Any]] = {  # how the answers are held against the references, as in configs/suites/
    "law": {"metric": "squad_match", "max_new_tokens": 16},
    "math": {"metric": "number", "max_new_tokens": 160},
    "finance": {"metric": "f1", "answer_field": "answer", "pattern": "(?s)^(?:.*Answer:)?(.*)", "max_new_tokens": 96},
    "cag": {"metric": "f1", "max_new_tokens": 48},
}


def main() -> None:
    """Compute the importance, compare, and write down what came out."""
    arguments = parse()
    config = write_config(arguments)
    cofitune("importance", config)
    began = time.monotonic()
    asking = train_side_by_side(config, arguments) if arguments.at_once > 1 else 0.0
    if not arguments.hours:
        cofitune("compare", config)
    else:
        left = max(1e-3, arguments.hours - (time.monotonic() - began) / 3600)
        cofitune("compare", config, f"compare.budget_hours={left:g}")
    write_results(arguments, asking)


def parse() -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with law/, replay/ and the tasks' test.jsonl")
    parser.add_argument("--model", type=Path, default=REPOSITORY / ".cache" / "SmolLM2-135M-Instruct")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "runs" / "bench-compare", help="where runs go")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go (default: %(default)s)")
    parser.add_argument("--speciality", choices=SPECIALITIES, default="law")
    parser.add_argument("--hours", type=float, help="begin no training after these")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of 8 items each (default: %(default)s)")
    parser.add_argument("--items", type=int, default=40, help="items a task (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a training item (default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, choices=(1, 2, 4, 8), default=4, help="of a step's 8 items")
    parser.add_argument("--batch-size", type=int, default=16, help="of the evaluation (default: %(default)s)")
    parser.add_argument("--times", type=float, default=1.0, help="multiply every rate by this (default: 1)")
    parser.add_argument("--zero-stage", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--at-once", type=int, default=1, help="train so many runs beside each other (default: 1)")
    parser.add_argument("--seeds", type=int, default=1, help="training seeds (default: %(default)s)")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.5, 1.0], help="default: 0.5 1")
    parser.add_argument("--methods", nargs="+", default=list(RATES), help="default: all")
    arguments = parser.parse_args()
    places = {arguments.data: "FOLDER", arguments.model: "MODEL", arguments.work: "WORK", arguments.out: "OUT"}
    arguments.command = typed("scripts/bench/compare", sys.argv[1:], places)
    return arguments


def write_config(arguments: argparse.Namespace) -> Path:
    """The one config of both commands."""
    data, limit = arguments.data, arguments.items
    methods: dict[str, Any] = {name: str(METHODS / f"{name}.yaml") for name in arguments.methods}
    if "l2" in methods:
        methods["l2"] = yaml.safe_load((METHODS / "l2.yaml").read_text())
        methods["l2"]["train"]["l2_to_base"] = pull(arguments)
    versatility: dict[str, list[dict[str, Any]]] = {
        category: [
            {"path": str(data / task / "test.jsonl"), "kind": "multiple_choice", "limit": limit} for task in tasks
        ]
        for category, tasks in CHOICES.items()
    }
    # endings of a text, not answers to a question
    versatility["gen_rs"][0] |= {"metric": "acc_norm", "prompt": "continuation"}
    follow = {"path": str(data / "ifeval" / "test.jsonl"), "kind": "ifeval", "max_new_tokens": 64, "limit": limit}
    versatility["instruct"] = [follow | {"on_bad_item": "drop"}]
    speciality = SPECIALITIES[arguments.speciality] | {"kind": "generate", "limit": limit}
    speciality["path"] = str(data / arguments.speciality / "test.jsonl")
    train_file = str(data / arguments.speciality / "train.jsonl")
    config = {
        "model": {"name": str(arguments.model), "dtype": "float32"},
        "data": {"train": train_file, "max_length": arguments.max_length, "on_bad_item": "drop"},
        "importance": {"data": str(data / "replay" / "train.jsonl"), "max_items": 64},
        "train": {
            "max_steps": arguments.steps, "per_device_train_batch_size": arguments.micro_batch,
            "gradient_accumulation_steps": 8 // arguments.micro_batch, "gradient_checkpointing": False,
        },
        "deepspeed": {"zero_stage": arguments.zero_stage},
        "eval": {"speciality": [speciality], "versatility": versatility, "batch_size": arguments.batch_size},
        "compare": {
            "methods": methods,
            "learning_rates": {name: [arguments.times * rate for rate in RATES[name]] for name in methods},
            "seeds": [1234 + n for n in range(arguments.seeds)],
            "alphas": arguments.alphas,
        },
        "output_dir": str(arguments.work / "run"),
    }  # fmt: skip
    path = Path(arguments.work) / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def pull(arguments: argparse.Namespace) -> float:
    """λ of `l2`, so that steps × mean rate × λ is PULL: over a cosine the mean is half of the peak."""
    (peak,) = RATES["l2"]
    return float(f"{2 * PULL / (arguments.steps * arguments.times * peak):.3g}")


def train_side_by_side(config: Path, arguments: argparse.Namespace) -> float:
    """Train the comparison's runs, so many at a time, and score each seed's in one go; `compare` takes both over.

    Returns the seconds of the scoring, which no run's line in the store knows.

    Neighbours are of different methods, so that the heaviest do not meet. While one seed is scored the next one trains.
    """
    plan = plan_compare(resolve_search(load_config(config)))
    began = time.monotonic()

    def train(run: Run) -> None:
        if arguments.hours and time.monotonic() - began > arguments.hours * 3600:
            return
        asked = run.folder / "asked.yaml"
        write_text(asked, dump_config(run.config))
        with (run.folder / "train.log").open("w") as log:
            command = [sys.executable, "-m", "cofitune", "train", str(asked), "--resume"]
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        print(f"{run.name}: exit {code} after {time.monotonic() - began:.0f} s", flush=True)

    def score(trained: list[Run]) -> float:
        scored = config.with_name("scored.yaml")
        write_text(scored, dump_config(plan.eval_config(trained)))
        seconds = cofitune("eval", scored)
        print(f"{len(trained)} runs are scored after {time.monotonic() - began:.0f} s", flush=True)
        return seconds

    with ThreadPoolExecutor(1) as scorer, ThreadPoolExecutor(arguments.at_once) as trainer:
        waiting = {}
        for seed in plan.seeds:
            runs = [run for run in plan.runs if run.seed == seed and not run.is_trained]
            apart = [run for start in range(arguments.at_once) for run in runs[start :: arguments.at_once]]
            waiting[seed] = [trainer.submit(train, run) for run in apart]
        scorings = []
        for trainings in waiting.values():
            for training in trainings:
                training.result()
            scorings.append(scorer.submit(score, [run for run in plan.runs if run.is_trained]))
        return sum(scoring.result() for scoring in scorings)


def write_results(arguments: argparse.Namespace, asking: float) -> None:
    """The tables and sentences as `cofitune compare` prints them, every number, the store and the picture.

    Args:
        asking: seconds of scoring that no run's line tells.
    """
    folder = arguments.work / "run" / "compare"
    content = json.loads((folder / "compare.json").read_text())
    out = StringIO()
    console = Console(file=out, width=150, no_color=True)
    compared = Comparison.of(content)
    for table in comparison_tables(compared):
        console.print(table)
    for line in sentences(compared):
        say(console, line)
    output = "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")
    machine = f"{os.cpu_count()} CPU cores, torch {torch.__version__}, threads: {torch.get_num_threads()}"
    if torch.cuda.is_available():
        machine = f"{torch.cuda.get_device_name()}, {machine}"
    seconds = [run["seconds"] for run in content["runs"]]
    took = {what: sum(s.get(what, 0.0) for s in seconds) / 60 for what in ("train", "evaluate")}
    took["evaluate"] += asking / 60
    partial = content["partial"]
    label = f"**Partial: {partial['done']} of {partial['runs']} runs.** " if partial else ""
    name = "compare" if arguments.speciality == "law" else f"compare-{arguments.speciality}"
    items = sum(about["items"] for about in content["tasks"].values())
    text = (
        f"# Rivals at matched speciality, on {arguments.speciality}\n\n`{arguments.command}`\n\n"
        f"{label}SmolLM2-135M-Instruct (4-bit GGUF, dequantised to fp32) learns {arguments.speciality} items for "
        f"{arguments.steps} steps of 8 items by each method of configs/methods/ (`l2` with λ = {pull(arguments):g}); "
        f"{items} test items. The base is every method's alpha 0.\n\n```text\n{output}\n```\n\n"
        f"![frontiers]({name}.png)\n\n{machine}. Trainings: {took['train']:.0f} min; answers: "
        f"{took['evaluate']:.0f} min, starting included"
        + (f"; up to {arguments.at_once} runs at once.\n" if arguments.at_once > 1 else ".\n")
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    _without_places(content, arguments)
    (arguments.out / f"{name}.json").write_text(
        json.dumps(content | {"command": arguments.command, "machine": machine}, indent=1, ensure_ascii=False) + "\n"
    )
    lines = (json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines())
    kept = "".join(json.dumps(_shortened(line, arguments), ensure_ascii=False) + "\n" for line in lines)
    (arguments.out / f"{name}.jsonl").write_text(kept)
    for kind in ("png", "svg"):
        shutil.copyfile(folder / f"frontier.{kind}", arguments.out / f"{name}.{kind}")
    (arguments.out / f"{name}.md").write_text(text)
    print(text)


def _without_places(content: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Leave out this machine's paths; the config is the script's own, and each method's file says the rest."""
    for task in content["tasks"].values():
        task["path"] = Path(task["path"]).relative_to(arguments.data).as_posix()
    content["runs"] = [_shortened(run, arguments) for run in content["runs"]]
    for method in content["methods"].values():
        method["softmask"]["importance"] = None
    del content["config"], content["made_with"]


def _shortened(run: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    kept = {k: v for k, v in run.items() if k not in ("folder", "identity")}
    if kept["reason"]:
        kept["reason"] = kept["reason"].replace(str(arguments.work), "WORK")
    return kept


if __name__ == "__main__":
    main()
