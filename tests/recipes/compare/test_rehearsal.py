"""Rehearsal in what trains several times: a comparison's methods and a search's trials share one folder."""

from __future__ import annotations

import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from cofitune import cli
from cofitune.config.load import load_config
from cofitune.config.schema import Config
from cofitune.errors import ConfigError, UserError
from cofitune.files import read_json
from cofitune.recipes.compare import plan as compare_plan
from cofitune.recipes.compare import recipe
from cofitune.recipes.rehearse.recipe import rehearse
from cofitune.recipes.search import plan as search_plan
from cofitune.recipes.search.trial_config import trial_config
from cofitune.search.store import open_store
from tests.helpers import write_jsonl

pytestmark = pytest.mark.processes

WORDS = ["court", "contract", "void", "seller", "buyer", "tenant", "lease", "landlord"]
WHOLE: dict[str, Any] = {"region": {"match": ".*"}, "softmask": {"apply_to": "none"}}


def write(path: Path, items: list[dict[str, Any]]) -> str:
    write_jsonl(path, items)
    return str(path)


@pytest.fixture
def config(tmp_path: Path, tiny_model_folder: Path) -> dict[str, Any]:
    """One method without rehearsal and one with it, of the same data."""
    taught = [{"instruction": f"Say {w}", "output": "the buyer"} for w in WORDS]
    choices = [{"question": f"Is it {w}?", "choices": ["yes", "no"], "answer": i % 2} for i, w in enumerate(WORDS)]
    prompts = [{"prompt": f"Tell me of the {w}."} for w in WORDS]
    return {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"train": write(tmp_path / "train.jsonl", taught), "max_length": 64},
        "train": {
            "learning_rate": 1e-2, "max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
        },
        "rehearsal": {
            "data": write(tmp_path / "prompts.jsonl", prompts), "max_new_tokens": 6, "max_repetition": 1.0, "top_k": 4,
            "engine": "transformers",
        },
        "eval": {
            "speciality": {"path": write(tmp_path / "law.jsonl", taught), "kind": "generate", "max_new_tokens": 4},
            "versatility": {
                "gen_kn": {"path": write(tmp_path / "know.jsonl", choices), "kind": "multiple_choice"},
            },
        },
        "compare": {"methods": {"full": WHOLE, "own": WHOLE | {"train": {"rehearsal": {"share": 0.2}}}}},
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip


def load(config: dict[str, Any]) -> Config:
    path = Path(config["output_dir"]).parent / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return load_config(path)


def run_here(arguments: list[str], log: Path) -> str | None:
    """`launch.run_command` without a process of its own, which is what takes the time."""
    with log.open("a") as file, redirect_stdout(file), redirect_stderr(file), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["cofitune", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return f"{log.read_text().strip().splitlines()[-1]} (exit {code}; {log})" if code else None


def test_a_method_finds_the_comparisons_own_rehearsal(config: dict[str, Any], tmp_path: Path) -> None:
    by_name = {r.method: r.config for r in compare_plan._runs(load(config), tmp_path / "compare")}
    assert by_name["full"].train.rehearsal is None
    own = by_name["own"].train.rehearsal
    assert own is not None and (own.share, own.path) == (0.2, str(tmp_path / "run/rehearsal"))
    config["compare"]["methods"]["own"]["train"]["rehearsal"] |= {"path": "elsewhere"}
    by_name = {r.method: r.config for r in compare_plan._runs(load(config), tmp_path / "compare")}
    named = by_name["own"].train.rehearsal
    assert named is not None and named.path == "elsewhere", "a folder that the method names itself stays"


def test_a_comparison_trains_with_it(config: dict[str, Any], tmp_path: Path) -> None:
    quiet = Console(quiet=True)
    folder = rehearse(load(config), console=quiet)
    recipe.compare(load(config), run_command=run_here, console=quiet)
    results = {
        path.relative_to(tmp_path / "run/compare/runs").parts[0]: read_json(path, "manifest")
        for path in (tmp_path / "run/compare/runs").rglob("train/manifest.json")
    }
    assert results["full"].get("rehearsal") is None
    assert results["own"]["rehearsal"]["share"] == 0.2
    made = read_json(folder / "manifest.json", "manifest")
    assert results["own"]["rehearsal"]["sha256"].startswith(made["items_sha256"][:32])


def test_a_comparison_without_it_says_what_to_run(config: dict[str, Any], tmp_path: Path) -> None:
    output = StringIO()
    recipe.compare(load(config), run_command=run_here, console=Console(file=output, width=400), dry_run=True)
    assert f"no rehearsal in {tmp_path / 'run/rehearsal'}; run `cofitune rehearse`" in output.getvalue()
    with pytest.raises(UserError, match=r"no rehearsal in .*run `cofitune rehearse` with this config first"):
        recipe.compare(load(config), run_command=run_here, console=Console(quiet=True))


def test_a_methods_own_prompts_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    config["compare"]["methods"]["own"]["rehearsal"] = {"self_prompted": 5}
    with pytest.raises(ConfigError, match=r"compare\.methods: own: rehearsal: is the comparison's own"):
        compare_plan._runs(load(config), tmp_path / "compare")


@pytest.fixture
def searched(config: dict[str, Any]) -> dict[str, Any]:
    """The same as a search, whose trials rehearse."""
    del config["compare"]
    config["train"]["rehearsal"] = {"share": 0.2}
    return config | {"region": "search", "search": {"train_steps": 2, "limit": 2}}


def test_trials_rehearse_with_the_searchs_own_folder(searched: dict[str, Any], tmp_path: Path) -> None:
    rehearse(load(searched), console=Console(quiet=True))
    plan = search_plan.plan_search(load(searched))
    trial = trial_config(plan, plan.largest, tmp_path / "trial")
    assert trial.train.rehearsal is not None and trial.train.rehearsal.path == str(tmp_path / "run/rehearsal")
    assert trial.train.rehearsal.share == 0.2
    assert plan.identity["rehearsal"]["share"] == 0.2 and plan.identity["rehearsal"]["items"] == 7


def test_another_rehearsal_is_another_search(searched: dict[str, Any], tmp_path: Path) -> None:
    rehearse(load(searched), console=Console(quiet=True))
    before = search_plan.plan_search(load(searched)).identity
    assert search_plan.plan_search(load(searched)).identity == before
    open_store(tmp_path / "store", before)
    searched["train"]["rehearsal"]["share"] = 0.5
    assert search_plan.plan_search(load(searched)).identity != before
    searched["train"]["rehearsal"]["share"] = 0.2
    searched["rehearsal"]["max_new_tokens"] = 5
    rehearse(load(searched), console=Console(quiet=True), overwrite=True)
    after = search_plan.plan_search(load(searched)).identity
    with pytest.raises(UserError, match=r"rehearsal\.sha256 is .* there and .* here"):
        open_store(tmp_path / "store", after)
    searched["train"]["rehearsal"] = None
    assert "rehearsal" not in search_plan.plan_search(load(searched)).identity


def test_a_search_without_its_rehearsal_says_what_to_run(searched: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"no rehearsal in .*run/rehearsal; run `cofitune rehearse`"):
        search_plan.plan_search(load(searched))
