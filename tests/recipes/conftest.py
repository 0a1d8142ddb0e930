"""What trainings with rehearsal need: the tiny model's own answers, made by `cofitune rehearse`, and a config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cofitune.config.schema import Config

TOPICS = ("rain", "bread", "trains", "stars", "tea", "chess", "rivers", "glass", "salt", "maps", "owls", "wool")
WORDS = ("court", "contract", "void", "seller", "buyer", "tenant", "lease", "landlord", "capital", "France")


@pytest.fixture(scope="session")
def decided_model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """The tiny model with weights so large that some tokens are much likelier than others: it can drift from that."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("decided") / "model"
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1 if "norm" in name else 20 if "lm_head" in name else 4)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rehearsal_folder(tmp_path_factory: pytest.TempPathFactory, decided_model_folder: Path) -> Path:
    """That model's sampled answers to twelve prompts, three of them held out. Shared: do not write into it."""
    from cofitune.recipes.rehearse.recipe import rehearse

    here = tmp_path_factory.mktemp("rehearsed")
    prompts = here / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Tell me about {topic}."}) + "\n" for topic in TOPICS))
    config = Config.model_validate(
        {
            "model": {"name": str(decided_model_folder), "dtype": "float32"},
            "rehearsal": {
                "data": str(prompts), "max_new_tokens": 12, "temperature": 1.0, "max_repetition": 1.0, "top_k": 8,
                "held_out": 0.25, "engine": "transformers",
            },
            "output_dir": str(here / "run"),
        }
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COFITUNE_CACHE", str(here / "cache"))
        for name in ("RANK", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        return rehearse(config, console=Console(quiet=True))


@pytest.fixture
def rehearsal_config(tmp_path: Path, decided_model_folder: Path, rehearsal_folder: Path) -> dict[str, Any]:
    """Eight items, four a step and two rehearsed beside them: an epoch is two steps, a pass over the rehearsal five."""
    data = tmp_path / "train.jsonl"
    items = [{"instruction": f"Say {w}", "output": " ".join(WORDS[i : i + 3])} for i, w in enumerate(WORDS[:8])]
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    return {
        "model": {"name": str(decided_model_folder), "dtype": "float32"},
        "data": {"train": str(data), "max_length": 128},
        "train": {
            "learning_rate": 1e-3, "max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
            "save_steps": 3, "keep_last": 3,
            "rehearsal": {"share": 1 / 3, "loss": "nll", "weight": 0.5, "path": str(rehearsal_folder)},
        },
        "region": {"layers": "1-3", "modules": "all"},
        "softmask": {"apply_to": "none"},
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
