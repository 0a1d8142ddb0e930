"""The mistakes that are likeliest, each with its message: what was given, where, and what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from cofitune.config.load import load_config
from cofitune.errors import ConfigError
from tests.helpers import run_command

BASE = "model: {name: m}\noutput_dir: o\n"
AT = "{c}:3: "  # the line below BASE
IN_THE_FILE = [  # what the third line says → the message
    ("train: {learning_rat: 1}", AT + "train.learning_rat: unknown key; did you mean 'learning_rate'?"),
    ("train: {lr: 1e-4}", AT + "train.lr: unknown key; here it is train.learning_rate"),
    ("learning_rate: 1e-4", AT + "learning_rate: unknown key; it stands in another section: train.learning_rate"),
    ("trian: {seed: 1}", AT + "trian: unknown key; did you mean 'train'?"),
    ("train: {learning_rate: fast}", AT + "train.learning_rate: must be a number (given: 'fast')"),
    ("train: {learning_rate: -1}", AT + "train.learning_rate: must be above 0.0 (given: -1)"),
    ("train: {epochs: 3}", AT + "train.epochs: unknown key; here it is train.num_train_epochs"),
    ("train: {batch_size: 4}", AT + "train.batch_size: unknown key; here it is train.per_device_train_batch_size"),
    ("train: {warmup_steps: 10}", AT + "train.warmup_steps: unknown key; here it is train.warmup_ratio, a share"),
    ("train: {optim: adamw_8bit}", AT + "train.optim: unknown key; here it is train.optimizer, adamw or adamw_8bit"),
    ("train: {bf16: true}", AT + "train.bf16: unknown key; here it is model.dtype: bfloat16"),
    ("train: {fp16: true}", AT + "train.fp16: unknown key; not supported: train in bfloat16"),
    ("train: {logging_steps: 5}", AT + "train.logging_steps: unknown key; not supported: every step is a line of"),
    ("train: {report_to: tensorbord}", "did you mean 'tensorboard'?"),
    ("train: {max_length: 512}", AT + "train.max_length: unknown key; it stands in another section: data.max_length"),
    ("load_in_4bit: true", AT + "load_in_4bit: unknown key; not supported: quantised weights are not trained"),
    ("data: {max_seq_length: 512}", AT + "data.max_seq_length: unknown key; here it is data.max_length"),
    ("data: train.jsonl", AT + "data: must be a section with keys (given: 'train.jsonl'); write data: {train:"),
    ("data: {template: chatml}", AT + "data.template: 'chatml' is no template"),
    ("data: {train: [{file: a.jsonl}]}", AT + "data.train.0.file: unknown key"),
    ("data: {validation: [{path: v.jsonl, weight: 2}]}", AT + "data.validation: weight is for data.train; validation"),
    (
        "data: {replay: {data: [{path: g.jsonl, weight: 2}]}}",
        AT + "data.replay.data: weight is for data.train; how often",
    ),
    ("data: {chat_template_kwargs: {a b: 1}}", AT + "data.chat_template_kwargs: 'a b' cannot be a name in a template"),
    ("data: {chat_template_kwargs: {messages: 1}}", "'messages' is given to every template already; leave it out"),
    ("data: {date: tomorrow}", AT + "data.date: 'tomorrow' is no day; write year-month-day"),
    ("region: {match: '('}", AT + "region: match: '(' is no regular expression"),
    ("region: 8-15", AT + "region: must be 'search' (given: '8-15'); write region: {layers: 8-15}"),
    ("region: {layers: 8-15, module: ffn}", AT + "region.module: unknown key; did you mean 'modules'?"),
    ("deepspeed: ds.json", AT + "deepspeed: must be a section with keys (given: 'ds.json'); a file is not read: put"),
    ("deepspeed: {stage: 3}", AT + "deepspeed.stage: unknown key; here it is deepspeed.zero_stage"),
    ("deepspeed: {zero_stage: 0}", AT + "deepspeed.zero_stage: in bfloat16 0 takes a real optimizer step"),
    ("deepspeed: {raw: {train_batch_size: 8}}", "'train_batch_size' is set by train.per_device_train_batch_size"),
    ("adapter: {lora_r: 8}", AT + "adapter.lora_r: unknown key; here it is adapter.r"),
    ("adapter: {kind: ia3}", AT + "adapter.kind: must be 'lora', 'dora' or 'osf' (given: 'ia3')"),
    ("adapter: {use_dora: true}", AT + "adapter.use_dora: unknown key; here it is adapter.kind: dora"),
    ("adapter: {modules: ffn, target_modules: mha}", "modules and target_modules say the same in two ways"),
    ("adapter: {modules: upproj}", "'upproj' is no module; did you mean 'up_proj'?"),
    ("adapter: {modules: [mha, experts]}", "'experts' are tensors of three dimensions"),
    ("adapter: {kind: osf, rslora: true}", "rslora: not read by kind: osf"),
    ("adapter: {}\nregion: {layers: 8-15}", "name layers and modules in the section adapter"),
    ("adapter: {}\ntrain: {prefix_cache: memory}", "or name the adapter's layers in adapter.layers"),
    ("softmask: {apply: update}", AT + "softmask.apply: unknown key; did you mean 'apply_to'?"),
    ("eval: {speciality: [{path: t.jsonl}]}", AT + "eval.speciality.0: path needs a kind (accepted: multiple_choice"),
    ("eval: {speciality: [{path: t.jsonl, kind: generate, metric: regex}]}", "metric: regex needs a pattern"),
    ("eval: {speciality: [{path: t.jsonl, kind: loss, pattern: x}]}", "pattern is read by the kind generate, not by"),
    ("eval: {suite: quik}", "no suite is called 'quik'; did you mean 'quick'?"),
    ("compare: {methods: [lore]}", "no method is called 'lore'; did you mean 'lora'?"),
    ("train: {seed: 1, seed: 2}", "train.seed is written twice"),
    ("train: [seed]", AT + "train: must be a section with keys"),
    ("data: {train: ${NO_SUCH}/a.jsonl}", "not valid YAML"),
    ("\ttrain: {seed: 1}", "not valid YAML"),
]
FILES = [  # whole files
    ("model: meta-llama/Llama-2-7b\noutput_dir: o\n", "write model: {name: meta-llama/Llama-2-7b}"),
    ("model: {name: m, dtype: fp16}\noutput_dir: o\n", "{c}:1: model.dtype: fp16 is not supported"),
    (
        "model: {name: m, dtype: fp32, attn_implementation: flash_attention_2}\noutput_dir: o\n",
        "flash_attention_2 computes in bfloat16 alone, and model.dtype is float32",
    ),
    ("model: {name: m}\n", "output_dir: is required: the run's folder"),
    (
        "model_name_or_path: m\nstage: sft\nfinetuning_type: lora\ncutoff_len: 512\nlearning_rate: 1e-4\n",
        "this is a config of LLaMA-Factory; here settings stand in sections, and are called:\n    model_name_or_path → "
        "model.name",
    ),
    (
        "base_model: m\ndatasets: [{path: d}]\nsequence_len: 512\nmicro_batch_size: 2\noptimizer: adamw\n",
        "this is a config of Axolotl",
    ),
    (
        "model: {_component_: torchtune.models.llama2.llama2_7b}\ndataset: {_component_: d}\nbatch_size: 2\n",
        "this is a config of torchtune; here settings stand in sections, and are called:\n    model → model.name\n"
        "    dataset → data.train\n    batch_size → train.per_device_train_batch_size",
    ),
    (
        "model: Qwen/Qwen2.5-7B-Instruct\ntrain_type: lora\ndataset: [d]\ntorch_dtype: bfloat16\n",
        "this is a config of ms-swift; here settings stand in sections, and are called:\n    model → model.name\n"
        "    train_type → region (part of the model)",
    ),
    ("model_name_or_path: m\ndataset_name: d\nlearning_rate: 1\n", "this is a config of TRL or transformers"),
    (
        '{"train_batch_size": 8, "zero_optimization": {"stage": 3}}',
        "config of DeepSpeed; put its keys into deepspeed.raw",
    ),
]
OVERRIDES = [
    ("lr=1e-4", "override 'lr=1e-4': lr: unknown key; here it is train.learning_rate"),
    ("train.learning_rate", "override 'train.learning_rate': write it as section.key=value"),
    ("train.seed=x", "override 'train.seed=x': train.seed: must be a whole number (given: 'x')"),
    ("train.ddp_timeout=1000000000000000", "train.ddp_timeout: must be at most 100000000"),
    ("train.stop_grace_seconds=1000000000000000", "train.stop_grace_seconds: must be at most 100000000"),
]
TYPED = [  # words behind `cofitune`
    (["train", "{c}", "--train.learning_rate", "1e-4"], "written without dashes: train.learning_rate=VALUE"),
    (["train", "{c}", "--lr=1e-4"], "--lr: a setting of the config is written without dashes: train.learning_rate="),
    (["train", "--config", "{c}"], "--config: the config is the first argument"),
    (["train", "{c}", "--nproc_per_node", "2"], "--nproc_per_node: the option is --num-processes"),
    (["train", "{c}", "--resume_from_checkpoint", "x"], "the option is --resume"),
    (["train", "{c}", "--deepspeed", "ds.json"], "DeepSpeed's keys stand in the config, under deepspeed.raw"),
    (["trian", "{c}"], "Did you mean 'train'?"),
    (["train", "nothing.yaml"], "nothing.yaml: no such config file"),
]


def message(path: Path, override: str | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(path, [override] if override else [])
    return str(error.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(("line", "expected"), IN_THE_FILE, ids=lambda text: text[:40])
def test_a_mistake_in_a_line(tmp_path: Path, line: str, expected: str) -> None:
    path = write(tmp_path, BASE + line + "\n")
    assert expected.replace("{c}", str(path)) in message(path)


@pytest.mark.parametrize(("text", "expected"), FILES, ids=range(len(FILES)))
def test_a_mistake_of_the_whole_file(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, text)
    said = message(path)
    assert expected.replace("{c}", str(path)) in said
    assert len(said.splitlines()) < 12


@pytest.mark.parametrize(("override", "expected"), OVERRIDES, ids=lambda text: text[:40])
def test_a_mistake_in_an_override_names_the_override(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in message(write(tmp_path, BASE), override)


@pytest.mark.parametrize(("words", "expected"), TYPED, ids=lambda words: " ".join(words)[:40])
def test_a_mistake_on_the_command_line(
    tmp_path: Path,
    words: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path, BASE)
    monkeypatch.chdir(tmp_path)
    assert run_command(monkeypatch, *(word.replace("{c}", str(path)) for word in words)) == 2
    assert expected in capsys.readouterr().err


def test_there_are_forty_of_them() -> None:
    assert len(IN_THE_FILE) + len(FILES) + len(OVERRIDES) + len(TYPED) >= 40


def test_short_names_of_precision_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, BASE)
    assert load_config(path, ["model.dtype=bf16"]).model.dtype == "bfloat16"
    assert load_config(path, ["model.dtype=fp32"]).model.dtype == "float32"


def test_half_a_character_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text('model: {name: m}\ndata: {train: [a.jsonl], template: "\\uD800"}\noutput_dir: run\n')
    with pytest.raises(ConfigError, match=r"c\.yaml:2: data\.template: holds a character that no text can hold"):
        load_config(path)


def test_a_device_without_an_end_is_no_config() -> None:
    with pytest.raises(ConfigError, match="/dev/zero: has more than .* is this a config"):
        load_config("/dev/zero")
