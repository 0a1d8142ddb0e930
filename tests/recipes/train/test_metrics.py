"""Watching a training through the command line: the validation loss at its steps, curves, and a log's plain lines."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from rich.console import Console

from cofitune.errors import RepairWarning
from cofitune.recipes.train.metrics import append_metrics, truncate_metrics
from cofitune.reports.text import clock
from cofitune.reports.training import progress
from cofitune.reports.training.progress import TrainProgress
from cofitune.training.loop import StepRecord
from tests.helpers import read_jsonl, run_train, write_jsonl

pytestmark = pytest.mark.processes


def test_the_validation_loss_is_told_at_start_at_its_steps_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for name, words in (("train", ["court", "void", "lease"]), ("held", ["seller", "buyer"])):
        write_jsonl(tmp_path / f"{name}.jsonl", ({"instruction": f"Say {word}", "output": word * 3} for word in words))
    config = {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "held.jsonl")},
        "train": {
            "max_steps": 3, "per_device_train_batch_size": 1, "learning_rate": 1e-2, "validation_steps": 2,
            "report_to": "tensorboard",
        },
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    assert run_train(monkeypatch, config) == 0
    folder = tmp_path / "run" / "train"
    lines = read_jsonl(folder / "metrics.jsonl")
    validations = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in validations] == [0, 2, 3]
    assert len({line["validation_loss"] for line in validations}) == 3
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert all(line["mfu"] is None and line["tokens_per_second"] > 0 for line in steps)
    assert all(0 <= line["padded_share"] < 1 and line["peak_host_bytes"] > 2**20 for line in steps)

    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["validation"]["items"] == 2 and manifest["validation"]["losses"] == validations
    events = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    drawn = [(e.step, e.value) for e in events.Scalars("validation_loss")]
    assert drawn == [(v["step"], pytest.approx(v["validation_loss"])) for v in validations]
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3]
    assert "step 2/3  validation loss " in capsys.readouterr().out


def lines_of(num_steps: int, tmp_path: Path) -> list[str]:
    file = (tmp_path / "log").open("w")
    with file, TrainProgress(Console(file=file, width=60), num_steps, visible=True) as bar:
        for _ in range(num_steps):
            bar.advance(2.0, 1e-4, 1234.4, 0.415)
    return (tmp_path / "log").read_text().splitlines()


def test_a_log_has_about_ten_lines_each_whole(tmp_path: Path) -> None:
    lines = lines_of(100, tmp_path)
    assert len(lines) == 10
    assert lines[0] == "step 10/100  loss 2.0000  lr 1.00e-04  1234 tokens/s  MFU 41.5%  0:00:00 left"
    assert lines[-1] == "step 100/100  loss 2.0000  lr 1.00e-04  1234 tokens/s  MFU 41.5%"


def test_a_slow_training_speaks_oftener(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1)
    assert len(lines_of(40, tmp_path)) == 40


@pytest.mark.parametrize(
    ("seconds", "message"), [(0, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"), (360000, "100:00:00")]
)
def test_time_left_reads_as_a_clock(seconds: float, message: str) -> None:
    assert clock(seconds) == message


def test_damaged_figures_are_left_out_and_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    steps = [StepRecord(n, 0.5, 2.0, 1e-4, 1.0, 10, 20, 0.5, 40.0, 0.1, None, 0, 2**20) for n in range(1, 7)]
    for step in steps:
        append_metrics(path, step)
    lines = path.read_text().splitlines(keepends=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert truncate_metrics(path, 5)[0] == steps[:5] and path.read_text() == "".join(lines[:5])
    damaged = [lines[0], lines[1].replace("loss", "lozz"), "[]\n", lines[3], "\xff{\n", lines[5][:-9]]
    path.write_text("".join(damaged), encoding="latin-1")
    with pytest.warns(RepairWarning, match=r"metrics.jsonl: the figures of steps 2-3, 5 are damaged or gone"):
        assert truncate_metrics(path, 5)[0] == [steps[0], steps[3]]
    assert path.read_text() == lines[0] + lines[3]
    path.unlink()
    with pytest.warns(RepairWarning, match="the figures of step 1 are"):
        assert truncate_metrics(path, 1) == ([], [], [])
