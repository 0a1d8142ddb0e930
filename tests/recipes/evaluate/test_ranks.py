"""`cofitune eval` on two real ranks: the answers of one, to the last bit, and one voice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cofitune.config.load import dump_config
from cofitune.config.schema import Config
from cofitune.recipes.evaluate.recipe import evaluate
from tests.helpers import write_jsonl

pytestmark = pytest.mark.processes

WORDS = ["court", "buyer", "seller", "tenant", "lease", "Paris", "notice"]


def make_config(folder: Path, model: Path, run: str) -> Config:
    choices = [
        {"question": f"Who, {w}? " * (i + 1), "choices": WORDS[: i + 2], "answer": i} for i, w in enumerate(WORDS[:6])
    ]
    texts = [{"question": f"Say {w}. " * (i + 1), "answer": f"the {w} pays"} for i, w in enumerate(WORDS)]
    arc = [
        {
            "id": str(i),
            "question": c["question"],
            "choices": {"text": c["choices"], "label": list("ABCDEFG")[: i + 2]},
            "answerKey": "A",
        }
        for i, c in enumerate(choices)
    ]
    (folder / "arc").mkdir(exist_ok=True)
    for name, rows in (("choices", choices), ("texts", texts), ("arc/test", arc)):
        write_jsonl(folder / f"{name}.jsonl", rows)
    texts_path, choices_path = str(folder / "texts.jsonl"), str(folder / "choices.jsonl")
    tasks: dict[str, Any] = {
        "speciality": {"path": texts_path, "kind": "generate", "metric": "chrf", "max_new_tokens": 9, "stop": ["a"]},
        "versatility": {
            "gen_kn": {"path": choices_path, "kind": "multiple_choice"},
            "gen_rs": {"harness": "arc_easy", "dataset_path": str(folder / "arc")},
            "instruct": {"path": texts_path, "kind": "loss", "name": "drift"},
        },
        "batch_size": 2,
    }
    about = {"name": str(model), "dtype": "float32"}
    return Config.model_validate({"model": about, "output_dir": str(folder / run), "eval": tasks})


def samples(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (folder / "eval/samples/base").glob("*.jsonl")}


def test_two_ranks_give_the_answers_of_one_and_a_second_call_asks_nothing(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    evaluate(make_config(tmp_path, tiny_model_folder, "one"), console=Console(quiet=True))
    config = make_config(tmp_path, tiny_model_folder, "two")
    (tmp_path / "two.yaml").write_text(dump_config(config))
    command = [sys.executable, "-m", "cofitune", "eval", str(tmp_path / "two.yaml"), "--num-processes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("base choices: acc") == 1  # rank 0 alone talks
    one, two = samples(tmp_path / "one"), samples(tmp_path / "two")
    assert two == one
    assert {name: len(text.splitlines()) for name, text in one.items()} == {
        "texts.jsonl": 7, "choices.jsonl": 6, "arc_easy.jsonl": 6, "drift.jsonl": 7
    }  # fmt: skip
    required = subprocess.run([*command, "--require", "speciality>=-1"], capture_output=True, text=True, check=False)
    assert required.returncode == 2 and "speciality" in required.stderr  # there is nothing to compare the base with
    scores = [json.loads((tmp_path / run / "eval/scores.json").read_text()) for run in ("one", "two")]
    assert scores[0]["models"]["base"]["tasks"].keys() == scores[1]["models"]["base"]["tasks"].keys()
    for title, figures in scores[0]["models"]["base"]["tasks"].items():
        assert scores[1]["models"]["base"]["tasks"][title]["raw"] == figures["raw"]
