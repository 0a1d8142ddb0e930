"""Inputs that go wrong: good configs, data and model folders, spoilt at random, each by its own seed."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 3.5, -0.0, 1e400, float("nan"), 2**63, 2**64, 10**30, "", " ", "0", "none", "a\0b",
    "cut \ud83d", "{{ x }}", "${NOT_SET}", "~", "../..", "[bold]", "é\u2028", "<|im_end|>", "x" * 300, [], [[]], {},
    {"": ""}, {"a": {"b": [1, None]}}, ["a", 1, None], [{"type": "text", "text": "a"}], [{"type": "image"}],
]  # fmt: skip
PIECES = (
    "{", "}", "[", "]", ":", ",", "\n", "\r", "\t", "  ", "- ", "? ", "*a", "&a ", "<<: *a", "!!int ", "!x ", "|", ">",
    "#", "'", '"', "\\", "\\ud83d", "\\u0000", "null", "~", ".inf", ".nan", "0x1f", "010", "1:30", "1e999", "9" * 30,
    "\ufeff", "%YAML 1.1\n", "---\n", "...", "{{ x }}", "${HOME}", "é", "\u2028", "\0", "train", "seed", "path", "role",
    "content",
)  # fmt: skip
CONFIG = """model: {name: some/model, dtype: float32}
output_dir: runs/x
data:
  train: [{path: a.jsonl, format: alpaca, weight: 2}, b.jsonl]
  max_length: 128
region: {layers: 25%-50%, modules: [up_proj, down_proj]}
train: &t {learning_rate: 4e-5, max_steps: 12, adam_betas: [0.9, 0.999], seed: 7, report_to: none}
deepspeed: {zero_stage: 1, raw: {comms_logger: {enabled: true}}}
softmask: {apply_to: update, strength: 0.5}
rehearsal: {data: p.jsonl, temperature: 0.7}
eval:
  speciality: {path: t.jsonl, kind: generate, metric: regex, pattern: '(\\d+)', stop: "\\n"}
  versatility: {gen_kn: [{path: k.jsonl, kind: multiple_choice}], instruct: {path: i.jsonl, kind: ifeval}}
  models: [runs/a, seed2=runs/b@0.5, {path: runs/full, role: full_sft}]
search: {levels: [{layers: [bottom1, 8-15]}, {modules: [mha, [up_proj, down_proj]]}], limit: null, train_steps: 30}
compare: {methods: {full: {region: {layers: all}}, lora: m.yaml}, learning_rates: {full: [1e-5, 2e-5]}, alphas: 1}
"""
CALL = {"type": "function", "function": {"name": "find", "arguments": {"year": "1999"}}}
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
ITEMS: list[dict[str, Any]] = [
    {
        "instruction": "Say hi.",
        "input": "now",
        "output": "Hi!",
        "system": "Be brief.",
        "history": [["a", "b"]],
        "id": 1,
    },
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}], "system": "s"},
    {
        "tools": [TOOL],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "r"},
            {"role": "tool", "name": "find", "content": "c"},
            {"role": "assistant", "content": "d"},
        ],
    },
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "train": True}], "system": "s"},
    {"prompt": "a", "completion": "b", "label": True},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
]
QUESTIONS: dict[str, dict[str, Any]] = {
    "multiple_choice": {"question": "Two?", "context": "c", "choices": ["a", "b"], "answer": 1},
    "generate": {"instruction": "Do.", "input": "this", "answers": ["a", "b"], "output": "long"},
    "loss": {"question": "Q?", "choices": ["x", "y"], "answer": 1, "output": "o"},
    "ifeval": {"key": 1, "prompt": "No.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
}
MODEL_FILES = (
    "config.json",
    "config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "adapter_config.json",
    "model.safetensors",
)


def spoil_text(text: str, rng: random.Random) -> str:
    """Take out, put in, double or cut some pieces of a text."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, end = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
        end = min(end, at + rng.choice((1, 3, 20, len(text))))
        piece = rng.choice(PIECES) * rng.choice((1, 1, 1, 3, 2000))
        text = rng.choice(
            (
                text[:at] + piece + text[at:],
                text[:at] + text[end:],
                text[:end] + text[at:],
                text[:at] + piece + text[end:],
            )
        )
    return text[:500_000]


def spoil_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip bits, cut, or double some bytes."""
    spoilt = bytearray(content)
    for _ in range(rng.choice((1, 1, 4, 30))):
        if spoilt:
            spoilt[rng.randrange(len(spoilt))] ^= 1 << rng.randrange(8)
    at = rng.randint(0, len(spoilt))
    return bytes(rng.choice((spoilt, spoilt, spoilt[:at], spoilt + spoilt[at:])))


def spoil_value(value: Any, rng: random.Random) -> Any:
    """Put something odd in one place of a value of JSON, drop a key, or add one."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        how = rng.random()
        if how < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if how < 0.2:
            return {
                **value,
                rng.choice(("weight", "label", "chosen", "text", "tools", "extra", "quantization_config")): odd(rng),
            }
        return {**value, key: spoil_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        return [*value[:at], spoil_value(value[at], rng), *value[at + rng.choice((0, 1)) :]]
    return odd(rng)


def odd(rng: random.Random) -> Any:
    """Something that nobody expects, at times nested deeply."""
    value = rng.choice(ODD)
    for _ in range(rng.choice((0, 0, 0, 1, 200))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def config_text(rng: random.Random) -> str:
    """A config, spoilt as text or by its values."""
    if rng.random() < 0.6:
        return spoil_text(CONFIG, rng)
    import yaml

    value = yaml.safe_load(CONFIG.replace("4e-5", "0.00004"))
    for _ in range(rng.choice((1, 2, 4))):
        value = spoil_value(value, rng)
    try:
        return str(yaml.safe_dump(value, allow_unicode=rng.random() < 0.5))
    except (yaml.YAMLError, UnicodeError, RecursionError):
        return CONFIG


def overrides(rng: random.Random) -> list[str]:
    """A few overrides of settings that are there, nearly there, or not at all."""
    names = ["train.seed", "data.train.0.path", "data.train.9", "eval.speciality.0.kind", "region", "search.levels.0"]
    names += ["eval.suite", "compare.methods.full", "deepspeed.raw.x.y", "output_dir", "train", "model.anatomy"]
    texts = []
    for _ in range(rng.choice((1, 1, 3))):
        value = rng.choice(("1", "[a, b]", "{a: 1}", "top", "1e-4", *PIECES))
        text = f"{rng.choice(names)}={value}"
        texts.append(spoil_text(text, rng) if rng.random() < 0.5 else text)
    return texts


def data_file(folder: Path, rng: random.Random) -> Path:
    """A file of training items in one of the kinds that are read, spoilt in an item or in its bytes."""
    kind = rng.choice(("jsonl", "jsonl", "jsonl", "json", "csv", "parquet", "jsonl.gz"))
    rows: list[Any] = [rng.choice(ITEMS) for _ in range(rng.choice((1, 3)))]
    rows[0] = spoil_value(rows[0], rng)
    path = folder / f"d.{kind}"
    content = _written(kind, rows)
    if rng.random() < 0.5:
        is_text = kind in ("jsonl", "json", "csv") and rng.random() < 0.7
        content = spoil_text(content.decode(), rng).encode(errors="replace") if is_text else spoil_bytes(content, rng)
    path.write_bytes(content)
    return path


def _written(kind: str, rows: list[Any]) -> bytes:
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        buffer = pa.BufferOutputStream()
        try:
            pq.write_table(pa.Table.from_pylist([row for row in rows if isinstance(row, dict)]), buffer)
        except (pa.ArrowException, ValueError, TypeError, OverflowError, UnicodeError):
            return b"PAR1"
        return bytes(buffer.getvalue())
    if kind == "csv":
        text = io.StringIO()
        dicts = [row for row in rows if isinstance(row, dict)]
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in dicts for key in row)))
        writer.writeheader()
        writer.writerows(dicts)
        return text.getvalue().encode(errors="replace")
    content = json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows)
    return gzip.compress(content.encode()) if kind.endswith("gz") else content.encode()


def question_file(folder: Path, rng: random.Random) -> tuple[Path, str]:
    """A file of an evaluation's items and their kind."""
    kind = rng.choice(list(QUESTIONS))
    good = QUESTIONS[kind]
    text = json.dumps(good) + "\n" + json.dumps(spoil_value(good, rng)) + "\n"
    path = folder / "t.jsonl"
    path.write_bytes((spoil_text(text, rng) if rng.random() < 0.5 else text).encode(errors="replace"))
    return path, kind


def report_run(folder: Path, good: Path, rng: random.Random) -> Path:
    """A run's folder with one of its artifacts spoilt; what carries a checksum is as an older version left it."""
    place = folder / "run"
    shutil.copytree(good, place)
    path = rng.choice(sorted(p for p in place.rglob("*") if p.suffix in (".json", ".jsonl", ".safetensors", ".yaml")))
    content = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.8:
        value = json.loads(content)
        value.pop("checksum", None)
        path.write_bytes(json.dumps(spoil_value(value, rng)).encode())
    elif path.suffix == ".jsonl" and rng.random() < 0.8:
        lines = content.splitlines()
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(spoil_value(json.loads(lines[at]), rng)).encode()
        path.write_bytes(b"\n".join(lines) + b"\n")
    else:
        path.write_bytes(spoil_bytes(content, rng))
    return place


def hostfile(folder: Path, rng: random.Random) -> Path:
    """A hostfile with something odd in it."""
    text = "# two hosts\nworker-1 slots=8\nroot@10.0.0.2   slots=4  # half\nfe80::1\tslots=2\n"
    pieces = (
        "\ufeff",
        "[",
        '"worker-1"',
        "'",
        "slots=0",
        "slots=-1",
        "slots=9" + "9" * 30,
        "slots = 2",
        "\t",
        "::1",
        "-o",
    )
    for _ in range(rng.choice((0, 1, 3))):
        at = rng.randint(0, len(text))
        text = text[:at] + rng.choice(pieces) + text[at:]
    path = folder / "hosts"
    content = (spoil_text(text, rng) if rng.random() < 0.5 else text).encode(errors="replace")
    path.write_bytes(spoil_bytes(content, rng) if rng.random() < 0.2 else content)
    return path


def deepspeed_raw(rng: random.Random) -> dict[str, Any]:
    """Sections and keys of `deepspeed.raw` of any type, rarely of the right one."""
    from cofitune.config.deepspeed_raw import RAW_KINDS

    raw: dict[str, Any] = {}
    for _ in range(rng.choice((1, 1, 2, 4))):
        name = rng.choice([*RAW_KINDS, *["zero_optimization"] * len(RAW_KINDS)])
        inside = RAW_KINDS[name]
        value = rng.choice((True, 3, 1000, 2.5, "fp16", "2", [], ["a"], odd(rng)))
        if not isinstance(inside, str) and rng.random() < 0.8:
            raw[name] = {**(raw[name] if isinstance(raw.get(name), dict) else {}), rng.choice(sorted(inside)): value}
        else:
            raw[name] = value
    return raw


def model_folder(folder: Path, good: Path, rng: random.Random) -> Path:
    """A model's folder with one or two files spoilt, or put beside the others."""
    place = folder / "model"
    shutil.copytree(good, place)
    for _ in range(rng.choice((1, 1, 2))):
        path = place / rng.choice(MODEL_FILES)
        content = path.read_bytes() if path.exists() else b'{"weight_map": {"a": "model.safetensors"}}'
        if path.suffix == ".json" and rng.random() < 0.7:
            content = _spoilt_json(content, rng)
        elif rng.random() < 0.9:
            content = spoil_bytes(content[:4096], rng) + content[4096:]
        path.write_bytes(content)
        if rng.random() < 0.1:
            path.unlink()
    return place


def _spoilt_json(content: bytes, rng: random.Random) -> bytes:
    spoil: Callable[[Any, random.Random], Any] = spoil_value
    try:
        return json.dumps(spoil(json.loads(content), rng)).encode()
    except (ValueError, RecursionError):
        return spoil_bytes(content, rng)
