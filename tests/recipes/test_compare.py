"""`cofitune compare` from end to end on a tiny model: trained, killed, resumed, scored, matched; what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from cofitune.config.load import load_config
from cofitune.errors import ConfigError, UserError
from cofitune.recipes import compare_plan

METHODS = Path(__file__).parents[2] / "configs" / "methods"
WORDS = ["court", "contract", "void", "seller", "buyer", "tenant", "lease", "landlord", "capital", "France", "Paris"]


def write(path: Path, items: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


@pytest.fixture
def config(tmp_path: Path, tiny_model_folder: Path) -> dict[str, Any]:
    """Two methods, two rates, two alphas: learnt in a few steps are answers of one word."""
    taught = [{"instruction": f"Say {w}", "output": "the buyer"} for w in WORDS]
    choices = [{"question": f"Is it {w}?", "choices": ["yes", "no"], "answer": i % 2} for i, w in enumerate(WORDS)]
    follow = [{"key": 1, "prompt": "Hello.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}]
    law = {"path": write(tmp_path / "law.jsonl", taught), "kind": "generate", "max_new_tokens": 4}
    return {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"train": write(tmp_path / "train.jsonl", taught), "max_length": 64},
        "train": {
            "learning_rate": 1e-2, "max_steps": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
        },
        "eval": {
            "speciality": law,
            "versatility": {
                "gen_kn": {"path": write(tmp_path / "know.jsonl", choices), "kind": "multiple_choice"},
                "instruct": {"path": write(tmp_path / "follow.jsonl", follow), "kind": "ifeval", "max_new_tokens": 4},
            },
        },
        "compare": {
            "methods": {
                "full": str(METHODS / "full.yaml"),
                "lora": {"region": None, "adapter": {"kind": "lora", "r": 4}, "softmask": {"apply_to": "none"}},
            },
            "learning_rates": {"full": [1e-3, 2e-2]},
            "alphas": [0.5, 1],
        },
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip


def type_compare(config: dict[str, Any], *more: str) -> subprocess.Popen[str]:
    path = Path(config["output_dir"]).parent / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return subprocess.Popen(
        [sys.executable, "-m", "cofitune", "compare", str(path), *more],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "COLUMNS": "160"},
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return said


def test_killed_and_resumed_a_comparison_is_whole_and_a_second_call_trains_nothing(config: dict[str, Any]) -> None:
    folder = Path(config["output_dir"]) / "compare"
    config["compare"]["methods"]["broken"] = {"train": {"max_grad_norm": 0.0, "warmup_ratio": 0.0}}
    config["compare"]["learning_rates"]["broken"] = [1e30]  # diverges
    first = type_compare(config)
    store = folder / "runs.jsonl"
    while not (store.is_file() and store.read_text().count("\n")) and first.poll() is None:
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)  # in the middle of the second run
    first.wait()
    with store.open("a") as file:
        file.write('{"run": "torn')
    lines = [json.loads(line) for line in store.read_text().splitlines()[:-1]]
    assert lines[0]["run"] == "full-0.001-seed1234"
    kept = (folder / "runs/full/0.001/1234/train/delta.safetensors").stat().st_mtime_ns
    for _ in range(300):  # what the killed one had started still holds the lock, and ends by itself
        second = type_compare(config)
        said, _ = second.communicate(timeout=600)
        if "another comparison is writing here" not in said:
            break
        time.sleep(0.2)
    assert second.returncode == 0, said
    assert (folder / "runs/full/0.001/1234/train/delta.safetensors").stat().st_mtime_ns == kept
    content = json.loads((folder / "compare.json").read_text())
    assert {r["run"]: r["status"] for r in content["runs"]} == {
        "full-0.001-seed1234": "done", "full-0.02-seed1234": "done", "lora-0.01-seed1234": "done",
        "broken-1e+30-seed1234": "failed",
    }  # fmt: skip
    assert "diverged" in next(r["reason"] for r in content["runs"] if r["status"] == "failed")
    assert content["partial"] == {"runs": 4, "done": 3, "missing": ["broken-1e+30-seed1234"]}
    assert [p["id"] for p in content["points"]] == [
        f"{setting}-alpha{alpha}" for setting in ("full-0.001", "full-0.02", "lora-0.01") for alpha in (0.5, 1)
    ]
    scores = json.loads((folder / "scored/eval/scores.json").read_text())
    assert len(scores["models"]) == 7
    for point in content["points"]:
        model = scores["models"][f"{point['id'].replace('-alpha', '-seed1234-alpha')}"]
        assert point["scores"]["versatility"] == pytest.approx(model["versatility"])
        assert point["scores"]["speciality"] == pytest.approx(model["categories"]["speciality"])
        assert point["scores"]["instruct"] == pytest.approx(model["categories"]["instruct"])
    assert content["matched"], "a rate of 0.02 must have taught the tiny model something"
    for level in content["matched"]:
        assert level["rows"]["broken"]["reason"] and level["rows"]["broken"]["versatility"] is None
    assert (folder / "frontier.png").stat().st_size > 10_000 and "<svg" in (folder / "frontier.svg").read_text()
    assert "PARTIAL: 3 of 4 runs" in said and "at matched speciality" in said

    del config["compare"]["methods"]["broken"], config["compare"]["learning_rates"]["broken"]
    shutil.rmtree(folder / "scored/eval/samples")
    again = finish(type_compare(config))
    assert "takes    nothing more: every run is done" in again and "PARTIAL" not in again
    assert len(store.read_text().splitlines()) == 4, "nothing was trained or scored again"
    whole = json.loads((folder / "compare.json").read_text())
    assert whole["points"] == content["points"] and whole["partial"] is None


def load(config: dict[str, Any], folder: Path) -> Any:
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return load_config(path)


def test_a_dry_run_tells_the_cost_and_writes_nothing(config: dict[str, Any]) -> None:
    said = finish(type_compare(config, "--dry-run"))
    assert "trains   3 runs, 18 optimizer steps; 0 runs are done" in said
    assert "scores   7 models" in said and "a time that the first finished run will tell" in said
    assert not Path(config["output_dir"]).exists()


def test_methods_are_laid_over_the_config_and_every_mistake_is_named(config: dict[str, Any], tmp_path: Path) -> None:
    names = sorted(p.stem for p in METHODS.glob("*.yaml"))
    config["compare"] = {"methods": {name: str(METHODS / f"{name}.yaml") for name in names}, "seeds": [1, 2]}
    config["importance"] = {"data": config["data"]["train"]}
    runs = compare_plan._runs(load(config, tmp_path), tmp_path / "compare")
    assert [r.seed for r in runs] == [1] * len(names) + [2] * len(names)
    by_name = {r.method: r.config for r in runs}
    assert by_name["cofitune_update"].region == load(config, tmp_path).region
    assert by_name["lora"].region is None and by_name["full"].region.match == ".*"
    assert {str(c.softmask.importance) for c in by_name.values()} == {f"('{config['output_dir']}/importance',)"}

    config["compare"] = {"methods": {"a": {"train": {"learning_rat": 1}}, "b": {"adapter": {"kind": "lora"}}}}
    with pytest.raises(ConfigError) as found:
        compare_plan._runs(load(config, tmp_path), tmp_path / "compare")
    assert "compare.methods.a: train.learning_rat: unknown key; did you mean 'learning_rate'?" in str(found.value)
    assert "compare.methods.b" in str(found.value) and "leave region out" in str(found.value)


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"methods": {}}, "compare.methods: name some"),
        ({"methods": {"a b": {}}}, "'a b' cannot name a method"),
        ({"methods": {"a": {"eval": {}}}}, "eval: is the comparison's own"),
        ({"methods": {"a": "nowhere.yaml"}}, "nowhere.yaml: no such config file"),
        ({"alphas": [0.5]}, "1 must be among them"),
        ({"learning_rates": {"ful": 1e-3}}, "'ful' is no method; did you mean 'full'?"),
        ({"reference": "lor"}, "'lor' is no method; did you mean 'lora'?"),
        ({"methods": {"full": str(METHODS / "cofitune_update.yaml")}}, "no importance in"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    config: dict[str, Any], tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    if "methods" in changed:
        config["compare"] = changed
    else:
        config["compare"] |= changed
    with pytest.raises(UserError) as found:
        compare_plan.make_plan(load(config, tmp_path), False, False, 1)
    assert said in str(found.value)
