"""The rivals' trainings that two real ranks and one process both run, and the worker that runs them on a rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from cofitune.config.schema import Config
from tests.helpers import WORDS, freeze_imports, write_jsonl

WORLD = 2
HALF = r"model\.layers\.\d+\.mlp\..*"
# name → what is laid over the config of all; two kinds of adapter and the pull, under each way of sharding
CASES: dict[str, dict[str, Any]] = {
    "lora_stage_3": {"adapter": {"kind": "lora", "r": 4, "alpha": 8}},
    "lora_stage_2": {"adapter": {"kind": "lora", "r": 4, "alpha": 8, "target_modules": "ffn"}, "stage": 2},
    "lora_in_a_region": {
        "adapter": {"kind": "lora", "r": 4, "alpha": 8, "rslora": True, "layers": "50%-75%,3", "modules": ["ffn"]}
    },
    "dora_stage_3": {"adapter": {"kind": "dora", "r": 4, "alpha": 8, "layers": "1-2", "modules": ["mha", "up_proj"]}},
    "dora_stage_2": {"adapter": {"kind": "dora", "r": 4, "alpha": 8, "layers": "3"}, "stage": 2},
    "osf_in_a_region": {"adapter": {"kind": "osf", "layers": "bottom2", "modules": "down_proj"}},
    "osf_stage_3": {"adapter": {"kind": "osf"}},
    "osf_stage_1": {
        "adapter": {"kind": "osf", "effective_rank": 0.75, "target_modules": ["down_proj", "q_proj"]},
        "stage": 1,
    },
    "l2_stage_3": {"region": {"match": ".*"}, "l2_to_base": 40.0},
    "l2_stage_2": {"region": {"match": HALF}, "l2_to_base": 40.0, "stage": 2, "offload_optimizer": "cpu"},
}

# what a case's adapter sits on, by hand
GROUPS = {
    "mha": ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"),
    "ffn": ("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
    "all-linear": ("_proj.weight",),
}
LAYERS = {"50%-75%,3": (2, 3), "1-2": (1, 2), "3": (3,), "bottom2": (1,)}  # of four


def write_data(folder: Path) -> None:
    """Twelve items of unequal length."""
    items = [{"instruction": f"Say {w}", "output": " ".join(WORDS[: i % 5 + 1])} for i, w in enumerate(WORDS * 2)][:12]
    write_jsonl(folder / "train.jsonl", items)


def config_of(name: str, folder: Path, ranks: int, **train: Any) -> Config:
    """A case's config; an optimizer step takes four items on any number of ranks."""
    case = dict(CASES[name])
    deepspeed = {"zero_stage": case.pop("stage", 3), "offload_optimizer": case.pop("offload_optimizer", "none")}
    settings = {
        "learning_rate": 5e-3, "max_steps": 4, "per_device_train_batch_size": 2, "weight_decay": 0.0,
        "gradient_accumulation_steps": WORLD // ranks, "l2_to_base": case.pop("l2_to_base", 0.0), "save_steps": None,
    }  # fmt: skip
    given = {
        "model": {"name": str(folder / "model"), "dtype": "float32"},
        "data": {"train": str(folder / "train.jsonl"), "max_length": 64},
        "deepspeed": deepspeed,
        "train": settings | train,
        "output_dir": str(folder / f"{ranks}-ranks" / name),
    }
    return Config.model_validate(given | case)


def main() -> None:
    """What every rank runs: all cases in one start."""
    import deepspeed  # noqa: F401  # before what is there is hidden from the garbage collector
    import torch

    from cofitune.recipes.train.recipe import train

    torch.set_num_threads(1)
    freeze_imports()
    for name in CASES:
        train(config_of(name, Path(sys.argv[1]), WORLD), console=Console(quiet=True))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
