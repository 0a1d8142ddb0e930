"""Full fine-tuning, LoRA, the pull to the base, CoFiTune and its controls on law: what `scripts/bench/compare` runs.

All is done by `cofitune importance` and `cofitune compare`, through configs/methods/; this file writes the config,
sized for an hour on two CPU cores, and puts what comes out into scripts/bench/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import yaml
from command import cofitune
from rich.console import Console

from cofitune.reports.compare_table import comparison_tables, sentences

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "scripts" / "bench" / "results"
METHODS = REPOSITORY / "configs" / "methods"
# peak rates: 24 steps of 8 items teach so small a model nothing at the paper's 4e-5. A mask lets about half of an
# update through, so that the masked runs get twice the rate of the region without one
RATES: dict[str, list[float]] = {
    "full": [3e-5, 1e-4, 3e-4],
    "cofitune_none": [4e-4],
    "cofitune_update": [8e-4],
    "control_uniform": [8e-4],
    "control_shuffled": [8e-4],
    "lora_mlp": [5e-4],
    "l2": [1e-4],
}
PULL = 500.0  # λ: over so few and small steps the file's 100 would go a tenth of the way back, this goes nearly half
CHOICES = {"gen_kn": ("arc_easy", "commonsenseqa"), "gen_rs": ("hellaswag", "arc_challenge")}


def main() -> None:
    """Compute the importance, compare, and write down what came out."""
    arguments = parse()
    config = write_config(arguments)
    cofitune("importance", config)
    if not arguments.hours:
        cofitune("compare", config)
    else:
        cofitune("compare", config, f"compare.budget_hours={arguments.hours:g}")
    write_results(arguments)


def parse() -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with law/, replay/ and the tasks' test.jsonl")
    parser.add_argument("--model", type=Path, default=REPOSITORY / ".cache" / "SmolLM2-135M-Instruct")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "runs" / "bench-compare", help="where runs go")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go (default: %(default)s)")
    parser.add_argument("--hours", type=float, help="begin no training that would not end within these")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of 8 items each (default: %(default)s)")
    parser.add_argument("--items", type=int, default=40, help="items a task (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="training seeds (default: %(default)s)")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.5, 1.0], help="default: 0.5 1")
    parser.add_argument("--methods", nargs="+", default=list(RATES), help="default: all")
    return parser.parse_args()


def write_config(arguments: argparse.Namespace) -> Path:
    """The one config of both commands."""
    data, limit = arguments.data, arguments.items
    methods: dict[str, Any] = {name: str(METHODS / f"{name}.yaml") for name in arguments.methods}
    if "l2" in methods:
        methods["l2"] = yaml.safe_load((METHODS / "l2.yaml").read_text())
        methods["l2"]["train"]["l2_to_base"] = PULL
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
    law = {"path": str(data / "law" / "test.jsonl"), "kind": "generate", "metric": "squad_match", "max_new_tokens": 16}
    config = {
        "model": {"name": str(arguments.model), "dtype": "float32"},
        "data": {"train": str(data / "law" / "train.jsonl"), "max_length": 256, "on_bad_item": "drop"},
        "importance": {"data": str(data / "replay" / "train.jsonl"), "max_items": 64},
        "train": {
            "max_steps": arguments.steps, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
            "gradient_checkpointing": False,
        },
        "eval": {"speciality": [law | {"limit": limit}], "versatility": versatility, "batch_size": 16},
        "compare": {
            "methods": methods,
            "learning_rates": {name: RATES[name] for name in methods},
            "seeds": [1234 + n for n in range(arguments.seeds)],
            "alphas": arguments.alphas,
        },
        "output_dir": str(arguments.work / "run"),
    }  # fmt: skip
    path = Path(arguments.work) / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def write_results(arguments: argparse.Namespace) -> None:
    """The tables and sentences as `cofitune compare` prints them, every number, the store and the picture."""
    folder = arguments.work / "run" / "compare"
    content = json.loads((folder / "compare.json").read_text())
    out = StringIO()
    console = Console(file=out, width=150, no_color=True)
    for table in comparison_tables(content):
        console.print(table)
    for line in sentences(content):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    said = "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")
    typed = f"scripts/bench/compare --data FOLDER --steps {arguments.steps} --items {arguments.items}"
    typed += f" --seeds {arguments.seeds}" if arguments.seeds != 1 else ""
    machine = f"{os.cpu_count()} CPU cores, torch {torch.__version__}, threads: {torch.get_num_threads()}"
    seconds = [run["seconds"] for run in content["runs"]]
    took = {what: sum(s.get(what, 0.0) for s in seconds) / 60 for what in ("train", "evaluate")}
    partial = content["partial"]
    label = f"**Partial: {partial['done']} of {partial['runs']} runs.** " if partial else ""
    items = sum(about["items"] for about in content["tasks"].values())
    text = (
        f"# Rivals at matched speciality, on law\n\n`{typed}`\n\n"
        f"{label}SmolLM2-135M-Instruct (4-bit GGUF, dequantised to fp32) learns law items for {arguments.steps} steps "
        f"of 8 items by each method of configs/methods/ (`l2` with λ = {PULL:g}); {items} test items. The base is "
        f"every method's alpha 0.\n\n```text\n{said}\n```\n\n![frontiers](compare.png)\n\n{machine}. Trainings: "
        f"{took['train']:.0f} min; answers: {took['evaluate']:.0f} min, starting included.\n"
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    _without_places(content, arguments)
    (arguments.out / "compare.json").write_text(
        json.dumps(content | {"command": typed, "machine": machine}, indent=1, ensure_ascii=False) + "\n"
    )
    lines = (json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines())
    kept = "".join(json.dumps(_shortened(line, arguments), ensure_ascii=False) + "\n" for line in lines)
    (arguments.out / "compare.jsonl").write_text(kept)
    for kind in ("png", "svg"):
        shutil.copyfile(folder / f"frontier.{kind}", arguments.out / f"compare.{kind}")
    (arguments.out / "compare.md").write_text(text)
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
