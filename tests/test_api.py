"""The Python interface: typed results, user errors that are raised, and a process that is afterwards what it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import cofitune
from cofitune import api
from cofitune.api import load_config
from cofitune.config.day import VARIABLE
from tests.helpers import read_manifest, write_jsonl

QUIET = Console(quiet=True)
ALL = (
    "chat", "compare", "evaluate", "export", "importance", "load_config", "rehearse", "report", "search", "train",
    "Config", "Stopped", "UserError", "TrainResult", "EvalResult",
)  # fmt: skip


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> dict[str, Any]:
    """A config as a program writes it."""
    folder = tmp_path_factory.mktemp("api")
    words = ("rain", "bread", "trains", "stars", "tea", "chess")
    train = write_jsonl(folder / "t.jsonl", ({"instruction": f"Name {w}.", "output": f"{w} is it."} for w in words))
    choices = write_jsonl(
        folder / "c.jsonl", ({"question": f"Is {w} good?", "choices": ["yes", "no"], "answer": 0} for w in words)
    )
    return {
        "model": {"name": tiny_model_folder, "dtype": "float32"},
        "data": {"train": train},
        "region": {"layers": "1-2", "modules": ("up_proj", "down_proj")},
        "train": {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        "eval": {
            "speciality": [{"path": train, "kind": "generate", "max_new_tokens": 16, "name": "law"}],
            "versatility": {"gen_kn": [{"path": choices, "kind": "multiple_choice", "name": "kn"}]},
        },
        "output_dir": folder / "run",
    }


@pytest.mark.interpreter
def test_importing_it_loads_no_torch_and_gives_all_names() -> None:
    code = (
        "import sys, cofitune; cofitune.load_config; import cofitune.search, cofitune.importance; "
        "assert not {'torch', 'transformers', 'pandas'} & set(sys.modules); "
        f"assert all(callable(getattr(cofitune, name)) for name in {ALL}); assert set({ALL}) <= set(dir(cofitune))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_the_stub_names_what_the_package_gives() -> None:
    stub = (Path(cofitune.__file__).parent / "__init__.pyi").read_text()
    assert all(f" as {name}\n" in stub for name in cofitune.__all__ if name != "__version__")
    assert stub.count(" as ") == len(cofitune.__all__) - 1


def test_a_config_may_be_a_dict_a_file_or_resolved(content: dict[str, Any], tmp_path: Path) -> None:
    resolved = cofitune.load_config(content, {"train.learning_rate": 1e-5, "train.report_to": ["tensorboard"]})
    assert resolved.train.learning_rate == 1e-5 and resolved.train.report_to == ("tensorboard",)
    again = cofitune.load_config(resolved, ["train.seed=7"])
    assert again.train.seed == 7 and again.train.learning_rate == 1e-5
    assert cofitune.load_config(resolved) is resolved
    with pytest.raises(cofitune.UserError, match=r"train\.learning_rat.*did you mean 'learning_rate'"):
        cofitune.load_config(content, {"train.learning_rat": 1})


def test_train_evaluate_export_report_and_chat(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "2020-01-01")
    trained = cofitune.train(content, console=QUIET)
    assert (os.environ.get("RANK"), os.environ[VARIABLE]) == (None, "2020-01-01"), "this process is what it was"
    assert trained.delta.is_file() and trained.manifest == read_manifest(trained.run)
    assert [record["step"] for record in trained.metrics] == [1, 2]
    assert trained.last_loss == trained.frame()["loss"].iloc[-1]
    assert len(trained.tensors()) == 4
    scored = cofitune.evaluate(content, require=["speciality>=+99"], console=QUIET)
    assert list(scored.scores) == ["base", "run"] and not scored.met
    assert scored.frame().loc["run", "kn"] == scored.scores["run"]["gen_kn"]
    assert scored.changes["run"]["speciality"].keys() >= {"value", "low", "high"}
    whole = cofitune.export(trained.run, trained.run.parent / "whole", alpha=0.5, console=QUIET)
    assert whole.alpha == 0.5 and (whole.folder / "config.json").is_file()
    assert cofitune.report(trained.run, console=QUIET).page.is_file()
    (answers,) = cofitune.chat(trained.run, "Name rain.", max_new_tokens=4)
    assert list(answers) == ["base", "run"]


def test_rehearse_importance_and_compare(content: dict[str, Any], tmp_path: Path) -> None:
    config = {**content, "output_dir": tmp_path / "run", "importance": {"data": content["data"]["train"]}}
    prompts = write_jsonl(tmp_path / "prompts.jsonl", ({"prompt": f"Tell me about {w}."} for w in ("rain", "tea")))
    config["rehearsal"] = {"data": prompts, "max_new_tokens": 4, "engine": "transformers", "max_repetition": 1.0}
    rehearsed = cofitune.rehearse(config, {"rehearsal.held_out": 0}, console=QUIET)
    assert len(rehearsed.items()) == rehearsed.to_dict()["items"] and rehearsed.file.is_file()
    important = cofitune.importance(config, {"importance.max_items": 2}, console=QUIET)
    assert important.file.is_file() and important.to_dict()["manifest"] == important.manifest
    assert all(((v >= 0) & (v <= 1)).all() for v in important.vectors().values())
    config["compare"] = {"methods": {"full": {}, "lora": {}}, "learning_rates": [1e-4], "alphas": [1.0]}
    compared = cofitune.compare({**config, "output_dir": tmp_path / "both"}, console=QUIET)
    assert sorted(compared.frame()["method"]) == ["full", "lora"] and compared.to_dict()["reference"] == "full"


def test_a_search_is_read_as_its_region_and_a_row_a_trial(tmp_path: Path, by_hand: Any) -> None:
    by_hand.search(tmp_path)
    by_hand.file(tmp_path / "search/region.yaml", "layers: '1'\nmodules: [up_proj]\n")
    tree = json.loads((tmp_path / "search/tree.json").read_text())
    by_hand.file(tmp_path / "search/tree.json", tree | {"runner_up": "a", "sentences": ["Winner."], "seconds": 61.0})
    found = cofitune.SearchResult.read(tmp_path)
    assert found.region == {"layers": "1", "modules": ["up_proj"]} and found.to_dict()["runner_up"] == "a"
    frame = found.frame().set_index("id")
    assert list(frame.index) == ["base", "a", "b", "c"] and frame.loc["c", "unified"] == 40.5
    assert frame.loc["a", "layers"] == "0-1" and frame["layers"].isna().tolist() == [True, False, False, False]


def test_a_user_error_is_raised_and_ends_nothing(content: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(cofitune.UserError, match="layers"):
        cofitune.train({**content, "region": {"layers": "9"}, "output_dir": tmp_path / "run"}, console=QUIET)
    with pytest.raises(cofitune.UserError, match="nothing has been|no evaluation|scores.json"):
        cofitune.EvalResult.read(tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.processes
def test_a_callers_ctrl_c_is_its_own_but_never_within_popens_lock(content: dict[str, Any]) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with api._called(load_config(content), None, None, None):
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_several_ranks_are_processes_of_their_own(content: dict[str, Any], tmp_path: Path) -> None:
    said = Console(file=(tmp_path / "said").open("w"), width=200)
    two = cofitune.train({**content, "output_dir": tmp_path / "two"}, num_processes=2, console=said)
    assert two.manifest["ranks"] == 2 and "step 2/2" in (tmp_path / "said").read_text()
    with pytest.raises(cofitune.UserError, match=r"^/.*two.* was made by another config \(train\.seed"):
        cofitune.train({**content, "output_dir": tmp_path / "two"}, {"train.seed": 7}, num_processes=2, console=said)


def test_a_search_on_a_cluster_asks_for_no_ranks_of_this_machine(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four ranks of a node, typed on a machine with one GPU."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("cofitune.recipes.search.recipe.search", lambda config, **options: asked.update(options))
    monkeypatch.setattr("cofitune.results.SearchResult.read", lambda run: run)
    overrides = {"search.executor": "ray", "output_dir": str(tmp_path / "run")}
    assert cofitune.search(content, overrides, num_processes=4, console=QUIET) == tmp_path / "run"
    assert asked["ranks"] == 4
    with pytest.raises(cofitune.UserError, match="4 ranks asked for: .* has 1 GPU$"):
        cofitune.search(content, num_processes=4, console=QUIET)
