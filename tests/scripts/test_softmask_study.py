"""The study of the soft mask, whole, on a tiny model: what is stored, what is resumed, what the report says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import read_jsonl, write_jsonl

pytestmark = pytest.mark.processes

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
        write_jsonl(path, items)
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
    return read_jsonl(path)


def test_the_study_runs_resumes_and_reports(tiny_model_folder: Path, data: Path) -> None:
    store, report = data.parent / "runs.jsonl", data.parent / "runs.md"
    first = run_study(tiny_model_folder, data, "--runs", "5")
    assert first.returncode == 0, first.stderr
    lines = read(store)
    runs = {json.dumps(line["run"]): line for line in lines}
    assert len(runs) == len(lines) == 5

    def of(**requested: Any) -> dict[str, Any]:
        given = {
            "optimizer": "AdamW",
            "importance": "kl",
            "control": "none",
            "region": "up+down",
            "seed": 0,
            **requested,
        }
        return next(line for line in lines if line["run"] == given)

    # every run starts at the base: the same conditions give the same figures, whatever ran before
    free, held = of(mask="none"), of(mask="update")
    kept = [a / b for a, b in zip(held["displacement"], free["displacement"], strict=True)]
    assert kept[0] > 0.8 > 0.3 > kept[-1], kept
    assert of(mask="update", control="uniform")["mean_factor"] == pytest.approx(held["mean_factor"])
    assert of(mask="update", control="shuffled")["mean_factor"] == pytest.approx(held["mean_factor"])
    assert len(free["trajectory"]) == 2 and len(free["trajectory"][0]["law"]) == 9
    whole = report.read_text()
    assert "**Partial: 5 of 16 runs.**" in whole and "AdamW, up+down, update, kl, shuffled" in whole

    write_jsonl(store, lines[1:])
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


def test_the_interval_is_of_the_difference_that_is_told() -> None:
    """Items that are all alike: every resample is the data, its interval the point, read at the group's worst law."""
    code = """
import sys, numpy as np
sys.path.insert(0, "scripts/bench")
from softmask_report import CONDITIONS, FURTHER, GENERAL, Result, Run, _interval, _not_in_it
def result(mask, control, law, general):
    curves = {"law": law, **dict.fromkeys(GENERAL, general)}
    losses = {n: np.array([[[v, 1.0]] * 6 for v in curve]) for n, curve in curves.items()}
    run = Run("AdamW", mask, control=control)
    return run, Result(run, np.array([0.0, 1.0, 2.0]), losses, [1.0], 1.0, 1.0)
results = dict([
    result("update", "none", (3.0, 2.0, 1.0), (1.0, 1.1, 1.4)),
    result("update", "uniform", (3.0, 2.0, 1.2), (1.0, 1.3, 1.9)),
    result("none", "none", (3.0, 2.5, 2.0), (1.0, 1.0, 1.0)),  # the worst of the group: all are read at 2
])
one, other, _ = results.values()
found = _interval([(one, other)], results)
assert np.allclose(found, -0.2), found
assert "more seeds, SGD's controls, the region of all modules" in _not_in_it(CONDITIONS)
assert _not_in_it(CONDITIONS + FURTHER) == ""
seeds = [r for r in FURTHER if r.seed == 0]
assert _not_in_it(CONDITIONS + seeds).endswith(": more seeds.")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_shuffled_control_of_all_modules_is_the_products(tiny_model_folder: Path) -> None:
    code = f"""
import sys, torch
from types import SimpleNamespace
sys.path.insert(0, "scripts/bench")
from softmask_report import Run
from softmask_study import _factors
from cofitune.model.anatomy import anatomy_of
from cofitune.model.load import load_model
from cofitune.model.region import resolve_region
from cofitune.softmask.factors import build_factors, shuffle_units
from cofitune.importance_file import unit_counts
anatomy = anatomy_of(load_model({str(tiny_model_folder)!r}, torch.float32))
importance = {{k: torch.rand(anatomy.num_layers, n) for k, n in unit_counts(anatomy).items()}}
region = resolve_region("25%-50%", ("all",), anatomy.num_layers)
study = SimpleNamespace(importance={{"kl": importance}}, anatomy=anatomy)
found = _factors(study, Run("AdamW", "update", control="shuffled", region="all", seed=3), region)
wanted = build_factors(shuffle_units(importance, anatomy, 3), region, region.modules, anatomy)
assert found.keys() == wanted.keys() and all(torch.equal(found[n].values, wanted[n].values) for n in wanted)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
