"""Drift of a training from its base, and train.max_drift, which ends it: through the real command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cofitune.rehearsal.items import read_rehearsal
from tests.helpers import (
    SharedRuns,
    outside_ranks,
    read_delta,
    read_manifest,
    read_metrics,
    run_train,
    train_interrupted,
    write_config,
)

pytestmark = pytest.mark.processes


@pytest.fixture
def config(rehearsal_config: dict[str, Any]) -> dict[str, Any]:
    """Nine steps away from the base, at a constant rate: a run of fewer steps takes the same ones."""
    rehearsal_config["train"].update(
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_steps=9,
        save_steps=3,
        save_total_limit=9,
        validation_steps=1,
    )
    rehearsal_config["train"]["rehearsal"]["weight"] = 0.1
    return rehearsal_config


def on_two_ranks(config: dict[str, Any], *arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "cofitune", "train", str(write_config(config)), "--num-processes", "2", *arguments]
    return subprocess.run(words, env=outside_ranks(), capture_output=True, text=True, timeout=300, check=False)


def masters(folder: Path | str, step: int) -> dict[str, torch.Tensor]:
    """The fp32 weights of a checkpoint."""
    files = (Path(folder) / "train" / "checkpoints" / f"step-{step:06d}").glob("state-*.safetensors")
    tensors = {key: t for file in files for key, t in load_file(file).items()}
    return {key.removesuffix("/master"): t for key, t in tensors.items() if key.endswith("/master")}


def figure(record: dict[str, Any]) -> float:
    """What train.max_drift is held against: the larger of drift and KL divergence."""
    return max(float(record["drift"]), float(record["kl"] or 0.0))


def limit_of(patch: pytest.MonkeyPatch, config: dict[str, Any], shared_runs: SharedRuns) -> tuple[float, int, int]:
    """A limit that drift exceeds late, the step where it does, and the one before that is a checkpoint's of every two.

    It lies in the middle between that step's drift and the largest before.
    """
    run = shared_runs.whole(patch, {key: value for key, value in config.items() if key != "deepspeed"})
    drifts = [figure(d) for d in read_manifest(run)["drift"]["curve"]]
    step = next(s for s in range(5, 9) if drifts[s] > max(drifts[:s]))
    return (max(drifts[:step]) + drifts[step]) / 2, step, (step - 1) // 2 * 2


def check_ended(folder: str, limit: float, step: int, saved: int, dtype: torch.dtype = torch.float32) -> None:
    """The run in `folder` is that of its checkpoint, and says why."""
    message, kept = read_manifest(folder), masters(folder, saved)
    got = read_delta(folder)
    assert got.keys() == kept.keys() and all(torch.equal(got[n], kept[n].to(dtype)) for n in got)
    checkpoints = sorted(p.name for p in (Path(folder) / "train" / "checkpoints").iterdir())
    assert checkpoints[-1] == f"step-{saved:06d}", "none is written above the limit"
    entries = read_metrics(folder)
    assert max(e["step"] for e in entries) == saved
    assert [e["step"] for e in entries if "loss" in e] == list(range(1, saved + 1))
    curve = [e for e in entries if "drift" in e]
    assert message["drift"]["curve"] == curve and all(figure(d) <= limit for d in curve)
    assert message["drift"]["max_drift"] == limit and message["steps"] == saved
    assert message["drift"]["exceeded"]["step"] == step and figure(message["drift"]["exceeded"]) > limit
    assert message["last_loss"] == next(e["loss"] for e in entries if e["step"] == saved and "loss" in e)


@pytest.mark.parametrize(("stage", "dtype"), [(1, "float32"), (2, "float32"), (3, "float32"), (3, "bfloat16")])
def test_a_training_that_drifts_too_far_ends_at_the_checkpoint_before(
    stage: int,
    dtype: str,
    config: dict[str, Any],
    shared_runs: SharedRuns,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = config["output_dir"]
    config["deepspeed"] = {"zero_stage": stage}
    config["model"]["dtype"] = dtype
    limit, step, saved = limit_of(monkeypatch, config, shared_runs)
    config["train"].update(max_drift=limit, save_steps=2, keep_checkpoints=True)
    capsys.readouterr()
    assert run_train(monkeypatch, config) == 0
    output = capsys.readouterr().out
    message = (
        f"drift is {figure(read_manifest(folder)['drift']['exceeded']):.4f} at step {step}, above train.max_drift "
    )
    assert f"{message}{limit:g}: training ends with the checkpoint of step {saved}" in output
    check_ended(folder, limit, step, saved, getattr(torch, dtype))
    config["train"].update(max_drift=None, max_steps=saved)
    assert run_train(monkeypatch, config, f"output_dir={folder}-short") == 0
    got, expected = read_delta(folder), read_delta(f"{folder}-short")
    assert all(torch.equal(got[n], expected[n]) for n in expected), "as one that was to take so many steps"


def test_two_ranks_go_back_together(
    config: dict[str, Any], shared_runs: SharedRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same training on two ranks under ZeRO-3: half the batch on each."""
    folder = config["output_dir"]
    limit, step, saved = limit_of(monkeypatch, config, shared_runs)
    config["train"].update(max_drift=limit, save_steps=2, keep_checkpoints=True, gradient_accumulation_steps=1)
    done = on_two_ranks(config)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"training ends with the checkpoint of step {saved}") == 1
    check_ended(folder, limit, step, saved)
    assert read_manifest(folder)["ranks"] == 2


def test_only_the_newest_checkpoint_is_needed_and_afterwards_none(
    config: dict[str, Any], shared_runs: SharedRuns, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = config["output_dir"]
    limit, step, saved = limit_of(monkeypatch, config, shared_runs)
    config["train"].update(max_drift=limit, save_steps=2, save_total_limit=1)
    assert run_train(monkeypatch, config) == 0
    assert read_manifest(folder)["steps"] == saved and read_manifest(folder)["drift"]["exceeded"]["step"] == step
    assert not (Path(folder) / "train" / "checkpoints").exists()
    capsys.readouterr()
    assert run_train(monkeypatch, config) == 0 and "already trained" in capsys.readouterr().out


def test_a_resumed_training_ends_at_the_same_checkpoint(
    config: dict[str, Any], shared_runs: SharedRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = config["output_dir"]
    limit, step, saved = limit_of(monkeypatch, config, shared_runs)
    config["train"].update(max_drift=limit, save_steps=2, keep_checkpoints=True)
    train_interrupted(monkeypatch, config, after=3)
    assert run_train(monkeypatch, config, "--resume") == 0
    check_ended(folder, limit, step, saved)


def test_where_a_checkpoint_is_due_drift_is_measured_first(
    config: dict[str, Any], shared_runs: SharedRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two validations too: no checkpoint above the limit is ever written."""
    folder = config["output_dir"]
    limit, step, _ = limit_of(monkeypatch, config, shared_runs)
    config["train"].update(max_drift=limit, save_steps=1, validation_steps=100, keep_checkpoints=True)
    assert run_train(monkeypatch, config) == 0
    check_ended(folder, limit, step, step - 1)


def test_a_limit_that_is_never_reached_changes_nothing(
    config: dict[str, Any], shared_runs: SharedRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, whole = config["output_dir"], shared_runs.whole(monkeypatch, config)
    assert run_train(monkeypatch, config, "train.max_drift=1e9", f"output_dir={folder}-limited") == 0
    got, expected = read_delta(f"{folder}-limited"), read_delta(whole)
    assert all(torch.equal(got[n], expected[n]) for n in expected)
    assert read_manifest(f"{folder}-limited")["drift"]["exceeded"] is None


@pytest.mark.parametrize("ranks", [1, 2])
def test_too_much_drift_before_the_first_checkpoint_is_one_clear_error(
    ranks: int,
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config["train"].update(learning_rate=1.0, max_drift=1e-4, save_steps=50, gradient_accumulation_steps=2 // ranks)
    if ranks == 1:
        assert run_train(monkeypatch, config) == 2
        output = capsys.readouterr().err
    else:
        done = on_two_ranks(config)
        assert done.returncode == 2, done.stderr
        output = done.stderr
    assert output.count("error: ") == 1 and "Traceback" not in output
    assert "above train.max_drift 0.0001, and no checkpoint was written before; lower train.learning_rate" in output
    assert not (Path(config["output_dir"]) / "train" / "delta.safetensors").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rehearsal": None}, "max_drift: 0.5 needs something to measure drift on: train.rehearsal, or a folder of "),
        ({"save_steps": None}, "max_drift: 0.5 goes back to a checkpoint, and save_steps: null writes none"),
    ],
)
def test_a_limit_that_cannot_be_held_is_refused(
    changed: dict[str, Any],
    message: str,
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config["train"].update(max_drift=0.5, **changed)
    assert run_train(monkeypatch, config) == 2
    output = capsys.readouterr().err
    assert output.count(message) == 1 and "Traceback" not in output
    assert not Path(config["output_dir"]).exists()


def test_drift_data_measures_without_rehearsing(
    config: dict[str, Any],
    rehearsal_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = config["output_dir"]
    config["train"].update(rehearsal=None, max_steps=4, validation_steps=2)
    assert run_train(monkeypatch, config) == 0
    assert not [e for e in read_metrics(folder) if "drift" in e]
    capsys.readouterr()
    assert run_train(monkeypatch, config, f"train.drift_data={rehearsal_folder}", f"output_dir={folder}-measured") == 0
    assert "drift: measured on 3 held-out answers" in capsys.readouterr().out
    got, expected = read_delta(f"{folder}-measured"), read_delta(folder)
    assert all(torch.equal(got[n], expected[n]) for n in expected), "measuring changes nothing"
    entries = read_metrics(f"{folder}-measured")
    assert [e["step"] for e in entries if "drift" in e] == [0, 2, 4]
    steps = [e for e in entries if "loss" in e]
    assert all(s["rehearsal_loss"] is None and s["rehearsal_tokens"] == 0 for s in steps)
    message = read_manifest(f"{folder}-measured")["rehearsal"]
    assert message["items"] == 0 and message["held_out"] == 3 and "loss" not in message


def test_drift_is_the_mean_log_ratio_on_held_out_answers(
    config: dict[str, Any],
    shared_runs: SharedRuns,
    rehearsal_folder: Path,
    decided_model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against both models, each asked for every token; of the base it is 0."""
    folder, result = shared_runs.whole(monkeypatch, config), read_rehearsal(rehearsal_folder)
    curve = read_manifest(folder)["drift"]["curve"]
    assert curve[0]["step"] == 0 and abs(curve[0]["drift"]) <= 1e-5 and abs(curve[0]["kl"]) <= 1e-5
    base, tuned = (AutoModelForCausalLM.from_pretrained(decided_model_folder) for _ in range(2))
    state = tuned.state_dict()
    tuned.load_state_dict(state | read_delta(folder))
    ratios, divergences = [], []
    for place in result.of(held_out=True):
        item = result.items[place]
        ids = torch.tensor([[*item.prompt_ids, *item.answer_ids]])
        with torch.no_grad():
            p, q = (m(ids).logits[0].double().softmax(-1) for m in (base, tuned))
        for offset, token in enumerate(item.answer_ids):
            at = len(item.prompt_ids) + offset - 1
            ratios.append(float((p[at, token] / q[at, token]).log()))
            likeliest = p[at].topk(8).indices
            chosen = [(float(p[at, i]), float(q[at, i])) for i in likeliest]
            classes = torch.tensor([*chosen, (1 - sum(a for a, _ in chosen), 1 - sum(b for _, b in chosen))]).double()
            divergences.append(float((classes[:, 0] * (classes[:, 0] / classes[:, 1]).log()).sum()))
    assert curve[-1]["drift"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-3, abs=1e-5)
    assert curve[-1]["kl"] == pytest.approx(sum(divergences) / len(divergences), rel=1e-3, abs=1e-5)
    assert curve[-1]["kl"] > 0.01 and abs(curve[-1]["drift"]) > 0.01
