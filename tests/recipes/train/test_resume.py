"""Checkpoint, stop and resume of `cofitune train`, through the real command line."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from cofitune.config.load import load_config
from cofitune.files import read_json, sha256_json, write_json
from cofitune.importance_file import unit_counts, write_importance
from cofitune.model.anatomy import read_anatomy
from cofitune.model.weight_files import fingerprint
from cofitune.recipes.folders import start_folder
from cofitune.training import fit_device, loop
from cofitune.training.state_files import read_checkpoint
from tests.helpers import (
    SharedRuns,
    children_of,
    interrupt_after,
    outside_ranks,
    read_delta,
    read_manifest,
    read_metrics,
    run_train,
    same_tensors,
    train_interrupted,
    write_config,
)

pytestmark = pytest.mark.processes


@pytest.fixture
def config(tmp_path: Path, tiny_model_folder: Path, eight_items: Path) -> dict[str, Any]:
    """Eight items, four a step: an epoch is two steps, and checkpoints come after steps 2, 3 and 4."""
    return {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"train": str(eight_items), "max_length": 128},
        "train": {
            "learning_rate": 1e-2, "max_steps": 5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
            "save_steps": 3, "save_total_limit": 3,
        },
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip


def steps_of(run: Path | str) -> list[int]:
    return [line["step"] for line in read_metrics(run)]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_training_and_resume_gives_the_same_bits(
    signum: int,
    code: int,
    config: dict[str, Any],
    shared_runs: SharedRuns,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = shared_runs.whole(monkeypatch, config)
    folder = Path(config["output_dir"])
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4, signum)
        assert run_train(patch, config) == code
    output = capsys.readouterr().err
    assert f"stopped by {signal.Signals(signum).name}: the state after step 4 is in" in output and "--resume" in output
    assert [p.name for p in sorted((folder / "train" / "checkpoints").iterdir())] == [
        "step-000002", "step-000003", "step-000004",
    ]  # fmt: skip
    assert not (folder / "train" / "manifest.json").exists()
    assert run_train(monkeypatch, config, "--resume") == 0
    assert "resume: continuing after step 4" in capsys.readouterr().out
    assert same_tensors(read_delta(folder), read_delta(whole))
    one, other = read_manifest(folder), read_manifest(whole)
    for what in ("steps", "first_loss", "last_loss", "tokens", "trained_sha256", "frozen_sha256"):
        assert one[what] == other[what], what
    assert steps_of(folder) == [1, 2, 3, 4, 5]
    assert not (folder / "train" / "checkpoints").exists(), "once the delta is written nobody needs them"


def test_steps_after_the_last_checkpoint_are_trained_again_and_occur_once(
    config: dict[str, Any], shared_runs: SharedRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, checkpoints = shared_runs.whole(monkeypatch, config), shared_runs.interrupted(monkeypatch, config)
    shutil.rmtree(checkpoints / "step-000004")
    with (checkpoints.parent / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "ep')  # the process was killed while it wrote
    assert run_train(monkeypatch, config, "--resume") == 0
    assert steps_of(config["output_dir"]) == [1, 2, 3, 4, 5]
    assert same_tensors(read_delta(config["output_dir"]), read_delta(whole))


def test_only_the_newest_checkpoints_are_kept_on_request_to_the_end(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config["train"].update(save_steps=1, save_total_limit=2, keep_checkpoints=True)
    assert run_train(monkeypatch, config) == 0
    checkpoints = Path(config["output_dir"]) / "train" / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-000003", "step-000004"]


def test_without_save_steps_nothing_is_saved_and_a_signal_ends_it_at_once(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config["train"]["save_steps"] = None
    assert not train_interrupted(monkeypatch, config).exists()
    assert steps_of(config["output_dir"]) == [1, 2, 3]


def test_a_checkpoint_is_never_passed_over_unasked(
    config: dict[str, Any],
    shared_runs: SharedRuns,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_train(monkeypatch, config, "--resume", f"output_dir={config['output_dir']}-2") == 0
    assert "holds no whole checkpoint, so from the beginning" in capsys.readouterr().out
    shared_runs.interrupted(monkeypatch, config)
    assert run_train(monkeypatch, config) == 2
    assert "holds a checkpoint of step 4; --resume continues from it, --overwrite starts" in capsys.readouterr().err
    assert run_train(monkeypatch, config, "--resume", "--overwrite") == 2
    assert "give one of them" in capsys.readouterr().err
    assert run_train(monkeypatch, config, "--overwrite") == 0
    assert same_tensors(read_delta(config["output_dir"]), read_delta(f"{config['output_dir']}-2"))
    assert run_train(monkeypatch, config, "--resume") == 0
    assert "already trained" in capsys.readouterr().out


def truncate(folder: Path) -> None:
    path = folder / "state-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(folder: Path) -> None:
    path = folder / "state-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def lose_a_file(folder: Path) -> None:
    (folder / "random.safetensors").unlink()


def lose_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def tear_the_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:-20])


def make_a_list_of_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


def change_the_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"step": 4', '"step": 1'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "state-00001.safetensors: its bytes are not those that were written"),
        (flip_a_bit, "state-00001.safetensors: its bytes are not those that were written"),
        (lose_a_file, "random.safetensors: this file of the checkpoint is missing"),
        (lose_the_manifest, "manifest.json: no checkpoint's manifest here"),
        (tear_the_manifest, "manifest.json: this checkpoint's manifest is damaged"),
        (make_a_list_of_the_manifest, "manifest.json: this checkpoint's manifest is damaged: it must hold an object"),
        (change_the_manifest, "manifest.json: this checkpoint's manifest is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_found_and_the_one_before_is_used(
    damage: Callable[[Path], None],
    message: str,
    config: dict[str, Any],
    shared_runs: SharedRuns,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, checkpoints = shared_runs.whole(monkeypatch, config), shared_runs.interrupted(monkeypatch, config)
    damage(checkpoints / "step-000004")
    capsys.readouterr()
    assert run_train(monkeypatch, config, "--resume") == 0
    output = capsys.readouterr().out
    assert message in output and "resume: continuing after step 3" in output
    assert same_tensors(read_delta(config["output_dir"]), read_delta(whole))


def test_a_write_out_that_was_cut_short_is_no_checkpoint(
    config: dict[str, Any],
    shared_runs: SharedRuns,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoints = shared_runs.interrupted(monkeypatch, config, after=2)
    capsys.readouterr()
    (checkpoints / "step-000002").rename(checkpoints / ".step-000002.tmp")
    (checkpoints.parent / "metrics.jsonl").unlink()
    assert run_train(monkeypatch, config, "--resume", "train.keep_checkpoints=true") == 0
    assert "holds no whole checkpoint, so from the beginning" in capsys.readouterr().out
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-000002", "step-000003", "step-000004"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rate=1e-3", "train.learning_rate is 0.01 there and 0.001 here"),
        ("train.max_steps=9", "train.max_steps is 5 there and 9 here"),
        ("train.seed=7", "train.seed is 1234 there and 7 here"),
        ("region.layers=0-1", "region.layers is '1' there and '0-1' here"),
        ("region.modules=[up_proj]", "region.modules is ['up_proj', 'down_proj'] there and ['up_proj'] here"),
        ("data.max_length=64", "data.max_length is 128 there and 64 here"),
        ("data.template=plain", "data.template is 'chat' there and 'plain' here"),
        ("model.dtype=bfloat16", "model.dtype is 'float32' there and 'bfloat16' here"),
        (
            "train.per_device_train_batch_size=1",
            "took 4 items there and would take 2 here (1 × 2 accumulated × 1 rank); "
            "train.gradient_accumulation_steps=4 gives the same",
        ),
        ("train.per_device_train_batch_size=3", "a train.per_device_train_batch_size of which 1 together divide 4"),
    ],
)
def test_another_trainings_checkpoint_is_refused_by_the_entry_that_differs(
    override: str,
    message: str,
    config: dict[str, Any],
    shared_runs: SharedRuns,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shared_runs.interrupted(monkeypatch, config, after=2)
    capsys.readouterr()
    assert run_train(monkeypatch, config, "--resume", override) == 2
    output = capsys.readouterr().err
    assert message in output and output.count("\n") == 1, "one message"


def _change_identity(checkpoints: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write the newest checkpoint's identity anew."""
    path = max(checkpoints.glob("step-*")) / "manifest.json"
    manifest = read_json(path, "manifest")
    del manifest["manifest_sha256"]
    change(manifest["identity"])
    write_json(path, {**manifest, "manifest_sha256": sha256_json(manifest)})


def _as_written_before(checkpoints: Path, *settings: str) -> None:
    """Take settings that an earlier version did not know out of the newest checkpoint's identity."""

    def forget(identity: dict[str, Any]) -> None:
        for name in settings:
            del identity["train"][name]

    _change_identity(checkpoints, forget)


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ({"torch": "1.13.0"}, f"note: it was computed with another torch 1.13.0, now {torch.__version__}; the steps"),
        (
            {"device": "NVIDIA H100"},
            "note: it was computed with another device NVIDIA H100, now cpu; the steps to come",
        ),
        ({}, None),
        (None, None),  # an earlier version did not write it down
    ],
)
def test_another_package_or_device_is_told_and_stops_no_training(
    before: dict[str, str] | None,
    message: str | None,
    config: dict[str, Any],
    shared_runs: SharedRuns,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def change(identity: dict[str, Any]) -> None:
        made_with = identity.pop("computed_with")
        if before is not None:
            identity["computed_with"] = made_with | before

    _change_identity(shared_runs.interrupted(monkeypatch, config), change)
    capsys.readouterr()
    assert run_train(monkeypatch, config, "--resume") == 0
    output = " ".join(capsys.readouterr().out.split())
    assert ("computed with another" in output) == (message is not None)
    assert message is None or message in output


@pytest.mark.parametrize("written", [None, "mask"])
def test_another_attention_to_packs_is_told(
    written: str | None, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An earlier version made a mask, and did not write it down."""
    config["data"]["packing"] = True

    def change(identity: dict[str, Any]) -> None:
        assert identity["computed_with"].pop("attention to packs") == "varlen"
        identity["computed_with"] |= {"attention to packs": written} if written else {}

    _change_identity(train_interrupted(monkeypatch, config, after=2), change)
    capsys.readouterr()
    assert run_train(monkeypatch, config, "--resume") == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "note: it was computed with another attention to packs mask, now varlen; the steps to come" in output


def test_an_earlier_versions_checkpoint_continues_where_all_decays(
    config: dict[str, Any], shared_runs: SharedRuns, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = shared_runs.whole(monkeypatch, config)
    _as_written_before(shared_runs.interrupted(monkeypatch, config), "optimizer", "decay_all")
    assert run_train(monkeypatch, config, "--resume") == 0
    assert same_tensors(read_delta(config["output_dir"]), read_delta(whole))
    config |= {"region": {"match": ".*"}, "output_dir": config["output_dir"] + "-norms"}
    _as_written_before(train_interrupted(monkeypatch, config, after=2), "optimizer", "decay_all")
    capsys.readouterr()
    assert run_train(monkeypatch, config, "--resume") == 2
    assert "train.decay_all is True there and False here" in capsys.readouterr().err


def test_changed_data_base_and_mask_are_refused_by_their_contents(
    config: dict[str, Any],
    shared_runs: SharedRuns,
    tmp_path: Path,
    tiny_model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shared_runs.interrupted(monkeypatch, config, after=2)
    data = Path(shutil.copy(config["data"]["train"], tmp_path))
    config["data"]["train"] = str(data)
    before = data.read_text()
    data.write_text(before.replace("court", "count"))
    assert run_train(monkeypatch, config, "--resume") == 2
    assert "data.train.0.sha256 is '" in capsys.readouterr().err
    data.write_text(before)
    other = shutil.copytree(tiny_model_folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    assert run_train(monkeypatch, config, "--resume", f"model.name={other}") == 2
    assert "model.base_fingerprint is '" in capsys.readouterr().err
    taught = shutil.copytree(tiny_model_folder, tmp_path / "taught")
    AutoTokenizer.from_pretrained(taught, unk_token="another").save_pretrained(taught)
    assert run_train(monkeypatch, config, "--resume", f"model.name={taught}") == 2
    assert "model.tokenizer_sha256 is '" in capsys.readouterr().err
    moved = shutil.copytree(tiny_model_folder, tmp_path / "moved")
    assert run_train(monkeypatch, config, "--resume", f"model.name={moved}") == 0, "the same weights in another place"


def test_a_mask_is_known_by_all_of_its_importances_and_its_strength(
    config: dict[str, Any],
    tmp_path: Path,
    tiny_model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    anatomy = read_anatomy(AutoConfig.from_pretrained(tiny_model_folder))
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for value, folder in zip((0.2, 0.4, 0.6), folders, strict=True):
        vectors = {kind: torch.full((anatomy.num_layers, n), value) for kind, n in unit_counts(anatomy).items()}
        write_importance(folder, vectors, vectors, {"base_fingerprint": fingerprint(str(tiny_model_folder))})
    config["softmask"] = {"apply_to": "update", "importance": [str(f) for f in folders[:2]]}
    assert run_train(monkeypatch, config, f"output_dir={config['output_dir']}-whole") == 0
    train_interrupted(monkeypatch, config, after=2)
    assert run_train(monkeypatch, config, "--resume", "softmask.strength=0.5") == 2
    assert "(softmask.strength is 1.0 there and 0.5 here)" in capsys.readouterr().err
    assert run_train(monkeypatch, config, "--resume", f"softmask.importance=[{folders[0]},{folders[2]}]") == 2
    assert "softmask.importance_sha256 is [" in capsys.readouterr().err
    turned = f"softmask.importance=[{folders[1]},{folders[0]}]"
    assert run_train(monkeypatch, config, "--resume", turned) == 0, "the larger of both, in whatever order"
    assert same_tensors(read_delta(config["output_dir"]), read_delta(f"{config['output_dir']}-whole"))


def test_auto_means_the_stage_that_a_training_began_under(
    config: dict[str, Any],
    shared_runs: SharedRuns,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is free of the memory is less when it continues: auto would now choose another stage."""
    config["deepspeed"] = {"zero_stage": "auto"}
    whole = shared_runs.whole(monkeypatch, config)
    step = shared_runs.interrupted(monkeypatch, config)
    assert read_checkpoint(step / "step-000004").zero_stage == read_manifest(whole)["zero_stage"] == 2
    monkeypatch.setattr(fit_device, "free_memory", lambda: 1000)
    capsys.readouterr()
    assert run_train(monkeypatch, config, "--resume") == 0
    note = "deepspeed.zero_stage: auto would choose 3 for what is free of the memory now; the training continues under"
    assert capsys.readouterr().out.count(f"{note} 2, as it began") == 1
    assert read_manifest(config["output_dir"])["zero_stage"] == 2
    assert same_tensors(read_delta(config["output_dir"]), read_delta(whole))


def test_what_does_not_change_the_training_may_change_on_the_way(
    config: dict[str, Any],
    shared_runs: SharedRuns,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = shared_runs.whole(monkeypatch, config)
    shared_runs.interrupted(monkeypatch, config, after=2)
    others = [
        "train.save_steps=1",
        "train.save_total_limit=1",
        "deepspeed.zero_stage=2",
        "train.gradient_checkpointing=false",
    ]
    others.append("data.on_bad_item=drop")
    batch = ["train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=4"]
    assert run_train(monkeypatch, config, "--resume", *others, *batch) == 0
    got, expected = read_delta(config["output_dir"]), read_delta(whole)
    assert all(torch.allclose(got[n], expected[n], atol=1e-5) for n in expected)
    assert run_train(monkeypatch, config, *others, *batch, "train.save_steps=7") == 0
    assert "already trained" in capsys.readouterr().out


def test_a_training_that_diverges_names_the_last_good_checkpoint(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, count = loop.summed_loss, [0]

    def diverging(*arguments: Any) -> torch.Tensor:
        count[0] += 1
        return real(*arguments) * (float("nan") if count[0] > 6 else 1)  # two micro-batches a step: in step 4

    monkeypatch.setattr(loop, "summed_loss", diverging)
    assert run_train(monkeypatch, config) == 2
    output = capsys.readouterr().err
    assert "the loss is nan in step 4: training diverged" in output and "the state after step 3 is in" in output
    checkpoints = Path(config["output_dir"]) / "train" / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-000002", "step-000003"]


@pytest.mark.parametrize(
    ("steps", "where"), [(1, "error: model."), (2, "the checkpoint of step 1 is not written: model.")]
)
def test_weights_that_are_no_numbers_are_never_written(
    steps: int,
    where: str,
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The rate is infinite in the weights' type: the one step's loss and gradient are still finite."""
    config["train"] |= {"max_steps": steps, "save_steps": 1, "learning_rate": 1e39, "warmup_ratio": 0}
    assert run_train(monkeypatch, config) == 2
    message = capsys.readouterr().err
    assert where in message and "holds NaN or infinity: training diverged" in message
    folder = Path(config["output_dir"]) / "train"
    assert {p.name for p in folder.rglob("*") if p.is_file()} == {"config.yaml", "metrics.jsonl"}


def test_checkpoints_that_are_all_damaged_are_not_passed_over_unasked(
    config: dict[str, Any],
    shared_runs: SharedRuns,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoints = shared_runs.interrupted(monkeypatch, config)
    for folder in checkpoints.iterdir():
        tear_the_manifest(folder)
    assert run_train(monkeypatch, config) == 2
    assert (
        "holds checkpoints (step-000004, step-000003, step-000002) and none of them can be read"
        in capsys.readouterr().err
    )


def test_damaged_figures_do_not_keep_a_sound_checkpoint_from_being_used(
    config: dict[str, Any],
    shared_runs: SharedRuns,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, checkpoints = shared_runs.whole(monkeypatch, config), shared_runs.interrupted(monkeypatch, config)
    metrics = checkpoints.parent / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"step": 2', '"step": two'))
    assert run_train(monkeypatch, config, "--resume") == 0
    assert "metrics.jsonl: the figures of step 2 are damaged or gone" in capsys.readouterr().err
    assert same_tensors(read_delta(config["output_dir"]), read_delta(whole))
    assert read_manifest(config["output_dir"])["steps"] == read_manifest(whole)["steps"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_gradient_that_is_not_finite_is_never_saved(
    stage: int, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config["deepspeed"] = {"zero_stage": stage}
    real, count = loop.summed_loss, [0]

    def exploding(*arguments: Any) -> torch.Tensor:
        count[0] += 1
        loss = real(*arguments)
        if count[0] == 7:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(loop, "summed_loss", exploding)
    assert run_train(monkeypatch, config) == 2
    assert "the gradient is not finite in step 4" in capsys.readouterr().err
    checkpoints = Path(config["output_dir"]) / "train" / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-000002", "step-000003"]


@pytest.mark.parametrize(
    ("ranks", "signum", "code"), [(1, signal.SIGINT, 130), (2, signal.SIGTERM, 143), (2, signal.SIGINT, 130)]
)
def test_the_real_command_finishes_its_step_saves_and_says_so(
    ranks: int, signum: int, code: int, config: dict[str, Any]
) -> None:
    process, folder = start(config, ranks)
    process.send_signal(signum)
    output = process.communicate(timeout=300)[1]
    assert process.returncode == code, output
    reached = steps_of(folder)[-1]
    assert f"stopped by {signal.Signals(signum).name}: the state after step {reached} is in" in output
    assert "Traceback" not in output
    assert (folder / "train" / "checkpoints" / f"step-{reached:06d}" / "manifest.json").is_file()


def test_a_second_interrupt_ends_it_at_once(config: dict[str, Any]) -> None:
    process, folder = start(config, ranks=2)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    assert process.wait(timeout=300) == 130
    assert not (folder / "train" / "manifest.json").exists()


def test_a_signal_to_one_rank_stops_all_and_a_second_hurries_none(config: dict[str, Any]) -> None:
    process, folder = start(config, ranks=2)
    one = children_of(process.pid)[1]
    for _ in range(2):  # SLURM signals every process, and the launcher hands it on
        one.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=300)[1]
    assert process.returncode == 143, output
    reached = steps_of(folder)[-1]
    assert output.strip().startswith(f"stopped by SIGTERM: the state after step {reached}") and output.count("\n") == 1
    assert read_checkpoint(folder / "train" / "checkpoints" / f"step-{reached:06d}").step == reached


def test_a_training_without_save_steps_saves_nothing_and_ends_promptly(config: dict[str, Any]) -> None:
    """Nor does it end with the terminal, under `nohup`."""
    config["train"]["save_steps"] = None
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does; a process that is started goes on with it
    try:
        process, folder = start(config, ranks=2)
    finally:
        signal.signal(signal.SIGHUP, before)
    for number in [process.pid, *(child.pid for child in children_of(process.pid))]:
        os.kill(number, signal.SIGHUP)
    reached = steps_of(folder)[-1]
    wait_for(lambda: (folder / "train" / "metrics.jsonl").read_text().count("\n") > reached + 3, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 143
    assert not (folder / "train" / "checkpoints").exists()


def test_two_trainings_never_write_one_folder(
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    process, _ = start(config, ranks=1)
    try:
        assert run_train(monkeypatch, config, "--resume") == 2
        assert "another training is writing here" in capsys.readouterr().err
    finally:
        process.kill()
        process.communicate()


def start(config: dict[str, Any], ranks: int) -> tuple[subprocess.Popen[str], Path]:
    """A long training in processes of its own, which has taken three steps; and its folder."""
    config["train"].update(max_steps=5000, save_steps=config["train"]["save_steps"] and 2500)
    config["train"].update(lr_scheduler_type="constant", gradient_accumulation_steps=2 // ranks)
    folder = Path(config["output_dir"])
    words = [sys.executable, "-m", "cofitune", "train", str(write_config(config)), "--num-processes", str(ranks)]
    environment, silent = outside_ranks(), subprocess.DEVNULL
    process = subprocess.Popen(words, env=environment, stdin=silent, stdout=silent, stderr=subprocess.PIPE, text=True)
    metrics = folder / "train" / "metrics.jsonl"
    wait_for(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 3, process)
    return process, folder


def wait_for(holds: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None and time.monotonic() < end, "it never came so far"
        time.sleep(0.05)


def test_an_unwritable_checkpoint_ends_all_ranks_with_one_message(config: dict[str, Any]) -> None:
    path = write_config(config)
    folder = start_folder(load_config(path), "train", overwrite=False)
    (folder / "checkpoints").write_text("a file stands in the way")
    command = [sys.executable, "-m", "cofitune", "train", str(path), "--num-processes", "2", "--resume"]
    done = subprocess.run(command, env=outside_ranks(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2, done.stderr
    assert f"error: {folder / 'checkpoints'}: the checkpoint of step 1 cannot be written" in done.stderr
    assert done.stderr.count("cannot be written") == 1 and "Traceback" not in done.stderr


def test_a_prefix_cache_is_filled_anew_and_may_come_or_go_on_the_way(
    config: dict[str, Any], shared_runs: SharedRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read_delta(shared_runs.whole(monkeypatch, config))
    train_interrupted(monkeypatch, config, "train.prefix_cache=memory", after=3)  # in the second epoch, of what it kept
    assert run_train(monkeypatch, config, "--resume", "train.prefix_cache=disk") == 0
    got = read_delta(config["output_dir"])
    assert all(torch.allclose(got[n], expected[n], rtol=1e-5, atol=1e-6) for n in expected)
    assert steps_of(config["output_dir"]) == [1, 2, 3, 4, 5]
