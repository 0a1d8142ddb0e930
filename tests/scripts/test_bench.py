"""scripts/bench: the scripts run, with every side on the same batches; tiny models on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.processes

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"


def _run(script: str, out: Path, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, BENCH / f"{script}.py", *arguments, "--out", out]
    of_a_rank = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what other tests may have set
    mine = {name: value for name, value in os.environ.items() if name not in of_a_rank}
    environment = {**mine, "PYTHONPATH": str(BENCH.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert (out / f"{script}.md").read_text().startswith("# ")
    results: dict[str, Any] = json.loads((out / f"{script}.json").read_text())
    assert str(out) not in json.dumps(results), "no paths of this machine"
    return results


def test_step_gives_all_sides_the_same_batches_and_counts_fewer_operations(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    (tmp_path / "law").mkdir()
    items = [{"instruction": f"Say {word}", "output": word} for word in ("court", "lease", "void", "Paris")]
    (tmp_path / "law" / "train.jsonl").write_text("".join(json.dumps(i) + "\n" for i in items))
    sizes = ("--batch", 2, "--batches", 1, "--steps", 1)
    result = _run("step", tmp_path / "out", "--data", tmp_path, "--model", tiny_model_folder, "--sets", "law", *sizes)
    sides = result["data"]["law"]["sides"]
    assert max(s["first_loss"] for s in sides.values()) == pytest.approx(
        min(s["first_loss"] for s in sides.values()), rel=1e-5
    )
    flops = [sides[name]["flops"] for name in ("region, prefix kept", "region", "full")]
    assert flops == sorted(set(flops))
    assert {t["side"] for t in result["targets"]} == {"region", "region, prefix kept"}


def test_gpu_runs_at_a_tiny_size(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    result = _run("gpu", tmp_path, "--sizes", "tiny", "--length", 16, "--steps", 1, "--warm", 1, "--peak-tflops", 1)
    plain, masked, lora = result["runs"]
    assert plain["trained"] == masked["trained"] == 2 * 64 * 96, "one of four layers"
    assert masked["mask_share"] > plain["mask_share"] == 0
    assert all(run["mfu"] > 0 and run["tokens_per_second"] > 0 for run in (plain, masked, lora))
    assert all(run["kernel_share"] > 0 for run in (plain, masked, lora))


def test_gpu_takes_ragged_micro_batches_without_checkpointing(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    sizes = ("--sizes", "tiny", "--length", 16, "--steps", 1, "--warm", 1, "--zero-stage", 2)
    result = _run("gpu", tmp_path, *sizes, "--micro-batch", 4, "--ragged", "--no-checkpointing")
    assert [run["side"] for run in result["runs"]] == [
        "region", "region, update mask", "LoRA r=8", "region, attention mask",
    ]  # fmt: skip


def test_gpu_compares_sides_of_one_way_and_tells_what_there_is_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    gpu = import_module("gpu")
    figures = {"trained": 1, "tokens_per_second": 1.0, "mfu": None, "kernel_share": 0.5, "peak_bytes": 2**30}
    figures |= {"mask_share": 0.01, "profile": None}
    runs = [
        {**gpu.Way("7b", "sdpa", size, how)._asdict(), "side": side, "seconds": size * seconds, **figures}
        for size, how in ((1, "all"), (4, "auto"))
        for side, seconds in ((gpu.PLAIN, 2.0), (gpu.MASKED, 3.0), (gpu.LORA, 4.0 * size))
    ]
    for count in range(len(runs) + 1):  # the card may be taken away after any of them
        text = gpu.report({"command": "gpu", "machine": {}, "runs": runs[:count]})
        assert text.count("of LoRA's |") == count // 3
    ratios = [line.split("|")[3].strip() for line in gpu.verdicts(runs) if "of LoRA's" in line]
    assert ratios == ["0.75", "0.188"]


def test_host_counts_fewer_operations_than_before(tmp_path: Path) -> None:
    result = _run("host", tmp_path, "--layers", 4, "--steps", 2)
    assert 0 < result["ratios"]["operations"] < 0.9 and result["ratios"]["cpu_seconds"] > 0


def test_importance_is_counted_and_timed_beside_a_full_step(tiny_model_folder: Path, tmp_path: Path) -> None:
    sizes = ("--batch", 2, "--length", 32, "--rounds", 3)
    result = _run("importance", tmp_path / "out", "--model", tiny_model_folder, *sizes)
    step = result["flops"]["full fine-tuning step"]
    assert 1.2 < result["flops"]["kl_dropout"] / step <= 1.4
    assert 0.6 < result["flops"]["fisher"] / step <= 0.7
    assert all(len(seconds) == 3 and min(seconds) > 0 for seconds in result["seconds"].values())
    page = (tmp_path / "out" / "importance.md").read_text()
    assert "| kl_dropout | " in page and page.endswith("Target, at most 1.4 times a step's FLOPs: held.\n")
