"""The JSON Schema: the files beside the shipped configs are current, and shorthands are no mistakes to an editor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from cofitune.config.json_schema import Of, json_schema
from cofitune.config.load import load_config
from cofitune.config.shipped import shipped_folder
from cofitune.config.yaml12 import read_yaml

jsonschema = pytest.importorskip("jsonschema")  # torch's and ray's; nothing of ours needs it
YAML = sorted(shipped_folder().rglob("*.yaml"))
LINE = "# yaml-language-server: $schema="
SHORT = """
model: {name: m, dtype: bf16}
output_dir: o
data: {train: a.jsonl, validation: [b.jsonl, {path: c.jsonl, split: train}]}
region: {layers: [0-3, 8], modules: ffn}
importance: {data: general.jsonl}
train: {report_to: none}
eval:
  suite: quick
  models: [full=runs/full@0.5]
  speciality: {path: t.jsonl, kind: loss}
  drift: runs/x/rehearsal
search: {levels: [{layers: 3}, {modules: [ffn, [q_proj]]}], halving: {steps: 10}}
compare: {methods: [full, lora], learning_rates: 1e-4, seeds: 1, alphas: [0.5, 1]}
"""


def complaints(of: Of, data: Any) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(json_schema(of)).iter_errors(data)]


@pytest.mark.parametrize("of", get_args(Of))
def test_the_shipped_schema_is_what_the_code_says(of: Of) -> None:
    """Write it again by `cofitune config schema --of … > configs/schemas/….json`."""
    text = (shipped_folder() / "schemas" / f"{of}.json").read_text(encoding="utf-8")
    assert json.loads(text) == json_schema(of)


@pytest.mark.parametrize("path", YAML, ids=lambda p: p.name)
def test_a_shipped_file_names_its_schema_first_and_fits_it(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(LINE)
    schema = (path.parent / first.removeprefix(LINE)).resolve()
    assert schema.is_file()
    assert not complaints(schema.stem, read_yaml(path)[0])  # type: ignore[arg-type]


def test_shorthands_are_no_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(SHORT, encoding="utf-8")
    data, _ = read_yaml(path)
    assert not complaints("config", data)
    load_config(path)


@pytest.mark.parametrize(
    "wrong", ["train: {lerning_rate: 1}", "region: {layers: {a: 1}}", "train: {report_to: tensorbord}", "model: m"]
)
def test_mistakes_are_told(wrong: str) -> None:
    data = {**yaml.safe_load("model: {name: m}\noutput_dir: o"), **yaml.safe_load(wrong)}
    assert complaints("config", data)


def test_a_method_may_not_hold_what_is_the_comparisons_own() -> None:
    assert not complaints("method", {"region": None, "adapter": {"kind": "lora"}})
    assert complaints("method", {"output_dir": "o"}) and complaints("suite", {"train": {}})
