"""The data of a training, through the command line: several sources, weights, packing, and the account of it all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers import read_manifest, read_metrics, run_train, write_jsonl

pytestmark = pytest.mark.processes

ANSWERS = ["yes", "yes and no", "the court held that the contract was void " * 3]


@pytest.fixture
def config(tmp_path: Path, tiny_model_folder: Path) -> dict[str, Any]:
    rows = [{"instruction": f"Say {n}", "output": ANSWERS[n % 3]} for n in range(30)]
    (tmp_path / "law").mkdir()
    write_jsonl(tmp_path / "law" / "train.jsonl", rows)
    (tmp_path / "law" / "test.jsonl").write_text("nothing to train on\n")
    pq.write_table(
        pa.Table.from_pylist([{"prompt": f"Say {n}", "completion": "no"} for n in range(20)]), tmp_path / "r.parquet"
    )
    return {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {
            "train": [str(tmp_path / "law"), {"path": str(tmp_path / "r.parquet"), "weight": 0.5}], "max_length": 64,
        },
        "train": {"num_train_epochs": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip


def test_a_folder_and_a_weighted_table_are_trained_on_and_accounted_for(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_train(monkeypatch, config) == 0
    output = capsys.readouterr().out
    assert "data: 50 items read, 0 dropped, 0 truncated" in output
    assert (
        f"{tmp_path}/law: 30 items × 1 an epoch" in output
        and f"{tmp_path}/r.parquet: 20 items × 0.5 an epoch" in output
    )
    assert "steps: 5 of 8 items (4 × 2 accumulated × 1 rank)" in output, "40 items an epoch"
    manifest = json.loads((tmp_path / "run" / "train" / "manifest.json").read_text())
    assert [one["read"] for one in manifest["items"]] == [30, 20]
    assert [one["path"] for one in manifest["data"]] == [f"{tmp_path}/law", f"{tmp_path}/r.parquet"]
    metrics = read_metrics(tmp_path / "run")
    assert metrics[-1]["epoch"] == 1.0
    with (tmp_path / "law" / "train.jsonl").open("a") as file:
        file.write(json.dumps({"instruction": "One", "output": "more"}) + "\n")
    assert run_train(monkeypatch, config) == 2
    assert "data" in capsys.readouterr().err, "the run was trained from other contents"


def test_packing_tells_packs_from_items_and_trains(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_train(monkeypatch, config, "--dry-run") == 0
    items = capsys.readouterr().out
    assert run_train(monkeypatch, config, "data.packing=true") == 0
    output = capsys.readouterr().out
    packing = next(line for line in output.splitlines() if line.startswith("packing: 50 items in "))
    packs, fill = int(packing.split()[4]), float(packing.split()[-2].rstrip("%"))
    assert packs < 40 and fill > 80
    assert " packs (4 × 2 accumulated" in output and " items (4 × 2" in items
    counted = [line for line in items.splitlines() if "tokens an epoch" in line]
    assert counted and counted[0] in output, "packing leaves no token out"
    metrics = read_metrics(tmp_path / "run")
    assert metrics[-1]["loss"] < 20
    assert "attention to packs: each conversation by itself (varlen)" in output
    assert read_manifest(tmp_path / "run")["pack_attention"] == "varlen"
    settings = ("data.packing=true", "model.attn_implementation=sdpa", f"output_dir={tmp_path / 'masked'}")
    assert run_train(monkeypatch, config, *settings) == 0
    assert "attention to packs: of all pairs of a row's tokens, under a mask" in capsys.readouterr().out
    masked = read_metrics(tmp_path / "masked")
    assert [m["loss"] for m in masked] == pytest.approx([m["loss"] for m in metrics], rel=1e-4)
    assert read_manifest(tmp_path / "masked")["pack_attention"] == "mask"


def test_dropped_items_are_counted_by_reason_and_shown(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with (tmp_path / "law" / "train.jsonl").open("a") as file:
        file.write('{"instruction": "x", "output": " "}\n' * 3 + "{\n")
    assert run_train(monkeypatch, config) == 2
    assert "law/train.jsonl:31: the response ('output') is empty (data.on_bad_item: drop" in capsys.readouterr().err
    assert run_train(monkeypatch, config, "data.on_bad_item=drop", "train.max_steps=1") == 0
    output = capsys.readouterr().out
    assert "54 items read, 4 dropped" in output and "3 empty response, 1 not valid JSON; the first:" in output
    assert f"{tmp_path}/law/train.jsonl:34: this line is not valid JSON" in output
    (law, _) = json.loads((tmp_path / "run" / "train" / "manifest.json").read_text())["items"]
    assert law["reasons"] == {"empty response": 3, "not valid JSON": 1} and len(law["first_dropped"]) == 4


@pytest.mark.parametrize(
    ("change", "output"),
    [
        ({"train": [{"path": "x.jsonl", "weight": 0}]}, "data.train.0.weight"),
        ({"train": [{"path": "x.jsonl", "format": "chatml"}]}, "data.train.0.format"),
        ({"train": []}, "data.train: name at least one"),
        ({"train": ["no/such.jsonl"]}, "no/such.jsonl: no such data file"),
    ],
)
def test_mistakes_in_the_sources_exit_2(
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    output: str,
) -> None:
    config["data"].update(change)
    assert run_train(monkeypatch, config) == 2
    assert output in capsys.readouterr().err
    assert not Path(config["output_dir"]).exists()


def test_weights_that_leave_nothing_are_refused(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config["data"]["train"] = [{"path": str(tmp_path / "law"), "weight": 0.01}]
    assert run_train(monkeypatch, config) == 2
    assert "not one item is left in an epoch" in capsys.readouterr().err


def test_packing_is_refused_for_code_of_the_models_own(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config["data"]["packing"] = True
    config["model"]["trust_remote_code"] = True
    assert run_train(monkeypatch, config) == 2
    assert "data.packing: " in capsys.readouterr().err


def test_importance_takes_every_item_once(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config["importance"] = {"data": [{"path": str(tmp_path / "r.parquet"), "weight": 2}]}
    assert run_train(monkeypatch, config) == 2
    assert "importance.data: weight is for data.train" in capsys.readouterr().err
