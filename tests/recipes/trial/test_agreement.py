"""Trials on hosts with copies of their own: what differs is named on every rank, before a step is taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.helpers import WORDS, run_ranks, write_jsonl

pytestmark = pytest.mark.processes


def test_ranks_whose_copies_differ_are_named_before_a_trial_trains(tmp_path: Path, tiny_model_folder: Path) -> None:
    taught = [{"instruction": f"Say {w}", "output": f"the {w}"} for w in WORDS[:6]]
    for name in ("training data", "development items"):
        for rank in (0, 1):
            here = tmp_path / name / str(rank)
            here.mkdir(parents=True)
            write_jsonl(here / "train.jsonl", taught[: 6 - rank * (name == "training data")])
            write_jsonl(here / "law.jsonl", taught[: 4 - rank * (name == "development items")])
            config = {
                "model": {"name": str(tiny_model_folder), "dtype": "float32"},
                "data": {"train": "train.jsonl", "max_length": 64},
                "train": {"max_steps": 2, "per_device_train_batch_size": 1, "save_steps": None},
                "eval": {"batch_size": 2, "speciality": [{"path": "law.jsonl", "kind": "generate"}]},
                "softmask": {"apply_to": "none"},
                "region": {"layers": "1", "modules": ["up_proj"]},
                "output_dir": str(tmp_path / name / "run"),
            }
            (here / "config.yaml").write_text(yaml.safe_dump(config))
    run_ranks("recipes.trial.agreement_cases", tmp_path)
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0] == told[1] and all("the ranks disagree: rank 1 on " in message for message in told[0].values())
    assert "items is 6 there and 5 here" in told[0]["training data"]
    assert "items that losses are measured on is " in told[0]["development items"]
    assert not list(tmp_path.rglob("metrics.jsonl"))
