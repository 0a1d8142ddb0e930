"""Orders on real workers, with the tiny model: what a trial leaves, and that none depends on what ran before it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cofitune.config.load import load_config
from cofitune.launch import Ranks
from cofitune.recipes.orders import Order
from cofitune.workers import local_orders

ONE, TWO = (Ranks(n, (), ("--num-processes", str(n))) for n in (1, 2))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> dict[str, Any]:
    """A trial's config, the region and the folder left out."""
    folder = tmp_path_factory.mktemp("items")
    words = ("contract", "seller", "tenant", "notice", "landlord", "buyer", "reason", "lease", "court")
    law = [{"instruction": f"Say {w}{' please' * (i % 3)}", "output": f"The {w} is void."} for i, w in enumerate(words)]
    choice = [{"question": f"Which {w}?", "choices": ["Paris", "Rome"], "answer": i % 2} for i, w in enumerate(words)]
    for name, items in (("law", law), ("choice", choice)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"train": f"{folder}/law.jsonl", "max_length": 64},
        "train": {
            "max_steps": 4, "learning_rate": 1e-2, "warmup_ratio": 0, "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1, "save_steps": None,
        },
        "eval": {
            "batch_size": 4,
            "speciality": [
                {"path": f"{folder}/law.jsonl", "kind": "generate", "metric": "f1", "max_new_tokens": 8},
                {"path": f"{folder}/law.jsonl", "kind": "loss", "name": "law loss"},
            ],
            "versatility": {"gen_kn": [{"path": f"{folder}/choice.jsonl", "kind": "multiple_choice"}]},
        },
        "softmask": {"apply_to": "none"},
    }  # fmt: skip


def order(settings: dict[str, Any], folder: Path, layers: str, until: int | None = None, **changes: Any) -> Order:
    """A trial of these layers' up and down projections; `changes` by the path of a setting, its dots underlined twice."""
    text = json.loads(json.dumps(settings))
    text |= {"region": {"layers": layers, "modules": ["up_proj", "down_proj"]}, "output_dir": str(folder)}
    for place, value in changes.items():
        section, _, name = place.partition("__")
        text.setdefault(section, {})[name] = value
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "asked.yaml"
    path.write_text(yaml.safe_dump(text))
    return Order(folder.name, load_config(path), folder, until=until)


def left(folder: Path) -> dict[str, Any]:
    """All that a trial's scores hang on: its weights by their hash, its answers, the losses of its steps."""
    scores = json.loads((folder / "eval" / "scores.json").read_text())
    metrics = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
    answers = {
        str(p.relative_to(folder)): p.read_text() for p in sorted((folder / "eval" / "samples").rglob("*.jsonl"))
    }
    run = scores["models"]["run"]
    return {
        "weights": run["delta_sha256"],
        "unified": run["unified"],
        "losses": [(m["loss"], m["grad_norm"]) for m in metrics],
        "answers": answers,
    }


def test_smoke(settings: dict[str, Any], tmp_path: Path) -> None:
    with local_orders(ONE) as run_orders:
        for outcome in run_orders(
            [
                order(settings, tmp_path / "a", "1-2"),
                order(settings, tmp_path / "b", "2-3"),
                order(settings, tmp_path / "c", "1-2"),
            ]
        ):
            print(outcome.error, outcome.seconds)
    print((tmp_path / "a" / "trial.log").read_text())
    assert left(tmp_path / "a") == left(tmp_path / "c")
    print(left(tmp_path / "a")["losses"])
