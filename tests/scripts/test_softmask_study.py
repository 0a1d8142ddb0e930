"""The study of the soft mask, whole, on a tiny model: what is stored, what is resumed, what the report says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
WORDS = ["court", "contract", "tenant", "lease", "seller", "buyer", "void", "notice", "reason", "landlord"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for number, name in enumerate(
        ("law/train", "law/test", "replay/train", "math/train", "math/test", "user_oriented/test")
    ):
        path = tmp_path / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        items = [
            {"instruction": f"What of the {WORDS[(i + number) % 10]}?", "output": f"{WORDS[i % 7]} {WORDS[i % 3]}"}
            for i in range(30)
        ]
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return tmp_path / "data"


def run_study(model: Path, data: Path, *more: str) -> subprocess.CompletedProcess[str]:
    here = data.parent
    command = [sys.executable, "scripts/bench/softmask_study.py", "--model", str(model), "--data", str(data)]
    sizes = ["--steps", "2", "--test-items", "9", "--importance-items", "6", "--adamw-rate", "1e-2"]
    places = ["--store", str(here / "runs.jsonl"), "--work", str(here / "work")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *sizes, *places, *more], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_study_runs_resumes_and_reports(tiny_model_folder: Path, data: Path) -> None:
    store, report = data.parent / "runs.jsonl", data.parent / "runs.md"
    first = run_study(tiny_model_folder, data, "--runs", "5")
    assert first.returncode == 0, first.stderr
    lines = read(store)
    runs = {json.dumps(line["run"]): line for line in lines}
    assert len(runs) == len(lines) == 5

    def of(**wanted: Any) -> dict[str, Any]:
        given = {"optimizer": "AdamW", "importance": "kl", "control": "none", "region": "up+down", "seed": 0, **wanted}
        return next(line for line in lines if line["run"] == given)

    # every run starts at the base: the same conditions give the same figures, whatever ran before
    free, held = of(mask="none"), of(mask="update")
    kept = [a / b for a, b in zip(held["displacement"], free["displacement"], strict=True)]
    assert kept[0] > 0.8 > 0.3 > kept[-1], kept
    assert of(mask="update", control="uniform")["mean_factor"] == pytest.approx(held["mean_factor"])
    assert of(mask="update", control="shuffled")["mean_factor"] == pytest.approx(held["mean_factor"])
    assert len(free["trajectory"]) == 2 and len(free["trajectory"][0]["law"]) == 9
    whole = report.read_text()
    assert "**Partial: 5 of 32 runs.**" in whole and "AdamW, up+down, update, kl, shuffled" in whole

    store.write_text("".join(json.dumps(line) + "\n" for line in lines[1:]))
    again = run_study(tiny_model_folder, data, "--runs", "1")
    assert again.returncode == 0, again.stderr
    assert len(read(store)) == 5  # the one that was taken away, exactly as it was
    assert read(store)[-1]["run"] == lines[0]["run"]
    assert read(store)[-1]["trajectory"] == lines[0]["trajectory"]
    report.unlink()
    only = run_study(tiny_model_folder, data, "--report")
    assert only.returncode == 0, only.stderr
    assert report.read_text().startswith("# What the soft mask does")


def test_the_layers_below_the_region_may_be_computed_once(tiny_model_folder: Path) -> None:
    code = f"""
import sys, torch
sys.path.insert(0, "scripts/bench")
from softmask_study import FromLayer, below
from cofitune.model.load import load_model
model = load_model({str(tiny_model_folder)!r}, torch.float32).eval()
batch = {{"input_ids": torch.randint(0, 99, (2, 7)), "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])}}
whole = model(**batch).logits
part = below(model, 2, batch)
found = FromLayer(model, 2)(part["input_ids"], part["attention_mask"]).logits
assert torch.equal(found, whole), (found - whole).abs().max()
assert len(model.model.layers) == 4
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
