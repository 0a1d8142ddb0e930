"""What keeps a model's abilities at matched speciality: what `scripts/bench/retention` runs.

All is done by `cofitune rehearse`, `importance` and `compare`, through configs/methods/; this file writes the config
and puts what comes out into scripts/bench/results/. Every arm learns the same items in the same order. Full
fine-tuning is the reference (`--reference` names another): first it must forget beyond chance, else there is nothing to
keep, and the file says so. `--reference full_own` asks what the region adds to rehearsal.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import yaml
from command import cofitune
from rich import box
from rich.console import Console
from rich.table import Table
from sides import typed

from cofitune.reports.compare.content import Comparison
from cofitune.reports.compare.table import matched_table

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "scripts" / "bench" / "results"
METHODS = REPOSITORY / "configs" / "methods"
DEMO = REPOSITORY / ".cache" / "demo-data"
PAPER = {"layers": "25%-50%", "modules": ["up_proj", "down_proj"]}
UPPER = {"layers": "50%-100%", "modules": ["all"]}  # the upper half of the layers, where the demo's search ends
# arm → its file of configs/methods/, what it changes, and its peak rates. 120 steps of 8 items teach so small a model
# little at the paper's 4e-5; a mask lets about half of an update through, and so gets twice the rate
ARMS: dict[str, tuple[str, dict[str, Any], list[float]]] = {
    "full": ("full", {}, [3e-5, 1e-4, 3e-4]),
    "region_own": ("cofitune_rehearsal", {"region": PAPER}, [5e-4]),
    "full_own": ("full_rehearsal", {}, [3e-5, 1e-4]),
    "region": ("cofitune_none", {"region": PAPER}, [5e-4]),
    "region_replay": ("cofitune_replay", {"region": PAPER}, [5e-4]),
    "upper_own": ("cofitune_rehearsal", {"region": UPPER}, [2e-4]),
    "region_own_kl": ("cofitune_rehearsal_kl", {"region": PAPER}, [5e-4]),
    "region_mask": ("cofitune_update", {"region": PAPER}, [1e-3]),
    "lora_own": ("lora_rehearsal", {}, [5e-4]),
    "region_own_longer": ("cofitune_rehearsal", {"region": PAPER}, [5e-4]),  # twice the steps
    "region_own_kl_longer": ("cofitune_rehearsal_kl", {"region": PAPER}, [5e-4]),
}
SPECIALITIES: dict[str, dict[str, Any]] = {
    "ledger": {"max_new_tokens": 24},
    "math": {"metric": "number", "max_new_tokens": 160, "limit": 160},
    "law": {"metric": "squad_match", "max_new_tokens": 16, "limit": 160},
}
LIKE, UNLIKE = "instruct_like", "instruct_unlike"  # the rehearsed prompts


def main() -> None:
    """Rehearse, compute the importance, compare, and write down what came out."""
    arguments = parse()
    config = write_config(arguments)
    began = time.monotonic()
    cofitune("rehearse", config)
    if "region_mask" in arguments.methods:
        cofitune("importance", config)
    if not arguments.hours:
        cofitune("compare", config)
    else:
        left = max(1e-3, arguments.hours - (time.monotonic() - began) / 3600)
        cofitune("compare", config, f"compare.budget_hours={left:g}")
    write_results(arguments)


def parse() -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with math/, law/, replay/ and the tests")
    parser.add_argument("--model", type=Path, default=REPOSITORY / ".cache" / "SmolLM2-135M-Instruct")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "runs" / "bench-retention", help="where runs go")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go (default: %(default)s)")
    parser.add_argument("--speciality", choices=SPECIALITIES, default="ledger")
    parser.add_argument("--hours", type=float, help="begin no training after these")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of 8 items each (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=600, help="general prompts to rehearse (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="of a rehearsed answer (default: %(default)s)")
    parser.add_argument("--share", type=float, default=0.2, help="of rehearsal in a step (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="training seeds (default: %(default)s)")
    parser.add_argument("--items", type=int, help="items of a task at most; default: all of the demo's, 160 of others")
    parser.add_argument("--alphas", type=float, nargs="+", default=[1.0], help="default: 1")
    parser.add_argument("--rates", type=float, nargs="+", help="of full fine-tuning, with rehearsal and without")
    parser.add_argument("--batch-size", type=int, default=16, help="of the evaluation (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    parser.add_argument("--reference", choices=ARMS, default="full", help="of --methods (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.reference not in arguments.methods:
        parser.error(f"--reference {arguments.reference}: one of --methods, which has {', '.join(arguments.methods)}")
    places = {arguments.data: "FOLDER", arguments.model: "MODEL", arguments.work: "WORK", arguments.out: "OUT"}
    arguments.command = typed("scripts/bench/retention", sys.argv[1:], places)
    return arguments


def write_config(arguments: argparse.Namespace) -> Path:
    """The one config of all commands."""
    data, name = arguments.data, arguments.speciality
    train = DEMO / "ledger_train.jsonl" if name == "ledger" else data / name / "train.jsonl"
    test = DEMO / "ledger_test.jsonl" if name == "ledger" else data / name / "test.jsonl"
    config: dict[str, Any] = {
        "model": {"name": str(arguments.model), "dtype": "float32"},
        "data": {"train": str(train), "max_length": 256, "on_bad_item": "drop"},
        "rehearsal": {
            "data": str(DEMO / "general_prompts.jsonl"), "max_items": arguments.prompts,
            "max_new_tokens": arguments.max_new_tokens,
        },
        "importance": {"data": str(data / "replay" / "train.jsonl"), "max_items": 120},
        "train": {
            "max_steps": arguments.steps, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False, "warmup_ratio": 0.0, "save_steps": None,
        },
        "deepspeed": {"zero_stage": 2},
        "eval": {
            "speciality": [SPECIALITIES[name] | {"path": str(test), "kind": "generate", "name": name}],
            "versatility": {
                "gen_kn": [
                    _choice("gen_kn", DEMO / "gen_kn.jsonl"),
                    _choice("arc_easy", data / "arc_easy" / "test.jsonl"),
                ],
                "gen_rs": [_choice("gen_rs", DEMO / "gen_rs.jsonl"), _hellaswag(data)],
                "instruct": [
                    {"path": str(DEMO / file), "kind": "ifeval", "name": title, "max_new_tokens": 96}
                    for title, file in ((LIKE, "instruct.jsonl"), (UNLIKE, "instruct_other.jsonl"))
                ],
            },
            "drift": [str(arguments.work / "run" / "rehearsal")],
            "batch_size": arguments.batch_size,
        },
        "compare": {
            "methods": {arm: _overlay(arm, arguments) for arm in arguments.methods},
            "learning_rates": {arm: _rates(arm, arguments) for arm in arguments.methods},
            "reference": arguments.reference,
            "seeds": [1234 + n for n in range(arguments.seeds)],
            "alphas": arguments.alphas,
        },
        "output_dir": str(arguments.work / "run"),
    }  # fmt: skip
    if arguments.items:
        config["eval"]["limit"] = arguments.items
    path = Path(arguments.work) / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def _choice(name: str, path: Path) -> dict[str, Any]:
    return {"path": str(path), "kind": "multiple_choice", "name": name, "limit": 160}


def _hellaswag(data: Path) -> dict[str, Any]:
    """A likelihood task without the template: endings of a text."""
    return _choice("hellaswag", data / "hellaswag" / "test.jsonl") | {"metric": "acc_norm", "prompt": "continuation"}


def _overlay(arm: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The sections of an arm: those of its file, and what it changes."""
    file, changes, _ = ARMS[arm]
    sections: dict[str, Any] = yaml.safe_load((METHODS / f"{file}.yaml").read_text())
    sections |= changes
    if sections["train"].get("rehearsal"):
        sections["train"]["rehearsal"]["share"] = arguments.share
    if arm.endswith("_longer"):
        sections["train"]["max_steps"] = 2 * arguments.steps
    return sections


def _rates(arm: str, arguments: argparse.Namespace) -> list[float]:
    return arguments.rates if arm in ("full", "full_own") and arguments.rates else ARMS[arm][2]


def write_results(arguments: argparse.Namespace) -> None:
    """The tables, every number, the store and the picture."""
    folder = arguments.work / "run" / "compare"
    content = json.loads((folder / "compare.json").read_text())
    rehearsal = json.loads((arguments.work / "run" / "rehearsal" / "manifest.json").read_text())
    out = StringIO()
    console = Console(file=out, width=150, no_color=True)
    console.print(points_table(content, arguments.speciality))
    for level, own in zip(content["matched"], Comparison.of(content).matched, strict=True):
        console.print(matched_table(own, content["reference"]))
        console.print(apart_table(level, content["reference"]))
    output = "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")
    machine = f"{os.cpu_count()} CPU cores, torch {torch.__version__}, threads: {torch.get_num_threads()}"
    if torch.cuda.is_available():
        machine = f"{torch.cuda.get_device_name()}, {machine}"
    seconds = [run["seconds"] for run in content["runs"]]
    took = {what: sum(s.get(what, 0.0) for s in seconds) / 60 for what in ("train", "evaluate")}
    partial = content["partial"]
    label = f"**Partial: {partial['done']} of {partial['runs']} runs.** " if partial else ""
    name = f"retention-{arguments.speciality}"
    if arguments.reference != "full":
        name += f"-to-{arguments.reference}"
    seeds = sorted({run["seed"] for run in content["runs"]})
    text = (
        f"# What keeps abilities, on {arguments.speciality}\n\n`{arguments.command}`\n\n"
        f"{label}SmolLM2-135M-Instruct (4-bit GGUF, dequantised to fp32) learns {arguments.speciality} items for "
        f"{arguments.steps} steps of 8 items; arms with `_own` take {arguments.share:g} of each step from "
        f"{rehearsal['items']:,} of the base's own answers ({rehearsal['tokens']:,} tokens; "
        f"{rehearsal['unfinished']:,} of them cut at {arguments.max_new_tokens}). Training seeds: "
        f"{', '.join(map(str, seeds))}. No rehearsed prompt "
        "shares 13 words in a row with a test item (checked by `cofitune rehearse`).\n\n"
        f"{' '.join(findings(content))}\n\n```text\n{output}\n```\n\n"
        f"![frontiers]({name}.png)\n\n{machine}. Trainings: {took['train']:.0f} min; answers: "
        f"{took['evaluate']:.0f} min, starting included.\n"
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    without_places(content, arguments)
    content |= {"command": arguments.command, "machine": machine, "rehearsal": _about(rehearsal)}
    written = json.dumps(content, indent=1, ensure_ascii=False).replace(f"{DEMO}/", "")
    (arguments.out / f"{name}.json").write_text(written + "\n")
    lines = (json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines())
    kept = "".join(json.dumps(shortened(line, arguments), ensure_ascii=False) + "\n" for line in lines)
    (arguments.out / f"{name}.jsonl").write_text(kept)
    for kind in ("png", "svg"):
        shutil.copyfile(folder / f"frontier.{kind}", arguments.out / f"{name}.{kind}")
    (arguments.out / f"{name}.md").write_text(text)
    print(text)


def findings(content: dict[str, Any]) -> Iterator[str]:
    """What the figures say: whether the reference forgets, and who is ahead of it at matched speciality."""
    reference = content["reference"]
    own = [p for p in content["points"] if p["method"] == reference]
    lost = [p for p in own if p["change"]["versatility"]["high"] < 0]
    if own and lost:
        worst = min(lost, key=lambda p: p["change"]["versatility"]["value"])
        change = worst["change"]["versatility"]
        yield (
            f"{reference} forgets beyond chance: {worst['id']} loses {-change['value']:.1f} points of versatility "
            f"({-change['high']:.1f} to {-change['low']:.1f})."
        )
    elif own:
        raised = ", so that nothing can be kept: raise --rates or --steps" if reference == "full" else ""
        yield f"**{reference} forgets nothing here that the items can tell from chance**{raised}."
    for level in content["matched"]:
        ahead = []
        for method, row in level["rows"].items():
            against = [row.get(f"{score}_against_reference") for score in ("versatility", "instruct")]
            if all(a and a["low"] is not None and a["low"] > 0 for a in against):
                ahead.append(method)
        arms = ", ".join(ahead) if ahead else "no arm"
        yield (
            f"At a speciality of {level['speciality']:.1f}, {arms} {'are' if len(ahead) > 1 else 'is'} ahead of "
            f"{reference} in versatility and in instruction following with intervals that leave out 0."
        )


def points_table(content: dict[str, Any], speciality: str) -> Table:
    """Every run setting, mean over seeds: its changes against the base with 95 % intervals, and its drift."""
    names = ("arm", "rate", "alpha", "seeds", speciality, "versatility", "gen_kn", "gen_rs", LIKE, UNLIKE, "drift")
    table = Table(title="changes against the base, 95 % intervals; drift in nats a token", box=box.SIMPLE_HEAD)
    for name in names:
        table.add_column(name, justify="left" if name == "arm" else "right")
    base = content["base"]
    for point in content["points"]:
        change, tasks = point["change"], point["tasks"]
        table.add_row(
            point["method"], f"{point['learning_rate']:g}", f"{point['alpha']:g}", str(point["seeds"]),
            f"{point['scores']['speciality']:.1f}", _change(change["versatility"]),
            *(_change(change[name]) for name in ("gen_kn", "gen_rs")),
            *(_change(tasks[name]) for name in (LIKE, UNLIKE)), f"{tasks['drift']['score']:.3f}",
        )  # fmt: skip
    table.caption = f"the base: speciality {base['speciality']:.1f}, versatility {base['versatility']:.1f}"
    return table


def apart_table(level: dict[str, Any], reference: str) -> Table:
    """Instruction following at matched speciality, on prompts like the rehearsed ones and on prompts unlike them."""
    table = Table(title="instruction prompts apart, and drift", box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("arm", LIKE, f"to {reference}, 95 %", UNLIKE, f"to {reference}, 95 %", "drift"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for method, row in level["rows"].items():
        cells = []
        for title in (LIKE, UNLIKE):
            task = row["tasks"].get(title, {})
            score, against = task.get("score"), task.get("against_reference")
            cells += ["–" if score is None else f"{score:.1f}", "" if not against else _change(against)]
        drift = row["tasks"].get("drift", {}).get("score")
        table.add_row(method, *cells, "–" if drift is None else f"{drift:.3f}")
    return table


def _change(results: dict[str, Any]) -> str:
    if results["low"] is None:
        return f"{results['value']:+.1f} (no interval)"
    return f"{results['value']:+.1f} ({results['low']:+.1f} to {results['high']:+.1f})"


def _about(rehearsal: dict[str, Any]) -> dict[str, Any]:
    kept = ("items", "held_out", "unfinished", "tokens", "account", "settings")
    return {name: rehearsal[name] for name in kept if name != "settings"}


def without_places(content: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Leave out this machine's paths; the config is the script's own, and each method's file says the rest."""
    for task in content["tasks"].values():
        task["path"] = Path(task["path"]).name
    content["runs"] = [shortened(run, arguments) for run in content["runs"]]
    for method in content["methods"].values():
        method["softmask"]["importance"] = None
    del content["config"], content["made_with"]


def shortened(run: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """A run's line without this machine's paths."""
    kept = {k: v for k, v in run.items() if k not in ("folder", "identity")}
    if kept["reason"]:
        kept["reason"] = kept["reason"].replace(str(arguments.work), "WORK")
    return kept


if __name__ == "__main__":
    main()
