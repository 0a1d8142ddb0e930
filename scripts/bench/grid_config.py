"""The configs of `scripts/bench/grid`: one space, tried whole or searched, under either measure."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
MEASURES = ("loss", "score")
SEEDS = (1234, 1235)
RANGES = ["bottom1", "bottom2", "middle", "top", "bottom-plus", "middle-plus", "top-plus"]
MODULES = {"mha": ["mha"], "ffn": ["ffn"], "up+down": ["up_proj", "down_proj"]}  # beside all of a range
REHEARSAL = "base"  # the folder below --work in which the base answers general prompts


def grid_levels(modules: Sequence[str]) -> list[dict[str, Any]]:
    """Every range, and in each of them every choice of modules."""
    return [{"layers": RANGES}, {"modules": [MODULES[name] for name in modules]}]


def tree_levels(modules: Sequence[str]) -> list[dict[str, Any]]:
    """The paper's tree, as far as the grid has its regions."""
    groups = [[name] for name in ("mha", "ffn") if name in modules]
    levels: list[dict[str, Any]] = [{"layers": RANGES[4:]}, {"layers": RANGES[:4]}]
    if groups:
        levels.append({"modules": [*groups, ["all"]]})
    if "up+down" in modules:
        levels.append({"modules": [MODULES["up+down"]]})
    return levels


def modules_first_levels() -> list[dict[str, Any]]:
    """The tree within up and down, as the demo searches: the modules are chosen, only the layers are searched for."""
    return [{"modules": [MODULES["up+down"]]}, {"layers": RANGES[4:]}, {"layers": RANGES[:4]}]


def trees(modules: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The tree searches whose trials are the grid's, by name."""
    named = {"tree": tree_levels(modules)}
    return named | ({"up+down-tree": modules_first_levels()} if "up+down" in modules else {})


def number_of_regions(modules: Sequence[str]) -> int:
    """How many regions the grid has."""
    return len(RANGES) * (1 + len(modules))


def write_config(arguments: argparse.Namespace, name: str, measure: str, levels: Sequence[Any], **search: Any) -> Path:
    """The config of one search.

    Args:
        name: of its output folder.
        levels: that it tries.
        search: keys of the section `search` in which it differs.
    """
    data, items = arguments.data, arguments.items
    train: dict[str, Any] = {
        "learning_rate": 4e-4,
        "warmup_ratio": 0,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "seed": SEEDS[0],
    }
    answers = str(arguments.work / REHEARSAL / "rehearsal")
    if arguments.rehearse:
        train["rehearsal"] = {"path": answers, "share": 0.2}
    elif measure == "loss":
        train["drift_data"] = answers  # measured only: the training is that of the other measure
    config = {
        **_model_and_data(arguments),
        "importance": {"data": str(data / "replay" / "train.jsonl")},  # the proxy's general data
        "train": train,
        "search": {
            "levels": list(levels),
            "measure": measure,
            "train_steps": arguments.steps,
            "points": arguments.points,
            "limit": None,
            "prefix_cache": "memory",
            "eval": {
                "batch_size": 16,
                "on_bad_item": "drop",
                "speciality": [_task(data, "law", items, kind="generate", metric="squad_match", max_new_tokens=12)],
                "versatility": {
                    "gen_kn": [_task(data, "arc_easy", items, kind="multiple_choice")],
                    "gen_rs": [_task(data, "piqa", items, kind="multiple_choice")],
                    "instruct": [_task(data, "ifeval", max(1, items // 3), kind="ifeval", max_new_tokens=64)],
                },
            },
            **search,
        },
        "output_dir": str(arguments.work / name),
    }
    return _write(arguments.work / f"{name}.yaml", config)


def write_rehearsal_config(arguments: argparse.Namespace) -> Path:
    """The config by which the base answers general prompts, half of which are held out to measure drift on."""
    config = {
        **_model_and_data(arguments),
        "rehearsal": {
            "data": str(arguments.data / "replay" / "train.jsonl"),
            "max_items": arguments.prompts,
            "max_new_tokens": 64,
            "held_out": 0.5,
        },
        "output_dir": str(arguments.work / REHEARSAL),
    }
    return _write(arguments.work / f"{REHEARSAL}.yaml", config)


def _model_and_data(arguments: argparse.Namespace) -> dict[str, Any]:
    train = str(arguments.data / "law" / "train.jsonl")
    return {
        "model": {"name": str(arguments.model), "dtype": "float32"},
        "data": {"train": train, "max_length": arguments.max_length, "on_bad_item": "drop"},
    }


def _task(data: Path, name: str, limit: int, **settings: Any) -> dict[str, Any]:
    """One task of the trials' evaluation."""
    return {"path": str(data / name / "test.jsonl"), "name": name, "limit": limit, **settings}


def _write(path: Path, config: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path
