"""An adapter in some layers: trained as PEFT alone would, exported, and refused where it cannot sit."""

from __future__ import annotations

import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cofitune.config.load import dump_config, load_config
from cofitune.config.schema import Config
from cofitune.data.batches import step_indices
from cofitune.errors import UserError
from cofitune.recipes.export import export
from cofitune.recipes.train.plan import plan_train
from cofitune.recipes.train.recipe import train
from tests.families import compare_export
from tests.plain import mean_loss
from tests.recipes.compare import baseline_cases as cases

pytestmark = pytest.mark.processes
FFN = ["gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "r": 4, "alpha": 8, "rslora": True, "layers": "50%-100%", "modules": "ffn"},
    "dora": {"kind": "dora", "r": 4, "alpha": 8, "layers": [2, 3], "modules": FFN},
}


def config_of(folder: Path, adapter: dict[str, Any], name: str = "run", **train: Any) -> Config:
    """Two steps of four items each; DoRA's norms decay as all else does."""
    settings = {
        "learning_rate": 5e-3, "max_steps": 2, "per_device_train_batch_size": 4, "weight_decay": 0.1,
        "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "save_steps": None, **train,
    }  # fmt: skip
    given = {
        "model": {"name": str(folder / "model"), "dtype": "float32"},
        "data": {"train": str(folder / "train.jsonl"), "max_length": 64},
        "train": settings,
        "adapter": adapter,
        "output_dir": str(folder / name),
    }
    return Config.model_validate(given)


@pytest.fixture
def folder(tmp_path: Path, tiny_model_folder: Path) -> Path:
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    cases.write_data(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ADAPTERS)
def test_two_steps_are_pefts_own_and_the_export_answers_alike(kind: str, folder: Path) -> None:
    """PEFT's model and torch's AdamW in a plain loop, item by item."""
    config = config_of(folder, ADAPTERS[kind])
    plan = plan_train(config, 1)
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    adapter = LoraConfig(
        r=4, lora_alpha=8, use_rslora=kind == "lora", use_dora=kind == "dora", target_modules=FFN,
        layers_to_transform=[2, 3], layers_pattern="layers", task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(config.train.seed)
    model = get_peft_model(base, adapter).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == plan.num_trained
    optimizer = torch.optim.AdamW(trained, lr=5e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for indices in step_indices(plan.steps, config.train.seed):
        loss = mean_loss(model, (plan.data.examples[i] for i in indices))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    expected = model.merge_and_unload().state_dict()

    train(config, console=Console(quiet=True))
    delta = load_file(folder / "run/train/delta.safetensors")
    assert set(delta) == {f"model.layers.{layer}.mlp.{module}.weight" for layer in (2, 3) for module in FFN}
    for name, tensor in delta.items():
        moved, should = tensor - before[name], expected[name] - before[name]
        assert should.norm() > 1e-4 * before[name].norm()
        assert (moved - should).norm() <= 2e-3 * should.norm(), name
    export(folder / "run", folder / "out", console=Console(quiet=True))
    compare_export(folder)


def test_below_an_adapters_layers_activations_are_kept(folder: Path) -> None:
    adapter = {"kind": "dora", "r": 4, "layers": "2-3"}
    for cache in ("none", "memory"):
        settings = {"prefix_cache": cache, "max_steps": None, "num_train_epochs": 3}
        train(config_of(folder, adapter, cache, **settings), console=Console(quiet=True))
    one, other = (load_file(folder / cache / "train/delta.safetensors") for cache in ("none", "memory"))
    base = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    for name in one:
        moved, should = other[name] - base[name], one[name] - base[name]
        assert should.norm() > 0 and (moved - should).norm() <= 1e-3 * should.norm(), name
    assert plan_train(config_of(folder, adapter, prefix_cache="memory", num_train_epochs=2, max_steps=None), 1).prefix


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"layers": "2-9"}, r"adapter\.layers: '2-9' lies outside the model, whose 4 layers are 0-3"),
        ({"layers": "botom2"}, r"adapter\.layers: 'botom2' is no layer range; did you mean 'bottom2'"),
    ],
)
def test_layers_that_are_none_are_the_adapters_mistake(adapter: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=message):
        plan_train(config_of(folder, adapter), 1)


def test_the_plan_says_which_layers_carry_it_and_its_own_config_repeats_it(folder: Path) -> None:
    config = config_of(folder, ADAPTERS["lora"])
    output = StringIO()
    train(config, dry_run=True, console=Console(file=output, width=300))
    where = "mlp.gate_proj, mlp.up_proj, mlp.down_proj of layers 2-3"
    assert f"adapter: lora (r 4, alpha 8, dropout 0, rslora) on {where}" in output.getvalue()
    (folder / "config.yaml").write_text(dump_config(config))
    assert load_config(folder / "config.yaml") == config
