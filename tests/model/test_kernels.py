"""`model.kernels`: where it comes to fused kernels, what is refused, and that records say so."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cofitune.config.schema import Config
from cofitune.errors import UserError
from cofitune.model import kernels
from cofitune.model.kernels import FAMILIES, MODULE, choose_kernels
from cofitune.recipes import from_config
from cofitune.recipes.evaluate.plan import plan_eval
from cofitune.recipes.train.plan import plan_train
from cofitune.recipes.train.resume import identity
from cofitune.training.swiglu import keep_gate_and_up
from tests.helpers import write_jsonl


def pretend(patch: pytest.MonkeyPatch, gpu: bool = True, installed: bool = True) -> None:
    """A machine as it is not: only what is chosen there is looked at."""
    patch.setattr(torch.cuda, "is_available", lambda: gpu)
    found = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> Any:
        return (object() if installed else None) if name == MODULE else found(name, package)

    patch.setattr(kernels.importlib.util, "find_spec", find)
    patch.setattr(kernels.metadata, "version", lambda name: "9.9" if name == "liger-kernel" else metadata.version(name))


def test_auto_takes_kernels_where_they_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        pretend(patch)
        assert [choose_kernels("auto", family) for family in FAMILIES] == ["liger-kernel 9.9"] * len(FAMILIES)
        assert choose_kernels(True, "llama") == "liger-kernel 9.9"
        assert choose_kernels(False, "llama") is None
        assert choose_kernels("auto", "gpt2") is None
    for missing in ({"gpu": False}, {"installed": False}):
        with monkeypatch.context() as patch:
            pretend(patch, **missing)
            assert choose_kernels("auto", "llama") is None


@pytest.mark.parametrize(
    ("missing", "family", "message"),
    [
        ({"gpu": False}, "llama", r"model\.kernels: true needs a GPU, and there is none here; auto takes"),
        (
            {"installed": False},
            "llama",
            r"model\.kernels: true needs liger-kernel, which is not installed: pip install",
        ),
        ({}, "gpt2", r"model\.kernels: true knows no kernels for model type gpt2 \(but for llama, "),
    ],
)
def test_kernels_that_cannot_be_used_are_refused(
    monkeypatch: pytest.MonkeyPatch, missing: dict[str, bool], family: str, message: str
) -> None:
    pretend(monkeypatch, **missing)
    with pytest.raises(UserError, match=message):
        choose_kernels(True, family)


@pytest.fixture
def config(tmp_path: Path, tiny_model_folder: Path) -> Config:
    items = str(write_jsonl(tmp_path / "law.jsonl", [{"instruction": "Who?", "output": "the buyer"}] * 4))
    return Config.model_validate(
        {
            "model": {"name": str(tiny_model_folder), "dtype": "float32"},
            "data": {"train": items},
            "train": {"max_steps": 1},
            "eval": {"speciality": {"path": items, "kind": "generate"}, "batch_size": 2},
            "output_dir": str(tmp_path / "run"),
        }
    )


def test_training_and_answers_say_by_which_kernels_they_came(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, plan = plan_eval(config), plan_train(config, 1)
    assert "kernels" not in asked.settings and "kernels" not in identity(plan)["model"]
    before = asked.key(asked.models[0], asked.tasks[0])
    monkeypatch.setattr(from_config, "choose_kernels", lambda *_: "liger-kernel 9.9")
    assert identity(plan)["model"]["kernels"] == "liger-kernel 9.9"
    asked = plan_eval(config)
    assert asked.settings["kernels"] == "liger-kernel 9.9"
    assert asked.key(asked.models[0], asked.tasks[0]) != before, "answers without kernels are not taken for these"


def test_the_base_gets_kernels_in_training_and_evaluation_alone(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched: list[Any] = []
    monkeypatch.setattr(from_config, "choose_kernels", lambda *_: "liger-kernel 9.9")
    monkeypatch.setattr(from_config, "apply_kernels", patched.append)
    assert from_config.load_base(config.model) and not patched
    assert from_config.load_base(config.model, with_kernels=True) is patched[0]


def test_a_plan_refuses_kernels_before_weights_load(config: Config) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    asked = config.model_copy(update={"model": config.model.model_copy(update={"kernels": True})})
    with pytest.raises(UserError, match=r"model\.kernels: true needs a GPU"):
        plan_train(asked, 1)
    with pytest.raises(UserError, match=r"model\.kernels: true needs a GPU"):
        plan_eval(asked)


def test_an_ffn_that_has_a_kernel_keeps_it() -> None:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    model = LlamaForCausalLM(config)
    mlp: Any = model.model.layers[0].mlp
    mlp.forward = own = mlp.forward
    assert keep_gate_and_up(model, "model.layers", 0) == 1 and mlp.forward is own
