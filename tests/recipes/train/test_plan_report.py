"""What the plan of a training says before it begins."""

from __future__ import annotations

import json
import shutil
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from cofitune.config.schema import Config
from cofitune.recipes.train.plan_report import print_stage_hint
from tests.helpers import run_train


@pytest.mark.parametrize(
    ("ranks", "on_gpu", "deepspeed", "is_told"),
    [
        (1, True, {"zero_stage": 3}, True),
        (1, True, {}, False),  # auto
        (1, True, {"zero_stage": 2}, False),
        (1, True, {"zero_stage": 3, "offload_param": "cpu"}, False),  # which only stage 3 can
        (2, True, {"zero_stage": 3}, False),
        (1, False, {"zero_stage": 3}, False),
    ],
)
def test_one_gpu_is_told_of_the_faster_stage(
    ranks: int, on_gpu: bool, deepspeed: dict[str, object], is_told: bool
) -> None:
    output = StringIO()
    config = Config.model_validate({"model": {"name": "any"}, "output_dir": "any", "deepspeed": deepspeed})
    print_stage_hint(config.deepspeed, ranks, on_gpu, Console(file=output, width=200))
    assert ("deepspeed.zero_stage=2" in output.getvalue()) == is_told


def test_a_dry_run_refuses_a_tokenizer_that_no_later_file_mends(
    tmp_path: Path,
    tiny_model_folder: Path,
    eight_items: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = shutil.copytree(tiny_model_folder, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<ledger>"])
    tokenizer.save_pretrained(model)
    config = {"model": {"name": str(model)}, "data": {"train": str(eight_items), "max_length": 64}}
    assert run_train(monkeypatch, {**config, "output_dir": str(tmp_path / "run")}, "--dry-run") == 2
    assert "1 token more than the embedding has rows" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("attention", "expected"), [("auto", "none"), ("eager", "2 (from layer 2 to 3)")])
def test_attention_that_keeps_its_scores_has_every_layer_checkpointed(
    tmp_path: Path,
    tiny_model_folder: Path,
    eight_items: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    attention: str,
    expected: str,
) -> None:
    config = {
        "model": {"name": str(tiny_model_folder), "attn_implementation": attention},
        "data": {"train": str(eight_items), "max_length": 64},
        "region": {"layers": "2"},
        "output_dir": str(tmp_path / "run"),
    }
    assert run_train(monkeypatch, config, "--dry-run") == 0
    assert f"gradient checkpointing (auto): {expected} of the 2 layers" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("stored", ["float16", "float32"])
def test_weights_that_each_rank_converts_are_counted_and_told(
    stored: str,
    tmp_path: Path,
    tiny_model_folder: Path,
    eight_items: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_folder, model)
    AutoModelForCausalLM.from_pretrained(model, dtype=stored).save_pretrained(model)
    config = {"model": {"name": str(model), "dtype": "float32"}, "data": {"train": str(eight_items), "max_length": 64}}
    config |= {"region": {"layers": "2-3", "modules": "ffn"}, "softmask": {"apply_to": "none"}}
    options = ("--dry-run", "--num-processes", "8", "--json")
    assert run_train(monkeypatch, {**config, "output_dir": str(tmp_path / "run")}, *options) == 0
    told = capfd.readouterr()
    plan = json.loads(told.out)["plan"]
    copies = 8 if stored == "float16" else 1
    assert plan["host_bytes"] == copies * 4 * plan["all_weights"]
    sentence = f"they are stored in float16: 8 ranks convert a copy each; `cofitune convert {model}"
    assert (sentence in " ".join(told.err.split())) == (copies > 1)


@pytest.mark.parametrize(("rate", "warned"), [(4, True), (1e-2, False)])
def test_a_plan_warns_of_absurd_rates_and_groups_large_numbers(
    rate: float,
    warned: bool,
    tmp_path: Path,
    tiny_model_folder: Path,
    eight_items: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = {
        "model": {"name": str(tiny_model_folder)},
        "data": {"train": str(eight_items), "max_length": 64},
        "train": {
            "learning_rate": rate,
            "num_train_epochs": 1e6,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
        },
        "output_dir": str(tmp_path / "run"),
    }
    assert run_train(monkeypatch, config, "--dry-run") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "steps: 1,000,000 of 8 items" in said
    assert (f"warning: train.learning_rate: {rate:g} is far above" in said) == warned
