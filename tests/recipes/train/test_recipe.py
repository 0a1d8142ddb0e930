"""`cofitune train` and `cofitune export` on a tiny model, through the command line, with real ranks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cofitune.config.schema import Config
from cofitune.data.chat import PLAIN_TEMPLATE
from cofitune.importance_file import UNIT_KINDS, Reliability, reliability_entry, unit_counts, write_importance
from cofitune.model.anatomy import read_anatomy
from cofitune.model.weight_files import fingerprint
from cofitune.recipes.train.plan import plan_train
from cofitune.recipes.train.resume import identity
from cofitune.training import loop, prefix_cache
from cofitune.training.hashing import hash_tensor
from tests.helpers import WORDS, outside_ranks, read_jsonl, run_command, run_train, write_jsonl

pytestmark = pytest.mark.processes


@pytest.fixture
def data(tmp_path: Path) -> Path:
    items: list[dict[str, Any]] = [
        {"instruction": f"Say {w}", "input": "", "output": " ".join(WORDS[i : i + 3])} for i, w in enumerate(WORDS[:9])
    ]
    turns = [("user", "two?"), ("assistant", "four"), ("user", "lease?"), ("assistant", "three months")]
    items.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return write_jsonl(tmp_path / "train.jsonl", items)


@pytest.fixture
def config(tmp_path: Path, tiny_model_folder: Path, data: Path) -> dict[str, Any]:
    return {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"train": str(data), "max_length": 128},
        "region": {"layers": "25%-50%", "modules": ["up_proj", "down_proj"]},
        "train": {
            "learning_rate": 1e-2, "max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        },
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip


def write_some_importance(
    run_folder: Path, model_folder: Path, base_fingerprint: str | None = None, reliability: float | None = None
) -> None:
    """An importance file whose first unit of each kind must not move."""
    anatomy = read_anatomy(AutoConfig.from_pretrained(model_folder))
    vectors = {kind: torch.full((anatomy.num_layers, unit_counts(anatomy)[kind]), 0.5) for kind in UNIT_KINDS}
    for values in vectors.values():
        values[:, 0] = 1.0
    manifest: dict[str, object] = {
        "base": "tiny",
        "base_fingerprint": base_fingerprint or fingerprint(str(model_folder)),
    }
    if reliability is not None:
        by_kind = {kind: Reliability((0.1,), 0.1, reliability) for kind in vectors}
        manifest |= reliability_entry(by_kind)
    write_importance(run_folder / "importance", vectors, vectors, manifest)


def test_a_hard_mask_holds_its_units_and_is_part_of_whose_training_it_is(
    config: dict[str, Any], tiny_model_folder: Path
) -> None:
    write_some_importance(Path(config["output_dir"]), tiny_model_folder)
    config["softmask"] = {"apply_to": "update", "threshold": 0.9}
    plan = plan_train(Config.model_validate(config), 1)
    for factor in plan.factors.values():
        assert set(factor.values.unique().tolist()) == {0.0, 1.0} and factor.values[0] == 0
    soft = {**config, "softmask": {"apply_to": "update"}}
    before = identity(plan_train(Config.model_validate(soft), 1))["softmask"]
    assert identity(plan)["softmask"] == before | {"threshold": 0.9}


@pytest.mark.parametrize(("reliability", "is_warned"), [(0.31, True), (0.9, False), (None, False)])
def test_a_mask_that_is_mostly_noise_is_told_before_it_trains(
    config: dict[str, Any],
    tiny_model_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    reliability: float | None,
    is_warned: bool,
) -> None:
    write_some_importance(Path(config["output_dir"]), tiny_model_folder, reliability=reliability)
    config["softmask"] = {"apply_to": "update"}
    assert run_train(monkeypatch, config, "--dry-run") == 0
    output = " ".join(capsys.readouterr().out.split())
    assert ("is mostly noise (reliability: attention heads 0.31" in output) == is_warned
    assert ("estimator: fisher" in output) == is_warned


def test_a_run_trains_its_region_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_some_importance(Path(config["output_dir"]), tiny_model_folder)
    config["softmask"] = {"apply_to": "update"}
    assert run_train(monkeypatch, config) == 0
    output = capsys.readouterr().out
    assert "trainable parameters: 3,072 of" in output
    assert "all 37 tensors are unchanged, bit for bit" in output
    folder = Path(config["output_dir"]) / "train"
    assert {p.name for p in folder.iterdir()} == {"config.yaml", "delta.safetensors", "manifest.json", "metrics.jsonl"}
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder).state_dict()
    delta = load_file(folder / "delta.safetensors")
    assert set(delta) == {f"model.layers.1.mlp.{m}.weight" for m in ("up_proj", "down_proj")}
    for name, tensor in delta.items():
        assert torch.equal(tensor[0], base[name][0]), "the unit of importance 1 is held"
        assert not torch.equal(tensor[1], base[name][1])
    metrics = read_jsonl(folder / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3]
    assert [m["kept_share"] for m in metrics[:2]] == [None, None]
    assert 0 < metrics[2]["kept_share"]["1"] < 1
    assert "soft mask: left" in output and "of the update" in output
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["base_fingerprint"] == fingerprint(str(tiny_model_folder))
    assert manifest["trained_sha256"] == {n: hash_tensor(t) for n, t in delta.items()}
    assert all(manifest["frozen_sha256"][n] == hash_tensor(base[n]) for n in manifest["frozen_sha256"])
    assert manifest["used"]["importance"]["path"].endswith("importance.safetensors")


def test_a_frozen_tensor_that_changes_is_our_bug_and_leaves_no_delta(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    config["deepspeed"] = {"zero_stage": 1}
    real = loop.summed_loss

    def disturbing(engine: Any, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            engine.module.get_parameter("model.norm.weight")[3] += 1e-6
        return real(engine, batch)

    monkeypatch.setattr(loop, "summed_loss", disturbing)
    with pytest.raises(RuntimeError, match="1 frozen tensors changed during training: model.norm.weight"):
        run_train(monkeypatch, config)
    assert not (Path(config["output_dir"]) / "train" / "delta.safetensors").exists()


def test_the_same_config_again_trains_nothing_and_another_is_refused(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_train(monkeypatch, config) == 0
    delta = Path(config["output_dir"]) / "train" / "delta.safetensors"
    first = delta.stat().st_mtime_ns
    assert run_train(monkeypatch, config) == 0
    assert "already trained" in capsys.readouterr().out and delta.stat().st_mtime_ns == first
    assert run_train(monkeypatch, config, "eval.batch_size=3") == 0, "a section that train does not read may differ"
    assert run_train(monkeypatch, config, "train.learning_rate=1e-3") == 2
    assert "train.learning_rate is 0.01 there and 0.001 here" in capsys.readouterr().err
    assert run_train(monkeypatch, config, "train.learning_rate=1e-3", "--overwrite") == 0
    assert delta.stat().st_mtime_ns != first


def test_the_resolved_config_repeats_the_run(monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]) -> None:
    assert run_train(monkeypatch, config) == 0
    folder = Path(config["output_dir"])
    first = load_file(folder / "train" / "delta.safetensors")
    assert run_command(monkeypatch, "train", str(folder / "config.yaml"), f"output_dir={folder}2") == 0
    again = load_file(Path(f"{folder}2") / "train" / "delta.safetensors")
    assert all(torch.equal(first[n], again[n]) for n in first)


def test_two_ranks_train_what_one_trains_and_the_export_speaks_like_it(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config))
    config["train"]["per_device_train_batch_size"] = 4
    assert run_train(monkeypatch, config, f"output_dir={tmp_path}/one") == 0
    two = [sys.executable, "-m", "cofitune", "train", str(path), f"output_dir={tmp_path}/two", "--num-processes", "2"]
    done = subprocess.run(two, capture_output=True, text=True, timeout=300, check=False, env=outside_ranks())
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("what trains") == 1, "rank 0 alone talks"
    base = AutoModelForCausalLM.from_pretrained(config["model"]["name"]).state_dict()
    one, other = (load_file(tmp_path / n / "train" / "delta.safetensors") for n in ("one", "two"))
    for name in one:
        assert (one[name] - other[name]).norm() <= 1e-4 * (one[name] - base[name]).norm()

    assert run_command(monkeypatch, "export", str(tmp_path / "two"), "--to", str(tmp_path / "whole")) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert exported.dtype == torch.float32
    expected = AutoModelForCausalLM.from_pretrained(config["model"]["name"])
    expected.load_state_dict(other, strict=False)
    ids = torch.arange(40).view(2, 20)
    assert torch.equal(exported(ids).logits, expected(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(config["model"]["name"]).chat_template


def test_a_users_mistake_on_the_ranks_is_said_once_and_exits_2(config: dict[str, Any], tmp_path: Path) -> None:
    config["region"] = {"layers": "2-9"}
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "cofitune", "train", str(path), "--num-processes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=outside_ranks())
    assert done.returncode == 2
    assert done.stderr.strip() == "error: region.layers: '2-9' lies outside the model, whose 4 layers are 0-3"
    assert not Path(config["output_dir"]).exists()


def test_bf16_and_the_plain_template_reach_the_exported_folder(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], tmp_path: Path
) -> None:
    config["model"]["dtype"] = "bfloat16"
    config["data"]["template"] = "plain"
    assert run_train(monkeypatch, config) == 0
    export = ("export", config["output_dir"], "--to", tmp_path / "whole")
    assert run_command(monkeypatch, *export) == 0
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["dtype"] == "bfloat16"
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    delta = load_file(Path(config["output_dir"]) / "train" / "delta.safetensors")
    assert all(torch.equal(tensors[n], t) for n, t in delta.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "whole").chat_template == PLAIN_TEMPLATE
    assert run_command(monkeypatch, *export) == 2, "a folder that holds something is not written over unasked"


def _break(config: dict[str, Any], tmp_path: Path, tiny_model_folder: Path, how: str) -> None:
    bad = tmp_path / "bad.jsonl"
    good = json.dumps({"instruction": "Say", "output": "four"}) + "\n"
    if how == "json":
        bad.write_text(good + '{"instruction": \n')
    elif how == "empty response":
        bad.write_text(good + json.dumps({"instruction": "Say", "output": " "}) + "\n")
    elif how == "long prompt":
        bad.write_text(good + json.dumps({"instruction": "court " * 300, "output": "four"}) + "\n")
    if bad.exists():
        config["data"]["train"] = str(bad)
    if how == "unknown key":
        config["train"]["learning_rte"] = 1
    elif how == "no module":
        config["region"]["modules"] = ["upproj"]
    elif how == "missing file":
        config["data"]["train"] = str(tmp_path / "nowhere.jsonl")
    elif how == "no importance":
        config["softmask"] = {"apply_to": "update"}
    elif how == "importance of another model":
        config["softmask"] = {"importance": str(tmp_path / "other" / "importance")}
        write_some_importance(tmp_path / "other", tiny_model_folder, base_fingerprint="0" * 64)
    elif how == "mask on untrained":
        config["softmask"] = {"modules": ["q_proj"]}
    elif how == "no search":
        config["region"] = "search"
    elif how == "no model":
        config["model"]["name"] = str(tmp_path / "no-model")
    elif how == "no hub model":
        config["model"]["name"] = "nobody/nothing"
    elif how == "raw":
        config["deepspeed"] = {"raw": {"zero_optimisation": {"stage": 0}}}
    elif how == "raw section":
        config["deepspeed"] = {"raw": {"zero_optimization": True}}
    elif how == "raw value":
        config["deepspeed"] = {"raw": {"zero_optimization": {"sub_group_size": "many"}}}
    elif how == "flash":
        config["model"] |= {"attn_implementation": "flash_attention_2", "dtype": "auto"}
    elif how == "flex on a CPU":
        config["model"]["attn_implementation"] = "flex_attention"
    elif how == "bf16 stage 1":
        config["model"]["dtype"] = "bfloat16"
        config["deepspeed"] = {"zero_stage": 1}
        config["softmask"] = {"apply_to": "update"}
    else:
        _break_the_model(config, tmp_path, tiny_model_folder, how)


def _break_the_model(config: dict[str, Any], tmp_path: Path, tiny_model_folder: Path, how: str) -> None:
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "broken"))
    tensors = load_file(folder / "model.safetensors")
    if how == "other names":
        tensors = {name.replace("model.layers", "base_model.model.layers"): t for name, t in tensors.items()}
    elif how == "other shapes":
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(7, 32)
    elif how == "template refuses":
        (folder / "chat_template.jinja").write_text("{{ raise_exception('no system turns here') }}")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if how == "git lfs":
        (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n" * 3)
    config["model"]["name"] = str(folder)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("json", "bad.jsonl:2: this line is not valid JSON"),
        ("empty response", "bad.jsonl:2: the response ('output') is empty"),
        ("long prompt", "bad.jsonl:2: the prompt alone exceeds data.max_length 128"),
        ("unknown key", "train.learning_rte: unknown key; did you mean 'learning_rate'?"),
        ("no module", "region.modules: 'upproj' names no module; did you mean 'up_proj'?"),
        ("missing file", "nowhere.jsonl: no such data file"),
        ("no importance", "run `cofitune importance` with this config first"),
        ("importance of another model", "this importance was computed on another model"),
        ("mask on untrained", "q_proj would be masked but not trained (trained: up_proj, down_proj)"),
        ("no search", "region.yaml: no finished search here"),
        ("no model", "no-model: no such folder"),
        ("no hub model", "is neither a folder with a config.json nor a hub model"),
        ("raw", "DeepSpeed knows no key 'zero_optimisation'; did you mean 'zero_optimization'?"),
        ("raw section", "zero_optimization must be a mapping"),
        ("raw value", "deepspeed.raw: DeepSpeed refuses zero_optimization.sub_group_size: sub_group_size"),
        ("flash", "model.attn_implementation: flash_attention_2 needs flash-attn, which is not installed: pip"),
        ("flex on a CPU", "model.attn_implementation: flex_attention has no backward pass on a CPU"),
        ("bf16 stage 1", "use zero_stage: 2 or 3"),
        ("other names", "lack 36 of the model's tensors (model.layers.0."),
        ("other shapes", "model.layers.0.mlp.up_proj.weight has shape [7, 32], config.json says [48, 32]"),
        ("template refuses", "train.jsonl:1: the model's chat template refuses this item: no system turns here"),
        ("git lfs", "cannot be read as safetensors"),
    ],
)
def test_a_users_mistake_is_one_message_exit_2_and_no_run(
    how: str,
    message: str,
    config: dict[str, Any],
    tmp_path: Path,
    tiny_model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _break(config, tmp_path, tiny_model_folder, how)
    assert run_train(monkeypatch, config) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.startswith("error: ") and output.err.count("\n") == 1, "one message, one line"
    assert not Path(config["output_dir"]).exists()


def test_bad_items_may_be_dropped_and_are_counted(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = json.dumps({"instruction": "Say", "output": "four"}) + "\n"
    (tmp_path / "bad.jsonl").write_text(good * 3 + "{\n" + json.dumps({"instruction": "court " * 300, "output": "x"}))
    config["data"] = {"train": str(tmp_path / "bad.jsonl"), "on_bad_item": "drop", "max_length": 128}
    assert run_train(monkeypatch, config) == 0
    assert "5 items read, 2 dropped, 0 truncated" in capsys.readouterr().out


def test_a_finished_run_whose_data_changed_is_not_taken_for_done(
    config: dict[str, Any], data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_train(monkeypatch, config) == 0
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:5]))
    assert run_train(monkeypatch, config) == 2
    assert "was trained from other contents (data changed since)" in capsys.readouterr().err


def test_a_job_scripts_world_size_alone_makes_nobody_a_rank(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_train(monkeypatch, config, f"output_dir={config['output_dir']}-1") == 0
    path = Path(config["output_dir"]).parent / "config.yaml"
    command = [sys.executable, "-m", "cofitune", "train", str(path), f"output_dir={config['output_dir']}-2"]
    subprocess.run(command, check=True, capture_output=True, timeout=300, env={**outside_ranks(), "WORLD_SIZE": "4"})
    one, two = (load_file(Path(f"{config['output_dir']}-{n}") / "train" / "delta.safetensors") for n in (1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_export_never_replaces_what_it_reads(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_train(monkeypatch, config) == 0
    (tmp_path / "file").write_text("x")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    for target, message in (
        (config["output_dir"], "would replace"),
        (str(tmp_path), "would replace"),
        (config["model"]["name"], "would replace"),
        (str(tmp_path / "file"), "is a file"),
        (str(tmp_path / "notes"), "is no folder that an export wrote"),
    ):
        assert run_command(monkeypatch, "export", config["output_dir"], "--to", target, "--overwrite") == 2, target
        assert message in capsys.readouterr().err, target


def test_an_export_finds_a_base_that_has_moved_only_by_base(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = shutil.copytree(config["model"]["name"], tmp_path / "here")
    config["model"]["name"] = str(moved)
    assert run_train(monkeypatch, config) == 0
    there = moved.rename(tmp_path / "there")
    words = ("export", config["output_dir"], "--to", tmp_path / "whole")
    for more, code in (((), 2), (("--base", there), 0)):
        assert run_command(monkeypatch, *words, *more) == code
    assert "say where it is with --base" in capsys.readouterr().err


def test_the_prefix_cache_is_told_beforehand_and_trains_the_same(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    del config["train"]["max_steps"]
    assert run_train(monkeypatch, config, "train.num_train_epochs=3") == 0
    folder = Path(config["output_dir"]) / "train"
    expected = load_file(folder / "delta.safetensors")
    capsys.readouterr()
    made: list[Path] = []

    def listen(path: Path) -> tuple[Path, IO[bytes]]:
        name, file = open_held(path)
        made.append(name)
        return name, file

    open_held = prefix_cache.open_held
    monkeypatch.setattr(prefix_cache, "open_held", listen)
    for kind, where in (("disk", f"{folder}"), ("memory", "/dev/shm")):
        arguments = ("train.num_train_epochs=3", f"train.prefix_cache={kind}", "--overwrite")
        assert run_train(monkeypatch, config, *arguments, "--dry-run") == 0
        output = capsys.readouterr().out
        tokens = int(output.split(" tokens an epoch")[0].split()[-1].replace(",", ""))
        assert f"MiB in {where} ({tokens} tokens × 32 × 4 bytes; " in output
        made.clear()
        assert run_train(monkeypatch, config, *arguments) == 0
        assert {path.parent for path in made} == {Path(where)}
        assert not any(path.exists() for path in made), "nothing is left behind"
        for name, tensor in load_file(folder / "delta.safetensors").items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_needed_disk_space_is_told_in_a_dry_run_and_checked_as_one_sum(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train.max_steps=20", "train.prefix_cache=disk", "train.save_steps=7", "train.save_total_limit=1"]
    real = shutil.disk_usage

    def with_free(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=free))

    assert run_train(monkeypatch, config, *arguments, "--dry-run") == 0
    output = capsys.readouterr().out
    trained = int(output.split("trainable parameters: ")[1].split(" of")[0].replace(",", ""))
    tokens, hidden = (int(n) for n in re.findall(r"\((\d+) tokens × (\d+) × 4 bytes", output)[0])
    items = int(re.findall(r"data: (\d+) items read", output)[0])
    needed = trained * 4 + 2 * trained * 12 + tokens * hidden * 4 + items
    with_free(needed - 1)
    assert run_train(monkeypatch, config, *arguments) == 2, "each of them would fit"
    assert " are free there" in capsys.readouterr().err
    assert run_train(monkeypatch, config, *arguments, "--dry-run") == 0, "a plan may be made on another machine"
    assert "a checkpoint 0 MiB, every 7 steps and at an epoch's end, of which 1 are kept" in capsys.readouterr().out
    with_free(needed)
    assert run_train(monkeypatch, config, *arguments) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["region.layers=0-1"], "the region starts at layer 0"), (["train.max_steps=1"], "one pass over the data")],
)
def test_a_prefix_cache_with_nothing_to_keep_says_so(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_train(monkeypatch, config, "train.prefix_cache=memory", *arguments) == 0
    assert f"prefix cache: nothing to keep: {message}" in capsys.readouterr().out


def test_a_prefix_cache_over_dropout_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, Any],
    tiny_model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "dropout"
    shutil.copytree(tiny_model_folder, folder)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"attention_dropout": 0.1}))
    config["model"]["name"] = str(folder)
    assert run_train(monkeypatch, config, "train.prefix_cache=disk", "train.max_steps=6") == 2
    output = capsys.readouterr().err
    assert "would not give the same loss" in output and "attention_dropout: 0.1" in output
    assert not Path(config["output_dir"]).exists()
