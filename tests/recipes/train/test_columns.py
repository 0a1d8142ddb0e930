"""A mask along input columns from the importance to the trained weights, and what does not fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cofitune.config.schema import Config
from cofitune.errors import ArtifactError
from cofitune.files import read_json, read_tensors
from cofitune.importance_file import COLUMNS, read_reliability, unit_counts
from cofitune.recipes.importance.recipe import importance
from cofitune.recipes.train.plan import plan_train
from cofitune.recipes.train.resume import identity
from tests.helpers import run_train, write_jsonl

pytestmark = pytest.mark.processes
HARD = {"apply_to": "update", "axis": "columns", "threshold": 0.7}


@pytest.fixture
def config(tmp_path: Path, tiny_model_folder: Path) -> dict[str, Any]:
    items = [{"instruction": f"Say {n}", "output": "The court held that " * n} for n in range(1, 7)]
    data = str(write_jsonl(tmp_path / "data.jsonl", items))
    return {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"train": data, "max_length": 64},
        "region": {"layers": "1", "modules": ["up_proj", "o_proj"]},
        "importance": {"data": data, "estimator": "wanda", "per_device_batch_size": 2},
        "train": {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1},
        "output_dir": str(tmp_path / "run"),
    }


def make_importance(config: dict[str, Any], **changes: Any) -> Path:
    own = {**config, "importance": {**config["importance"], **changes}}
    return importance(Config.model_validate(own), console=Console(quiet=True))


def test_important_columns_stay_and_the_others_train(
    config: dict[str, Any], tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_importance(config)
    manifest = read_json(folder / "manifest.json", "manifest")
    assert (manifest["format"], manifest["axis"], manifest["estimator"]) == (2, COLUMNS, "wanda")
    vectors = read_tensors(folder / "importance.safetensors", "file")
    plan = plan_train(Config.model_validate(config), 1)
    assert {kind: v.shape[1] for kind, v in vectors.items()} == unit_counts(plan.anatomy, COLUMNS)
    assert read_reliability(manifest).keys() == vectors.keys()
    assert run_train(monkeypatch, {**config, "softmask": HARD}) == 0
    assert "soft mask: update on o_proj, up_proj, along input columns" in " ".join(capsys.readouterr().out.split())
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder).state_dict()
    delta = load_file(Path(config["output_dir"]) / "train" / "delta.safetensors")
    for module, name in (("up_proj", "mlp.up_proj"), ("o_proj", "self_attn.o_proj")):
        stays = vectors[f"{module}_columns"][1] >= 0.7
        before, after = (tensors[f"model.layers.1.{name}.weight"] for tensors in (base, delta))
        assert 0 < int(stays.sum()) < len(stays)
        assert torch.equal(after[:, stays], before[:, stays])
        assert (after[:, ~stays] != before[:, ~stays]).any(dim=0).all()


def test_the_axis_is_part_of_whose_training_it_is(config: dict[str, Any]) -> None:
    make_importance(config)
    plan = plan_train(Config.model_validate({**config, "softmask": HARD}), 1)
    mask = identity(plan)["softmask"]
    assert mask["axis"] == "columns" and mask["modules"] == ["o_proj", "up_proj"]


@pytest.mark.parametrize(
    ("estimator", "axis", "message"),
    [
        (
            "wanda",
            "rows",
            "rows needs an importance of heads, neurons and outputs .*fisher or kl_dropout.* is of input",
        ),
        ("fisher", "columns", r"columns needs an importance of input columns \(importance.estimator: wanda\)"),
    ],
)
def test_an_importance_of_the_other_axis_is_refused(
    config: dict[str, Any], estimator: str, axis: str, message: str
) -> None:
    make_importance(config, estimator=estimator)
    softmask = {"apply_to": "update", "axis": axis}
    with pytest.raises(ArtifactError, match=f"softmask.axis: {message}") as raised:
        plan_train(Config.model_validate({**config, "softmask": softmask}), 1)
    assert str(raised.value).endswith("or name another in softmask.importance")
