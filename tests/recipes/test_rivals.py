"""Rival methods do what their papers say: adapters and the pull towards the base, on one rank and on two real ones."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cofitune.recipes.train import train
from cofitune.training.delta import hash_tensor

WORKER = Path(__file__).with_name("rival_cases.py")


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rival_cases", WORKER)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"cannot load {WORKER}")
    module = importlib.util.module_from_spec(spec)
    sys.modules["rival_cases"] = module
    spec.loader.exec_module(module)
    return module


cases = _load()
ADAPTERS = [name for name, case in cases.CASES.items() if "adapter" in case]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """Every case trained by two ranks, started once, and by this process."""
    folder = tmp_path_factory.mktemp("rivals")
    shutil.copytree(tiny_model_folder, folder / "model")
    cases.write_data(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(WORKER)]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        pytest.fail(f"the ranks failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    for name in cases.CASES:
        train(cases.config_of(name, folder, 1), console=Console(quiet=True))
    return folder


@pytest.mark.parametrize("name", cases.CASES)
def test_two_ranks_train_what_one_trains(name: str, folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    one, two = (load_file(folder / f"{n}-ranks" / name / "train/delta.safetensors") for n in (1, 2))
    assert one.keys() == two.keys()
    for key in one:
        moved, should = two[key] - base[key], one[key] - base[key]
        assert should.norm() > 0, key
        assert (moved - should).norm() <= 1e-3 * should.norm(), key
    losses = [
        [json.loads(line)["loss"] for line in (folder / f"{n}-ranks" / name / "train/metrics.jsonl").open()]
        for n in (1, 2)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("name", ADAPTERS)
def test_under_an_adapter_the_whole_base_is_frozen_and_only_its_carriers_are_in_the_delta(
    name: str, folder: Path
) -> None:
    base = dict(AutoModelForCausalLM.from_pretrained(folder / "model").named_parameters())
    for ranks in (1, 2):
        train_folder = folder / f"{ranks}-ranks" / name / "train"
        manifest = json.loads((train_folder / "manifest.json").read_text())
        assert manifest["frozen_sha256"] == {n: hash_tensor(t) for n, t in base.items()}
        delta = load_file(train_folder / "delta.safetensors")
        wanted = cases.CASES[name]["adapter"].get("target_modules", "all-linear")
        carries = {"ffn": "mlp.", "all-linear": "_proj."}.get(wanted if isinstance(wanted, str) else "")
        for n in base:
            assert (n in delta) == (carries in n if carries else any(f"{w}.weight" in n for w in wanted)), n
        own = load_file(train_folder / "adapter/adapter_model.safetensors")
        assert manifest["region"]["trained_weights"] == sum(t.numel() for t in own.values())


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_merged_delta_is_pefts_own_merge_of_the_files_it_reads(name: str, folder: Path) -> None:
    train_folder = folder / "2-ranks" / name / "train"
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    merged = PeftModel.from_pretrained(model, train_folder / "adapter").merge_and_unload().state_dict()
    for key, tensor in load_file(train_folder / "delta.safetensors").items():
        torch.testing.assert_close(tensor, merged[key], rtol=1e-5, atol=1e-6)
