"""The four commands and the export on the real small model, a handful of steps each, typed as a user types them.

The second search is a real interpreter, which imports what it needs by itself (tests/forker.py). The other commands
are that in tests/scripts/test_build_wheel.py, and the ranks of a training in tests/launch/test_hostfile.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import forker

REPOSITORY = Path(__file__).parent.parent
SMALL_MODEL = REPOSITORY / ".cache" / "SmolLM2-135M-Instruct"
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(
        not (SMALL_MODEL / "config.json").is_file(), reason="the small real model is not here; scripts/test converts it"
    ),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's data and a small config of all four commands."""
    folder = tmp_path_factory.mktemp("end-to-end")
    subprocess.run([sys.executable, str(REPOSITORY / "scripts" / "demo_data.py"), "--to", str(folder)], check=True)
    config: dict[str, Any] = {
        "model": {"name": str(SMALL_MODEL), "dtype": "float32"},
        "data": {"train": str(folder / "ledger_train.jsonl"), "max_length": 160},
        "region": "search",
        "rehearsal": {"data": str(folder / "general_prompts.jsonl"), "max_items": 4, "max_new_tokens": 12},
        "importance": {"data": str(folder / "general_train.jsonl"), "max_items": 4},
        "softmask": {"apply_to": "update"},
        "train": {
            "learning_rate": 1e-3, "warmup_ratio": 0, "max_steps": 3, "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2, "rehearsal": {"share": 0.2},
        },
        "eval": {
            "speciality": {
                "path": str(folder / "ledger_test.jsonl"), "kind": "generate", "max_new_tokens": 24, "limit": 2,
            },
            "versatility": {
                "gen_kn": {"path": str(folder / "gen_kn.jsonl"), "kind": "multiple_choice", "limit": 4},
                "gen_rs": {"path": str(folder / "gen_rs.jsonl"), "kind": "multiple_choice", "limit": 4},
                "instruct": {"path": str(folder / "instruct.jsonl"), "kind": "ifeval", "max_new_tokens": 8, "limit": 2},
            },
            "drift": str(folder / "run" / "rehearsal"),
        },
        "search": {"levels": [{"layers": ["bottom1", "top"]}, {"modules": [["up_proj", "down_proj"]]}],
                   "train_steps": 1, "limit": 2},
        "output_dir": str(folder / "run"),
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def cofitune(*words: object, forked: bool = True) -> str:
    """Type a command; it must succeed. Gives what it said."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    command = [sys.executable, "-m", "cofitune", *map(str, words)]
    with pytest.MonkeyPatch.context() as patch:
        if not forked:
            patch.setattr(forker, "ENABLED", [False])
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, env=clean)
    if done.returncode:
        pytest.fail(f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def test_the_main_job_end_to_end(work: Path) -> None:
    config, run = work / "config.yaml", work / "run"

    assert "held out" in cofitune("rehearse", config)
    assert "region.yaml" in cofitune("search", config)
    region = yaml.safe_load((run / "search" / "region.yaml").read_text())
    trials = (run / "search" / "trials.jsonl").read_text()
    assert len(trials.splitlines()) == 4, "the base, two quarters, and the better one's projections"
    cofitune("search", config, forked=False)
    assert (run / "search" / "trials.jsonl").read_text() == trials, "a second call repeats no trial"

    cofitune("importance", config, "--num-processes", 2)
    assert (run / "importance" / "importance.safetensors").is_file()

    output = cofitune("train", config, "--num-processes", 2)
    assert (
        str(run / "search" / "region.yaml") in output and str(run / "importance" / "importance.safetensors") in output
    )
    assert "unchanged, bit for bit" in output
    manifest = json.loads((run / "train" / "manifest.json").read_text())
    assert manifest["region"]["layers"] == region["layers"] and manifest["ranks"] == 2
    assert manifest["last_loss"] < manifest["first_loss"]
    assert manifest["used"]["rehearsal"]["path"] == str(run / "rehearsal" / "manifest.json")
    before, *_, after = manifest["drift"]["curve"]
    assert abs(before["drift"]) < 1e-4 < abs(after["drift"]), "the base has not moved, the run has"

    output = cofitune("eval", config)
    assert all(word in output for word in ("speciality", "gen_kn", "gen_rs", "instruct", "versatility", "unified"))
    scores = json.loads((run / "eval" / "scores.json").read_text())
    assert scores["models"]["run"]["delta_sha256"] == manifest["delta_sha256"]
    samples = sorted(p.relative_to(run / "eval" / "samples") for p in (run / "eval" / "samples").rglob("*.jsonl"))
    assert len(samples) == 10
    drift = {name: model["tasks"]["drift"]["raw"] for name, model in scores["models"].items()}
    assert abs(drift["base"]) < 1e-4 and abs(drift["run"] - after["drift"]) < 1e-3, "as the training measured it"

    cofitune("export", run, "--to", work / "whole")
    _the_export_answers_as_base_plus_delta(work, run)


def _the_export_answers_as_base_plus_delta(work: Path, run: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(work / "whole")
    ids = tokenizer("Ledger line:\nTaxi to the airport, 14 March, 23.50 euros", return_tensors="pt").input_ids
    by_hand = AutoModelForCausalLM.from_pretrained(SMALL_MODEL)
    with safe_open(run / "train" / "delta.safetensors", framework="pt") as delta, torch.no_grad():
        for name in delta.keys():  # noqa: SIM118 -- not a dict
            by_hand.get_parameter(name).copy_(delta.get_tensor(name))
        expected = by_hand(ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(work / "whole")(ids).logits, expected)


def test_the_demos_config_loads() -> None:
    """The demo itself runs for a quarter of an hour; its config must at least load and keep the test items apart."""
    from cofitune.config.load import load_config

    config = load_config(REPOSITORY / "configs" / "demo" / "ledger.yaml")
    assert config.region == "search" and config.softmask.apply_to == "update"
    assert config.search.eval is not None and config.search.eval.speciality[0].path != config.eval.speciality[0].path
