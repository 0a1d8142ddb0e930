"""`cofitune train` with train.rehearsal, through the real command line: what it trains on, and what it refuses."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from cofitune.data.top_k import TopK
from cofitune.model.weight_files import fingerprint
from cofitune.rehearsal.items import Rehearsal, RehearsalItem, read_rehearsal, write_rehearsal
from cofitune.training import loop
from cofitune.training.prefix_cache import PrefixCache
from tests.helpers import (
    SharedRuns,
    read_delta,
    read_manifest,
    read_metrics,
    run_train,
    same_tensors,
    train_interrupted,
)

pytestmark = pytest.mark.processes


def lines(folder: Path | str, what: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that have this entry."""
    return [line for line in read_metrics(folder) if what in line]


Change = Callable[[int, RehearsalItem], RehearsalItem]


def rewritten(
    result: Rehearsal, folder: Path, change: Change = lambda _, item: item, top_k: int | None = None, **more: Any
) -> Path:
    """Copy a rehearsal with other items, or without stored probabilities, or with other words in its manifest."""
    folder.mkdir()
    stored = TopK.chain([result.probabilities_of(i) for i in range(len(result.items))])
    if top_k is not None:
        stored = TopK(stored.indices[:, :top_k], stored.log_probs[:, :top_k], stored.rest)
        more["top_k"] = top_k
    items = [change(i, item) for i, item in enumerate(result.items)]
    write_rehearsal(folder, items, stored, result.token_log_probs, result.manifest | more)
    return folder


def all_trained(_: int, item: RehearsalItem) -> RehearsalItem:
    return replace(item, held_out=False)


def test_each_step_takes_rehearsed_answers_and_tells_of_both_losses(
    rehearsal_config: dict[str, Any],
    rehearsal_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_train(monkeypatch, rehearsal_config) == 0
    output = capsys.readouterr().out
    assert "rehearsal: 9 of the base's own answers, 2 items beside the 4 of each step, loss nll, weight 0.5" in output
    assert "warning: no rehearsal" not in output
    folder, result = rehearsal_config["output_dir"], read_rehearsal(rehearsal_folder)
    steps = lines(folder, "loss")
    assert [s["step"] for s in steps] == list(range(1, 7)) and [s["epoch"] for s in steps] == [0.5, 1, 1.5, 2, 2.5, 3]
    assert all(s["rehearsal_loss"] > 0 and 2 <= s["rehearsal_tokens"] <= 24 for s in steps)
    message = read_manifest(folder)
    assert message["rehearsal"] == {
        "sha256": result.sha256, "items": 9, "share": 1 / 3, "loss": "nll", "weight": 0.5, "held_out": 3,
        "held_out_tokens": sum(len(i.answer_ids) for i in result.items if i.held_out),
    }  # fmt: skip
    assert message["used"]["rehearsal"]["path"] == str(rehearsal_folder / "manifest.json")
    assert [d["step"] for d in message["drift"]["curve"]] == [0, 6] and message["drift"]["exceeded"] is None
    assert lines(folder, "drift") == message["drift"]["curve"]


def test_rehearsal_changes_what_is_learnt_and_holds_the_base_nearer(
    rehearsal_config: dict[str, Any], rehearsal_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = rehearsal_config["output_dir"]
    rehearsal_config["train"].update(max_steps=20, save_steps=None)
    rehearsal_config["train"]["rehearsal"]["weight"] = 3.0
    for kind in ("nll", "kl"):
        arguments = (f"output_dir={folder}-{kind}", f"train.rehearsal.loss={kind}")
        assert run_train(monkeypatch, rehearsal_config, *arguments) == 0
    rehearsal_config["train"].update(rehearsal=None, drift_data=str(rehearsal_folder))
    assert run_train(monkeypatch, rehearsal_config) == 0
    deltas = [read_delta(f"{folder}{which}") for which in ("", "-nll", "-kl")]
    assert not any(
        same_tensors(a, b) for a, b in ((deltas[0], deltas[1]), (deltas[0], deltas[2]), (deltas[1], deltas[2]))
    )
    kls = [read_manifest(f"{folder}{which}")["drift"]["curve"][-1]["kl"] for which in ("", "-nll", "-kl")]
    assert kls[0] > kls[2] > 0


@pytest.mark.parametrize("kind", ["nll", "kl"])
@pytest.mark.parametrize("after", [1, 4])
def test_a_resumed_rehearsal_ends_with_the_bits_of_an_uninterrupted_one(
    kind: str, after: int, rehearsal_config: dict[str, Any], shared_runs: SharedRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within a pass over the rehearsal: after two answers, and after eight of nine."""
    rehearsal_config["train"]["rehearsal"]["loss"] = kind
    folder, whole = rehearsal_config["output_dir"], shared_runs.whole(monkeypatch, rehearsal_config)
    shared_runs.interrupted(monkeypatch, rehearsal_config, after=after)
    assert [s["step"] for s in lines(folder, "loss")] == list(range(1, after + 1))
    assert run_train(monkeypatch, rehearsal_config, "--resume") == 0
    assert same_tensors(read_delta(folder), read_delta(whole))
    for what in ("step", "loss", "rehearsal_loss", "rehearsal_tokens", "grad_norm"):
        assert [s[what] for s in lines(folder, "loss")] == [s[what] for s in lines(whole, "loss")]
    assert read_manifest(folder)["drift"] == read_manifest(whole)["drift"]


@pytest.mark.parametrize("kind", ["nll", "kl"])
def test_a_prefix_cache_keeps_rehearsed_answers_too_and_changes_no_loss(
    kind: str, rehearsal_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two steps an epoch the items are read from step 3 on; the answers, of which all were seen, from step 6 on."""
    rehearsal_config["train"].update(max_steps=9, save_steps=None)
    rehearsal_config["train"]["rehearsal"]["loss"] = kind
    folder, reads, real = rehearsal_config["output_dir"], [0], PrefixCache.reading

    def reading(cache: PrefixCache, batch: Any) -> Any:
        reads[0] += 1
        return real(cache, batch)

    monkeypatch.setattr(PrefixCache, "reading", reading)
    assert run_train(monkeypatch, rehearsal_config) == 0 and reads == [0]
    assert run_train(monkeypatch, rehearsal_config, f"output_dir={folder}-kept", "train.prefix_cache=memory") == 0
    assert reads[0] == 2 * 7 + 4, "two micro-batches of the task a step, and one rehearsed"
    for one, other in zip(lines(folder, "loss"), lines(f"{folder}-kept", "loss"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["rehearsal_loss"] == pytest.approx(other["rehearsal_loss"], rel=1e-5, abs=1e-6)
    assert lines(folder, "loss")[-1]["rehearsal_loss"] > 1e-3
    got, expected = read_delta(f"{folder}-kept"), read_delta(folder)
    assert all(torch.allclose(got[n], expected[n], rtol=1e-5, atol=1e-6) for n in expected)


@pytest.mark.parametrize("kind", ["nll", "kl"])
def test_packed_items_are_rehearsed_in_packs(
    kind: str, rehearsal_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rehearsal_config["data"]["packing"] = True
    rehearsal_config["train"]["rehearsal"]["loss"] = kind
    assert run_train(monkeypatch, rehearsal_config) == 0
    assert "packs beside the 4 of each step" in capsys.readouterr().out
    steps = lines(rehearsal_config["output_dir"], "loss")
    assert max(s["rehearsal_tokens"] for s in steps) > 24, "more than two answers of at most 12 tokens"


def test_an_adapter_rehearses_and_resumes_too(
    rehearsal_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    del rehearsal_config["region"]
    rehearsal_config["adapter"] = {"kind": "lora", "r": 4, "alpha": 8, "target_modules": "up_proj"}
    rehearsal_config["train"]["rehearsal"]["loss"] = "kl"
    folder = rehearsal_config["output_dir"]
    assert run_train(monkeypatch, rehearsal_config, f"output_dir={folder}-whole") == 0
    train_interrupted(monkeypatch, rehearsal_config)
    assert run_train(monkeypatch, rehearsal_config, "--resume") == 0
    assert same_tensors(read_delta(folder), read_delta(f"{folder}-whole"))
    assert (Path(folder) / "train" / "adapter").is_dir()
    steps = lines(folder, "loss")
    assert all(s["rehearsal_tokens"] > 0 for s in steps)
    assert abs(steps[0]["rehearsal_loss"]) < 1e-5 < steps[-1]["rehearsal_loss"], "it is the base, and then is not"


def test_rehearsal_holds_no_second_model(
    rehearsal_config: dict[str, Any], rehearsal_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted inside of each loss, also under kl and with drift measured beside it."""

    def models() -> list[PreTrainedModel]:
        gc.collect()
        return [thing for thing in gc.get_objects() if isinstance(thing, PreTrainedModel)]

    before = {id(model) for model in models()}
    real, counted = loop.rehearsal_loss, []

    def counting(engine: Any, *raw: Any) -> Any:
        new = [m for m in models() if id(m) not in before and not any(m is p for p in engine.module.children())]
        counted.append((len(new), sum(m is engine.module for m in new)))
        return real(engine, *raw)

    monkeypatch.setattr(loop, "rehearsal_loss", counting)
    rehearsal_config["train"]["rehearsal"]["loss"] = "kl"
    assert run_train(monkeypatch, rehearsal_config, "train.max_steps=1") == 0
    assert counted == [(1, 1)]


def test_a_changed_rehearsal_is_another_trainings(
    rehearsal_config: dict[str, Any],
    rehearsal_folder: Path,
    shared_runs: SharedRuns,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = read_rehearsal(rehearsal_folder)
    copy = rewritten(result, tmp_path / "copy")
    other = rewritten(result, tmp_path / "other", lambda i, item: replace(item, answer=item.answer + str(i)))
    assert read_rehearsal(copy).sha256 == result.sha256 != read_rehearsal(other).sha256
    shared_runs.interrupted(monkeypatch, rehearsal_config)
    capsys.readouterr()
    assert run_train(monkeypatch, rehearsal_config, "--resume", f"train.rehearsal.path={other}") == 2
    output = capsys.readouterr().err
    there, here = result.sha256, read_rehearsal(other).sha256
    assert f"rehearsal.sha256 is '{there}' there and '{here}' here" in output and output.count("\n") == 1
    for setting, message in (("share=0.5", "share"), ("loss=kl", "loss"), ("weight=2", "weight")):
        assert run_train(monkeypatch, rehearsal_config, "--resume", f"train.rehearsal.{setting}") == 2
        assert f"rehearsal.{message} is " in capsys.readouterr().err
    assert run_train(monkeypatch, rehearsal_config, "--resume", "train.rehearsal=null") == 2
    assert "rehearsal is " in capsys.readouterr().err
    rehearsal_config["train"]["rehearsal"]["path"] = str(copy)
    assert run_train(monkeypatch, rehearsal_config, "--resume") == 0, "the same elsewhere"


def test_a_step_may_be_shared_out_otherwise_on_the_way(
    rehearsal_config: dict[str, Any], shared_runs: SharedRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the rehearsed answers take another number of micro-batches: the step's loss is the same."""
    folder, whole = rehearsal_config["output_dir"], shared_runs.whole(monkeypatch, rehearsal_config)
    shared_runs.interrupted(monkeypatch, rehearsal_config)
    batch = ["train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=4"]
    assert run_train(monkeypatch, rehearsal_config, "--resume", *batch) == 0
    got, expected = read_delta(folder), read_delta(whole)
    assert all(torch.allclose(got[n], expected[n], atol=1e-5) for n in expected)


def test_a_finished_training_knows_when_its_rehearsal_has_changed(
    rehearsal_config: dict[str, Any],
    rehearsal_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = read_rehearsal(rehearsal_folder)
    mine = rewritten(result, tmp_path / "mine")
    rehearsal_config["train"]["rehearsal"]["path"] = str(mine)
    assert run_train(monkeypatch, rehearsal_config) == 0
    assert run_train(monkeypatch, rehearsal_config) == 0 and "already trained" in capsys.readouterr().out
    mine.rename(tmp_path / "old")
    rewritten(result, tmp_path / "mine", all_trained)
    assert run_train(monkeypatch, rehearsal_config) == 2
    assert "was trained from other contents (used changed since)" in capsys.readouterr().err


def test_where_drift_is_measured_may_change_on_the_way(
    rehearsal_config: dict[str, Any],
    rehearsal_folder: Path,
    shared_runs: SharedRuns,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """train.drift_data trains nothing: it is free, as the validation data are."""
    held_out = rewritten(
        read_rehearsal(rehearsal_folder), tmp_path / "held", lambda i, item: replace(item, held_out=i % 2 > 0)
    )
    folder, whole = rehearsal_config["output_dir"], shared_runs.whole(monkeypatch, rehearsal_config)
    shared_runs.interrupted(monkeypatch, rehearsal_config)
    assert run_train(monkeypatch, rehearsal_config, "--resume", f"train.drift_data={held_out}") == 0
    assert same_tensors(read_delta(folder), read_delta(whole))
    assert read_manifest(folder)["rehearsal"]["held_out"] == 6


def test_another_bases_answers_are_refused(
    rehearsal_config: dict[str, Any],
    decided_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = AutoModelForCausalLM.from_pretrained(decided_model_folder)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    other = tmp_path / "other"
    model.save_pretrained(other)
    for path in decided_model_folder.glob("*token*"):
        (other / path.name).write_bytes(path.read_bytes())
    for path in decided_model_folder.glob("*.jinja"):
        (other / path.name).write_bytes(path.read_bytes())
    for requested in ({}, {"rehearsal": None, "drift_data": rehearsal_config["train"]["rehearsal"]["path"]}):
        config = rehearsal_config | {"train": rehearsal_config["train"] | requested}
        assert run_train(monkeypatch, config, f"model.name={other}") == 2
        output = capsys.readouterr().err
        assert "these are the answers of another base" in output and output.count("\n") == 1
        assert fingerprint(str(decided_model_folder))[:12] in output and fingerprint(str(other))[:12] in output
        assert not Path(config["output_dir"]).exists()


def test_answers_to_prompts_in_another_template_are_refused(
    rehearsal_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_train(monkeypatch, rehearsal_config, "data.template=plain") == 2
    output = capsys.readouterr().err
    assert "was made under another chat template or tokenizer (template: chat" in output and output.count("\n") == 1


def test_kl_without_stored_probabilities_is_refused_and_nll_needs_none(
    rehearsal_config: dict[str, Any],
    rehearsal_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bare = rewritten(read_rehearsal(rehearsal_folder), tmp_path / "bare", top_k=0)
    rehearsal_config["train"]["rehearsal"]["path"] = str(bare)
    assert run_train(monkeypatch, rehearsal_config, "train.rehearsal.loss=kl") == 2
    output = capsys.readouterr().err
    assert "train.rehearsal.loss: kl needs the base's probabilities" in output and "rehearsal.top_k: 0" in output
    assert run_train(monkeypatch, rehearsal_config) == 0
    curve = read_manifest(rehearsal_config["output_dir"])["drift"]["curve"]
    assert all(d["kl"] is None and d["drift"] is not None for d in curve)


def test_a_missing_rehearsal_is_told_with_the_command_that_makes_it(
    rehearsal_config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = f"train.rehearsal: no rehearsal in {tmp_path / 'nowhere'}; run `cofitune rehearse` with this config first"
    assert run_train(monkeypatch, rehearsal_config, f"train.rehearsal.path={tmp_path / 'nowhere'}") == 2
    assert message in capsys.readouterr().err
    assert run_train(monkeypatch, rehearsal_config, "train.rehearsal.path=null") == 2
    assert f"no rehearsal in {rehearsal_config['output_dir']}/rehearsal; run" in capsys.readouterr().err
    assert run_train(monkeypatch, rehearsal_config, f"train.rehearsal.path={tmp_path / 'nowhere'}", "--dry-run") == 0
    assert f"still missing: {message}" in capsys.readouterr().out
    rehearsal_config["train"]["rehearsal"] = None
    assert run_train(monkeypatch, rehearsal_config, f"train.drift_data={tmp_path / 'nowhere'}") == 2
    assert f"train.drift_data: no rehearsal in {tmp_path / 'nowhere'}" in capsys.readouterr().err
    assert not Path(rehearsal_config["output_dir"]).exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("rehearsal.share=0", "train.rehearsal.share: "),
        ("rehearsal.share=1", "train.rehearsal.share: "),
        ("rehearsal.share=1.5", "train.rehearsal.share: "),
        ("rehearsal.weight=0", "train.rehearsal.weight: "),
        ("rehearsal.weight=.inf", "train.rehearsal.weight: "),
        ("rehearsal.loss=kld", "train.rehearsal.loss: "),
        ("max_drift=0", "train.max_drift: "),
    ],
)
def test_an_impossible_setting_is_refused_with_one_message(
    given: str,
    message: str,
    rehearsal_config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_train(monkeypatch, rehearsal_config, f"train.{given}") == 2
    output = capsys.readouterr().err
    assert output.count(message) == 1 and "Traceback" not in output and len(output.strip().splitlines()) <= 2, output


def lengthened(at: int, by: int) -> Change:
    """All items are trained on; the prompt of one is longer than the others'."""

    def change(index: int, item: RehearsalItem) -> RehearsalItem:
        ids: Sequence[int] = item.prompt_ids * by if index == at else item.prompt_ids
        return replace(item, held_out=index == 0, prompt_ids=tuple(ids))

    return change


def test_a_prompt_longer_than_max_length_is_an_error_or_left_out_and_told(
    rehearsal_config: dict[str, Any],
    rehearsal_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    long = rewritten(read_rehearsal(rehearsal_folder), tmp_path / "long", lengthened(4, 6))
    rehearsal_config["train"]["rehearsal"]["path"] = str(long)
    assert run_train(monkeypatch, rehearsal_config, "data.max_length=60") == 2
    output = capsys.readouterr().err
    assert f"{long / 'items.jsonl'}: item 5: the prompt alone has " in output and "data.max_length is 60" in output
    assert "data.on_bad_item: drop" in output
    assert run_train(monkeypatch, rehearsal_config, "data.max_length=60", "data.on_bad_item=drop") == 0
    output = capsys.readouterr().out
    assert "rehearsal: 10 of the base's own answers" in output and "1 left out (prompt too long)" in output
    assert read_manifest(rehearsal_config["output_dir"])["rehearsal"]["items"] == 10


def test_an_answer_longer_than_max_length_is_cut_with_its_probabilities(
    rehearsal_config: dict[str, Any],
    rehearsal_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = read_rehearsal(rehearsal_folder)
    limit = max(len(i.prompt_ids) for i in result.items) + 2
    cut = sum(len(i.prompt_ids) + len(i.answer_ids) > limit for i in result.items if not i.held_out)
    assert cut > 0
    rehearsal_config["train"]["rehearsal"]["loss"] = "kl"
    assert run_train(monkeypatch, rehearsal_config, f"data.max_length={limit}", "data.on_bad_item=drop") == 0
    assert f", {cut} cut at data.max_length" in capsys.readouterr().out


def test_a_rehearsal_without_one_usable_item_is_refused(
    rehearsal_config: dict[str, Any],
    rehearsal_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    held = rewritten(read_rehearsal(rehearsal_folder), tmp_path / "held", lambda _, i: replace(i, held_out=True))
    assert run_train(monkeypatch, rehearsal_config, f"train.rehearsal.path={held}") == 2
    assert f"train.rehearsal: {held} holds not one item to train on" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["items.jsonl", "top_k.safetensors"])
def test_a_damaged_rehearsal_is_found(
    name: str,
    rehearsal_config: dict[str, Any],
    rehearsal_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mine = rewritten(read_rehearsal(rehearsal_folder), tmp_path / "mine")
    content = bytearray((mine / name).read_bytes())
    content[-5] ^= 1
    (mine / name).write_bytes(content)
    assert run_train(monkeypatch, rehearsal_config, f"train.rehearsal.path={mine}") == 2
    assert f"{mine / name}: its bytes are not those that were written" in capsys.readouterr().err
