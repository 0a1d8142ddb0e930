"""Ranks on machines with copies of their own: what differs is named before anything is trained."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cofitune.importance_file import unit_counts, write_importance
from cofitune.model.anatomy import read_anatomy, read_model_config
from cofitune.model.weight_files import fingerprint
from tests.helpers import read_delta, read_manifest, same_tensors, write_jsonl
from tests.recipes.train.ranks import train_apart

pytestmark = pytest.mark.processes


def machine(here: Path, model: Path, items: int, **config: Any) -> Path:
    """A folder with a model, items and a config."""
    shutil.copytree(model, here / "model")
    write_jsonl(here / "items.jsonl", ({"instruction": f"{n}", "output": "yes"} for n in range(items)))
    content = {"model": {"name": "model", "dtype": "float32"}, "data": {"train": "items.jsonl"}, "output_dir": "run"}
    (here / "config.yaml").write_text(yaml.safe_dump({**content, **config}))
    return here


def test_another_copy_of_data_config_or_packages_is_named(tmp_path: Path, tiny_model_folder: Path) -> None:
    machines = []
    for rank, name in enumerate(("a", "b")):
        train = {"max_steps": 2, "per_device_train_batch_size": 1, "seed": rank}
        machines.append(machine(tmp_path / name, tiny_model_folder, 8 + rank, train=train))
        package = tmp_path / name / "packages" / f"deepspeed-9.{rank}.dist-info" / "METADATA"
        package.parent.mkdir(parents=True)
        package.write_text(f"Metadata-Version: 2.1\nName: deepspeed\nVersion: 9.{rank}\n")
    (first, message), (second, other) = train_apart(machines)
    assert (first, second) == (2, 2), message + other
    assert "error: the ranks disagree: rank 1 on " in message and "Traceback" not in message + other
    for difference in (
        "packages.deepspeed is '9.0' there and '9.1' here",
        "items is 8 there and 9 here",
        "data.train.0.sha256 is ",
        "train.seed is 0 there and 1 here",
    ):
        assert difference in message, message
    assert not (tmp_path / "a" / "run").exists()


def test_the_importance_is_looked_up_by_rank_0_alone(tmp_path: Path, tiny_model_folder: Path) -> None:
    """The other machine's file system does not show it yet: b has none, and trains as d, which has it."""
    settings = {"train": {"max_steps": 2, "per_device_train_batch_size": 1}, "softmask": {"apply_to": "update"}}
    a, b, c, d = (machine(tmp_path / name, tiny_model_folder, 8, **settings) for name in "abcd")
    anatomy = read_anatomy(read_model_config(str(tiny_model_folder)))
    vectors = {kind: torch.full((anatomy.num_layers, n), 0.25) for kind, n in unit_counts(anatomy).items()}
    for here in (a, c, d):
        base = fingerprint(str(here / "model"))
        write_importance(here / "run" / "importance", vectors, vectors, {"base_fingerprint": base})
    for machines in ((a, b), (c, d)):
        ended = train_apart(machines)
        assert [code for code, _ in ended] == [0, 0], ended
    assert read_manifest(a / "run")["used"] == read_manifest(c / "run")["used"]
    assert same_tensors(read_delta(a / "run"), read_delta(c / "run"))
    assert not (b / "run").exists()
