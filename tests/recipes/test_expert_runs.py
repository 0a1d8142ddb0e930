"""Mixtures of experts through the command line: importance, a training whose mask holds experts, and the export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cofitune.importance_file import EXPERTS
from cofitune.model.anatomy import read_anatomy
from cofitune.model.load import load_model
from cofitune.model.weight_files import fingerprint
from cofitune.training.delta import apply_delta, read_delta
from tests.families import compare_export, make_folder, tiny_config
from tests.helpers import run_command, write_jsonl
from tests.recipes.test_families import FAMILIES

pytestmark = pytest.mark.processes


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3", "glm4_moe"]
)
def test_a_mask_by_expert_holds_the_most_important_one(
    family: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_tokenizer: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = tiny_config(FAMILIES[family])
    make_folder(made, tmp_path / "model", tiny_tokenizer)
    words = ("court", "lease", "Paris", "buyer", "void", "seller", "tenant", "capital")
    data = write_jsonl(tmp_path / "data.jsonl", ({"instruction": f"Say {w}", "output": f"{w} {w}"} for w in words))
    config = {
        "model": {"name": str(tmp_path / "model"), "dtype": "float32"},
        "data": {"train": str(data), "max_length": 64},
        "importance": {"data": str(data), "per_device_batch_size": 4},
        "region": {"layers": "1", "modules": ["experts"]},
        "softmask": {"apply_to": "update"},
        "train": {"learning_rate": 1e-2, "max_steps": 2, "per_device_train_batch_size": 8},
        "deepspeed": {"zero_stage": 3},
        "output_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert run_command(monkeypatch, "importance", path) == 0
    importance = load_file(tmp_path / "run/importance/importance.safetensors")[EXPERTS]  # [L, experts]
    assert importance[1].max() == 1.0 and importance[1].min() == 0.0
    assert run_command(monkeypatch, "train", path) == 0
    assert "soft mask: update on experts" in capsys.readouterr().out
    anatomy = read_anatomy(made)
    base = load_model(str(tmp_path / "model"), torch.float32)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    delta = read_delta(tmp_path / "run/train", fingerprint(str(tmp_path / "model")))
    apply_delta(base, delta)
    after = dict(base.named_parameters())
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    own = set(anatomy.parameter_names(1, "experts"))
    assert moved <= own and any("gate_up" in name for name in moved) and any("down" in name for name in moved)
    held = int(importance[1].argmax())
    for name in own:
        assert torch.equal(before[name][held], after[name][held]), name
    others = [e for e in range(anatomy.num_experts) if importance[1, e] < 1]
    assert all(any(not torch.equal(before[n][e], after[n][e]) for n in own) for e in others), "weight decay moves all"
    assert run_command(monkeypatch, "export", tmp_path / "run", "--to", tmp_path / "out") == 0
    compare_export(tmp_path)
