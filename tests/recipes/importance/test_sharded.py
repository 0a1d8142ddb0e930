"""Importance with the weights shared by ZeRO-3: two real ranks against one process that holds the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from cofitune.config.load import load_config
from cofitune.files import read_tensors, sha256_file
from cofitune.importance_file import UNIT_KINDS
from cofitune.model.anatomy import read_anatomy, read_model_config
from cofitune.recipes.importance import plan as importance_plan
from cofitune.recipes.importance.plan import choose_sharding
from cofitune.recipes.importance.recipe import importance
from cofitune.training.memory import gathered_at_once
from tests.helpers import run_command, run_ranks, write_jsonl
from tests.recipes.importance import sharded_cases as cases

pytestmark = pytest.mark.processes

GB = 10**9


def write_config(folder: Path, model: Path) -> Path:
    """Five items of unequal length in micro-batches of two: rank 0 has two of them and rank 1 has one."""
    items = [{"instruction": f"Say {w} {i} times.", "output": f"{w} " * (i + 1)} for i, w in enumerate("abcde")]
    write_jsonl(folder / "general.jsonl", items)
    config = {
        "model": {"name": str(model), "dtype": "float32"},
        "importance": {
            "data": str(folder / "general.jsonl"),
            "per_device_batch_size": 2,
            "estimator": "kl_dropout",
            "dropout": 0.1,
        },
        "output_dir": str(folder / "run"),
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """Start two ranks once; they run every case and write what came out."""
    folder = tmp_path_factory.mktemp("sharded-importance")
    write_config(folder, tiny_model_folder)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder / "gpt2")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=400, eos_token_id=None, bos_token_id=None)
        AutoModelForCausalLM.from_config(made).save_pretrained(folder / "gpt2")
    run_ranks("recipes.importance.sharded_cases", folder)
    return folder


@pytest.mark.parametrize("name", cases.CASES)
def test_two_ranks_that_share_the_weights_equal_one_that_holds_them(name: str, two_ranks: Path) -> None:
    given = [override.format(folder=two_ranks) for override in cases.CASES[name]]
    config = load_config(two_ranks / "config.yaml", [f"output_dir={two_ranks}/one-{name}", *given])
    one = importance(config, console=Console(quiet=True))
    two = two_ranks / f"two-{name}" / "importance"
    for file in ("scores.safetensors", "importance.safetensors"):
        expected, result = read_tensors(one / file, "file"), read_tensors(two / file, "file")
        assert set(expected) == set(result) and (name == "wanda" or set(expected) == set(UNIT_KINDS))
        for kind in expected:
            largest = float(expected[kind].abs().max())
            assert largest > 0
            assert float((expected[kind] - result[kind]).abs().max()) <= 1e-5 * largest, (file, kind)
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (one, two)]
    reliable = [manifest.pop("reliability", {}) for manifest in manifests]
    for manifest in manifests:
        del manifest["sha256"], manifest["checksum"]
    assert manifests[0] == manifests[1]
    for kind, expected in (reliable[0] or {}).items():  # units that score almost the same may change places
        assert reliable[1][kind]["split_half"] == pytest.approx(expected["split_half"], abs=0.02)


@pytest.mark.parametrize("name", cases.CASES)
def test_no_rank_ever_holds_much_more_than_two_layers(name: str, two_ranks: Path) -> None:
    """In the backward pass of the first of two passes, too, where stock ZeRO-3 would leave the whole model gathered."""
    given = [override.format(folder=two_ranks) for override in cases.CASES[name]]
    model = load_config(two_ranks / "config.yaml", given).model.name
    anatomy = read_anatomy(read_model_config(model))
    for rank in (0, 1):
        watched = json.loads((two_ranks / f"{name}-{rank}.json").read_text())
        assert {when for when, _ in watched} == ({"forward"} if name == "wanda" else {"forward", "backward"})
        # fetching ahead may go one weight beyond what DeepSpeed was told
        assert max(numel for _, numel in watched) <= 1.05 * gathered_at_once(anatomy) < 0.6 * anatomy.num_parameters


def test_ranks_interrupted_at_different_points_go_on_to_the_same_bits(two_ranks: Path) -> None:
    folders = [two_ranks / f"two-{name}" / "importance" for name in ("interrupted", "uninterrupted")]
    for file in ("scores.safetensors", "importance.safetensors"):
        assert len({sha256_file(folder / file) for folder in folders}) == 1
    assert not (folders[0] / "partial").exists()


@pytest.mark.parametrize(
    ("requested", "whole", "ranks", "sharded", "why"),
    [
        ("auto", 10 * GB, 8, False, "the whole model takes about"),
        ("auto", 73 * GB, 8, True, "8 ranks share the weights"),  # no room for what an estimate misses
        ("auto", 140 * GB, 8, True, "8 ranks share the weights"),
        ("auto", 140 * GB, 1, False, "there is one rank: several would share the weights"),
        ("none", 140 * GB, 8, False, "as asked for; each rank holds all weights"),
        ("zero3", 10 * GB, 2, True, "as asked for; 2 ranks share the weights"),
    ],
)
def test_it_shards_what_does_not_fit_and_says_why(
    requested: str, whole: int, ranks: int, sharded: bool, why: str
) -> None:
    result = choose_sharding(requested, whole, 80 * GB, ranks)
    assert result.sharded == sharded
    assert why in result.why


def test_the_plan_says_how_the_weights_lie_and_what_that_takes(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, tiny_model_folder)

    def plan(*arguments: str) -> str:
        assert run_command(monkeypatch, "importance", str(path), "--dry-run", *arguments) == 0
        return " ".join(capsys.readouterr().out.split())

    def memory(of: Any) -> Any:
        monkeypatch.setattr(importance_plan, "device_memory", lambda rank: of)

    memory(10 * GB)
    assert "sharding none: the whole model takes about" in plan("--num-processes", "2")
    memory(10**5)
    assert "2 rank(s)" in plan("--num-processes", "2")
    assert "sharding zero3: the whole model takes about" in plan("--num-processes", "2")
    assert "sharding none: the whole model takes about" in plan()
    assert "sharding none: as asked for" in plan("--num-processes", "2", "importance.sharding=none")
    assert not (tmp_path / "run").exists()
