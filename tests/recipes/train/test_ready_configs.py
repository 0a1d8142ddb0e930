"""The configs for a node of GPUs: they plan from a config.json alone, and fit the devices that their comments name."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from cofitune.config.load import load_config
from cofitune.recipes.train.plan import plan_train
from cofitune.training.fit_device import SHARE
from tests.helpers import run_command

REPOSITORY = Path(__file__).parents[3]
GIB = 1024**3
SIZES = {
    "llama-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
}


def _llama_folder(folder: Path, name: str) -> Path:
    LlamaConfig(vocab_size=32000, **SIZES[name]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("name", "trained"), [("llama-7b", "721,420,288"), ("llama-13b", "1,415,577,600")])
def test_the_ready_configs_plan_from_a_config_json_alone(
    name: str,
    trained: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(REPOSITORY)
    folder = _llama_folder(tmp_path / "model", name)
    settings = [f"model.name={folder}", f"output_dir={tmp_path / 'run'}", "data.packing=true"]
    arguments = [*settings, "--dry-run", "--num-processes", "8"]
    assert run_command(monkeypatch, "train", f"configs/{name}.yaml", *arguments) == 0
    output = capsys.readouterr().out
    assert f"trainable parameters: {trained} of" in output
    assert "still missing" in output and "no safetensors weights" in output
    assert "no packs without a tokenizer; the steps are counted as if each held one item" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "ranks", "gib", "stage", "fits"),
    [
        ("llama-7b", 1, 80, 2, True),
        ("llama-7b", 1, 40, 2, True),
        ("llama-7b", 1, 24, 3, False),
        ("llama-7b", 8, 24, 2, True),
        ("llama-13b", 1, 80, 2, True),
        ("llama-13b", 1, 48, 3, False),
        ("llama-13b", 8, 40, 2, True),
        ("llama-13b", 8, 24, 3, True),
    ],
)
def test_the_ready_configs_offload_nothing_where_they_fit(
    name: str, ranks: int, gib: int, stage: int, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    folder = _llama_folder(tmp_path / "model", name)
    config = load_config(f"configs/{name}.yaml", [f"model.name={folder}", f"output_dir={tmp_path / 'run'}"])
    plan = plan_train(config, ranks, dry_run=True).fitted(gib * GIB)
    assert plan.settings.zero_stage == stage and plan.footprint.memory.host_offloaded == 0
    assert (plan.footprint.memory.device <= SHARE * gib * GIB) == fits


@pytest.mark.parametrize(("name", "gib"), [("llama-7b", 24), ("llama-13b", 48)])
def test_one_small_gpu_holds_what_is_offloaded_as_the_comment_says(
    name: str, gib: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    text = Path(f"configs/{name}.yaml").read_text(encoding="utf-8")
    assert (
        f"on a single GPU of {gib} GB or less needs, slowly, ZeRO-3: offload_optimizer: cpu, offload_param: cpu" in text
    )
    offload = ["deepspeed.offload_optimizer=cpu", "deepspeed.offload_param=cpu"]
    changes = [f"model.name={_llama_folder(tmp_path / 'model', name)}", f"output_dir={tmp_path / 'run'}", *offload]
    plan = plan_train(load_config(f"configs/{name}.yaml", changes), 1, dry_run=True).fitted(gib * GIB)
    assert plan.settings.zero_stage == 3 and plan.footprint.memory.device <= SHARE * gib * GIB
