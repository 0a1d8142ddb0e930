"""`cofitune compare` from end to end on a tiny model: trained, killed, resumed, scored, matched; what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from rich.console import Console
from transformers import AutoTokenizer

from cofitune import cli
from cofitune.config.load import load_config
from cofitune.config.schema import Config, Region
from cofitune.errors import ArtifactError, ConfigError, UserError
from cofitune.recipes.compare import plan as compare_plan
from cofitune.recipes.compare import recipe
from cofitune.recipes.compare.store import RunLine
from cofitune.recipes.folders import start_folder
from tests.helpers import write_jsonl

pytestmark = pytest.mark.processes

METHODS = Path(__file__).parents[3] / "configs" / "methods"
WORDS = ["court", "contract", "void", "seller", "buyer", "tenant", "lease", "landlord", "capital", "France", "Paris"]


def write(path: Path, items: list[dict[str, Any]]) -> str:
    write_jsonl(path, items)
    return str(path)


@pytest.fixture
def config(tmp_path: Path, tiny_model_folder: Path) -> dict[str, Any]:
    """Two methods, two rates, two alphas: learnt in a few steps are answers of one word."""
    taught = [{"instruction": f"Say {w}", "output": "the buyer"} for w in WORDS]
    choices = [{"question": f"Is it {w}?", "choices": ["yes", "no"], "answer": i % 2} for i, w in enumerate(WORDS)]
    follow = [{"key": 1, "prompt": "Hello.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}]
    law = {"path": write(tmp_path / "law.jsonl", taught), "kind": "generate", "max_new_tokens": 8}
    return {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"train": write(tmp_path / "train.jsonl", taught), "max_length": 64},
        "train": {
            "learning_rate": 1e-2, "max_steps": 16, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
            "save_steps": 4,
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


def load(config: dict[str, Any]) -> Config:
    path = Path(config["output_dir"]).parent / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return load_config(path)


def run_here(arguments: list[str], log: Path) -> str | None:
    """`launch.run_command` without a process of its own, which is what takes the time."""
    with log.open("a") as file, redirect_stdout(file), redirect_stderr(file):
        before, sys.argv = sys.argv, ["cofitune", *arguments]
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            sys.argv = before
    return f"{log.read_text().strip().splitlines()[-1]} (exit {code}; {log})" if code else None


def compare_here(config: dict[str, Any], **options: Any) -> str:
    output = StringIO()
    console = Console(file=output, width=200, no_color=True)
    recipe.compare(load(config), run_command=run_here, console=console, **options)
    return output.getvalue()


def begin_and_kill(config: dict[str, Any], folder: Path) -> None:
    """Type `cofitune compare`, and kill it and all that it started in the middle of the first training."""
    load(config)
    path = Path(config["output_dir"]).parent / "config.yaml"
    process = subprocess.Popen(
        [sys.executable, "-m", "cofitune", "compare", str(path)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    metrics = folder / "runs/full/0.001/1234/train/metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text().count("\n") > 5) and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_killed_comparison_resumes_whole_and_then_trains_nothing(config: dict[str, Any]) -> None:
    folder = Path(config["output_dir"]) / "compare"
    config["compare"]["methods"]["broken"] = {"train": {"max_grad_norm": 0.0, "warmup_ratio": 0.0}}
    config["compare"]["learning_rates"]["broken"] = [1e30]  # diverges
    begin_and_kill(config, folder)
    store, first = folder / "runs.jsonl", folder / "runs/full/0.001/1234"
    assert not store.exists() and not (first / "train/manifest.json").exists()
    store.write_text('{"run": "torn')
    checkpoints = sorted(p.name for p in (first / "train/checkpoints").glob("step-*"))
    assert checkpoints, "it was killed with a checkpoint behind it"

    output = compare_here(config)
    log = (first / "train.log").read_text()
    assert f"resume: continuing after step {int(checkpoints[-1].removeprefix('step-'))}" in log
    content = json.loads((folder / "compare.json").read_text())
    assert load_config(folder / "config.yaml").eval.batch_size == 16, "what auto means in every comparison"
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
    assert "PARTIAL: 3 of 4 runs" in output and "at matched speciality" in output

    kept = (first / "train/delta.safetensors").stat().st_mtime_ns
    del config["compare"]["methods"]["broken"], config["compare"]["learning_rates"]["broken"]
    shutil.rmtree(folder / "scored/eval/samples")
    again = compare_here(config)
    assert "takes    nothing more: every run is done" in again and "PARTIAL" not in again
    assert len(store.read_text().splitlines()) == 4, "nothing was trained or scored again"
    assert (first / "train/delta.safetensors").stat().st_mtime_ns == kept
    whole = json.loads((folder / "compare.json").read_text())
    assert whole["points"] == content["points"] and whole["partial"] is None

    lines = store.read_text().splitlines(keepends=True)
    store.write_text("".join(line for line in lines if '"lora-' not in line))
    compare_here(config)
    added = json.loads(store.read_text().splitlines()[-1])
    assert added["run"] == "lora-0.01-seed1234" and list(added["seconds"]) == ["train"], "trained and asked already"

    config["compare"]["seeds"] = [1234, 1]
    config["compare"]["budget_hours"] = 1e-6
    within = compare_here(config)
    assert "leave no time for full-0.02-seed1" in within and "PARTIAL: 4 of 6 runs" in within
    lines = store.read_text().splitlines(keepends=True)
    store.write_text("".join(line for line in lines if '"lora-' not in line))
    assert "PARTIAL: 4 of 6 runs" in compare_here(config)
    taken_over = json.loads(store.read_text().splitlines()[-1])
    assert (taken_over["run"], list(taken_over["seconds"])) == ("lora-0.01-seed1234", ["train"]), "whatever the budget"
    half = json.loads((folder / "compare.json").read_text())
    assert half["seeds"] == [1234], "a seed counts when all of its runs are there"
    assert [p["scores"] for p in half["points"]] == [p["scores"] for p in content["points"]]


def test_a_dry_run_tells_the_cost_and_writes_nothing(config: dict[str, Any]) -> None:
    assert "the same command without --overwrite continues" in compare_here(config, dry_run=True, overwrite=True)
    output = compare_here(config, dry_run=True)
    assert "trains   3 runs, 48 optimizer steps; 0 runs are done" in output
    assert "items each, 16 at once (eval.batch_size: auto, which is this in every comparison)" in output
    assert "scores   7 models" in output and "a time that the first finished run will tell" in output
    assert not Path(config["output_dir"]).exists()


def test_methods_are_laid_over_the_config_and_every_mistake_is_named(config: dict[str, Any], tmp_path: Path) -> None:
    names = sorted(p.stem for p in METHODS.glob("*.yaml"))
    config["compare"] = {"methods": {name: str(METHODS / f"{name}.yaml") for name in names}, "seeds": [1, 2]}
    config["importance"] = {"data": config["data"]["train"]}
    config["train"]["learning_rate"] = 1e-3
    # rivals' settings of the config itself, which no other method may take over
    config["train"]["l2_to_base"] = 5.0
    config["data"]["replay"] = {"share": 0.3}
    config["train"]["rehearsal"] = {"share": 0.5, "path": f"{config['output_dir']}/rehearsal"}
    config["softmask"] = {"apply_to": "none", "modules": ["up_proj"], "strength": 0.5}
    runs = compare_plan._runs(load(config), tmp_path / "compare")
    assert [r.seed for r in runs] == [1] * len(names) + [2] * len(names)
    by_name = {r.method: r.config for r in runs}
    assert by_name["cofitune_update"].region == load(config).region
    assert {n: c.train.l2_to_base for n, c in by_name.items() if c.train.l2_to_base} == {"l2": 100.0}
    assert {n: c.data.replay.share for n, c in by_name.items() if c.data.replay} == {
        "replay": 0.1,
        "cofitune_replay": 0.2,
    }
    rehearse = {n: c.train.rehearsal for n, c in by_name.items() if c.train.rehearsal}
    assert {n: r.loss for n, r in rehearse.items()} == {
        "cofitune_rehearsal": "nll",
        "cofitune_rehearsal_kl": "kl",
        "full_rehearsal": "nll",
        "lora_rehearsal": "nll",
    }
    assert {r.path for r in rehearse.values()} == {f"{config['output_dir']}/rehearsal"}, "the comparison's own"
    assert by_name["v_softmask"].softmask.modules is None and by_name["v_softmask"].softmask.strength == 1
    assert by_name["cofitune_update"].softmask.strength == 0.5, "CoFiTune's own settings are the config's"
    assert by_name["lora"].region is None and by_name["full"].region == Region(match=".*")
    assert {str(c.softmask.importance) for c in by_name.values()} == {f"('{config['output_dir']}/importance',)"}

    config["compare"] = {"methods": {"a": {"train": {"learning_rat": 1}}, "b": {"adapter": {"kind": "lora"}}}}
    with pytest.raises(ConfigError) as result:
        compare_plan._runs(load(config), tmp_path / "compare")
    assert "compare.methods.a: train.learning_rat: unknown key; did you mean 'learning_rate'?" in str(result.value)
    assert "compare.methods.b" in str(result.value) and "set region: null" in str(result.value)


@pytest.mark.parametrize(
    "changed, output",
    [
        ({"methods": {}}, "compare.methods: name some"),
        ({"methods": {"a b": {}}}, "'a b' cannot name a method"),
        ({"methods": {"a": {"eval": {}}}}, "eval: is the comparison's own"),
        ({"methods": {"a": "nowhere.yaml"}}, "nowhere.yaml: no such config file"),
        ({"alphas": [0.5]}, "1 must be among them"),
        ({"alphas": [0.5, 0.5000001, 1]}, "two of them are 0.5 to six digits"),
        ({"learning_rates": [1e-3, 1.0000001e-3]}, "two of them are 0.001 to six digits"),
        (
            {"learning_rates": {"full": [1e-3, 1.0000001e-3]}},
            "learning_rates.full: two of them are 0.001 to six digits",
        ),
        ({"learning_rates": {"ful": 1e-3}}, "'ful' is no method; did you mean 'full'?"),
        ({"reference": "lor"}, "'lor' is no method; did you mean 'lora'?"),
        ({"methods": {"full": str(METHODS / "cofitune_update.yaml")}}, "no importance in"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    config: dict[str, Any], tmp_path: Path, changed: dict[str, Any], output: str
) -> None:
    if "methods" in changed:
        config["compare"] = changed
    else:
        config["compare"] |= changed
    with pytest.raises(UserError) as result:
        compare_plan.plan_compare(load(config))
    assert output in str(result.value)
    assert len(getattr(result.value, "problems", [output])) == 1, "one mistake, one message"


def test_a_method_in_another_template_is_refused_before_any_training(config: dict[str, Any]) -> None:
    config["compare"]["methods"]["plain"] = {"data": {"template": "plain"}}
    with pytest.raises(UserError, match=r"compare\.methods\.plain: data\.template: .*'plain'.* asked in 'chat'"):
        compare_plan.plan_compare(load(config))
    config["compare"]["methods"]["plain"] = {"data": {"template": "chat"}}
    assert len(compare_plan.plan_compare(load(config)).runs) == 4, "auto is chat here: the same"


def test_a_run_that_is_trained_in_another_template_names_its_method(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config["compare"]["methods"]["plain"] = {"data": {"template": "plain"}}
    monkeypatch.setattr(compare_plan.Run, "is_trained", property(lambda run: run.method == "plain"))
    monkeypatch.setattr(compare_plan, "_check_alike", lambda run, plan: None)
    with pytest.raises(UserError, match=r"compare\.methods\.plain: data\.template: .*'plain'.* asked in 'chat'"):
        compare_plan.plan_compare(load(config))


def test_runs_not_comparable_with_the_base_are_refused_before_training(
    config: dict[str, Any], tmp_path: Path, tiny_model_folder: Path
) -> None:
    other = shutil.copytree(tiny_model_folder, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.chat_template = "{# another #}" + tokenizer.chat_template
    tokenizer.save_pretrained(other)
    config["eval"]["models"] = [{"path": str(other), "role": "base"}]
    with pytest.raises(UserError, match=r"side by side: 'full-0\.001-seed1234-alpha0\.5' .*template_sha256 is"):
        compare_plan.plan_compare(load(config))


def test_overwrite_takes_the_answers_of_another_template_along(config: dict[str, Any]) -> None:
    config["data"]["template"] = "plain"
    plan = compare_plan.plan_compare(load(config))
    start_folder(plan.config, "compare", False)
    start_folder(plan.eval_config([]), "eval", False)
    config["data"]["template"] = "chat"
    with pytest.raises(UserError, match="was made by another config .*--overwrite it"):
        compare_plan.plan_compare(load(config))
    compare_plan.plan_compare(load(config), overwrite=True)


def test_a_seed_that_is_named_twice_counts_once(config: dict[str, Any]) -> None:
    config["compare"]["seeds"] = [7, 1, 7]
    plan = compare_plan.plan_compare(load(config))
    assert plan.seeds == (7, 1) and len(plan.runs) == 6


def write_manifest(run: compare_plan.Run, **changed: Any) -> None:
    made = {"ranks": 1, "steps": 16, "dtype": "float32", "seconds": 5.0} | changed
    (run.folder / "train").mkdir(parents=True, exist_ok=True)
    (run.folder / "train" / "manifest.json").write_text(json.dumps(made))


@pytest.mark.parametrize(
    "changed, output",
    [
        ({"ranks": 2}, "ranks 2 there, 1 now"),
        ({"steps": 8}, "steps 8 there, 16 now"),
        ({"dtype": "bfloat16"}, "dtype bfloat16 there, float32 now"),
    ],
)
def test_unlike_runs_are_not_mixed(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], output: str
) -> None:
    plan = compare_plan.plan_compare(load(config))
    run, made = plan.runs[0], plan.trainings[0]
    monkeypatch.setattr("cofitune.recipes.train.recipe.check", lambda *_, **__: made)
    write_manifest(run)
    assert compare_plan._check(run, False, False, 1) is made
    write_manifest(run, **changed)
    with pytest.raises(UserError) as result:
        compare_plan._check(run, False, False, 1)
    assert str(result.value).startswith("compare.methods.full: ") and output in str(result.value)
    assert str(result.value).endswith(f"to train this run alone again, delete {run.folder}")
    assert compare_plan._check(run, True, False, 1) is made, "it is trained anew"


def test_a_trained_run_is_scored_alone_and_keeps_its_training_time(config: dict[str, Any]) -> None:
    plan = compare_plan.plan_compare(load(config))
    run, asked = plan.runs[0], list[str]()

    def note(arguments: list[str], log: Path) -> str | None:
        asked.append(arguments[0])
        return None

    write_manifest(run)
    assert (
        recipe._run_one(plan, run, False, note, cast(RunLine, {"seconds": {"train": 7.5}}))["seconds"]["train"] == 7.5
    )
    assert recipe._run_one(plan, run, False, note, None)["seconds"]["train"] == 5.0, (
        "killed before its line was written"
    )
    assert asked == ["eval", "eval"]
    config["train"]["save_steps"] = 2
    config["train"]["save_total_limit"] = 1
    again = compare_plan._runs(load(config), plan.folder)[0]
    assert again.identity == run.identity, "how often it saves makes it no other run"
    config["train"]["max_steps"] = 8
    assert compare_plan._runs(load(config), plan.folder)[0].identity != run.identity


def test_without_a_finished_run_the_first_reason_is_told(config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="no run has finished.*full-0.001-seed1234: train: it broke"):
        recipe.compare(load(config), run_command=lambda arguments, log: "it broke", console=Console(file=StringIO()))


def test_the_region_that_a_search_found_is_compared(tmp_path: Path, tiny_model_folder: Path) -> None:
    config = Config.model_validate(
        {"model": {"name": str(tiny_model_folder)}, "region": "search", "output_dir": str(tmp_path)}
    )
    with pytest.raises(ArtifactError, match="no finished search here"):
        recipe.resolve_search(config)
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "region.yaml").write_text("layers: 1-2\nmodules: [up_proj]\n")
    region = recipe.resolve_search(config).region
    assert isinstance(region, Region) and (region.layers, region.modules) == ("1-2", ("up_proj",))
    (tmp_path / "search" / "region.yaml").write_text("layers: 1-2\nmodules: [up_proj]\nmodel: another\n")
    with pytest.raises(ArtifactError, match="searched for another base model"):
        recipe.resolve_search(config)


def test_what_an_evaluation_has_asked_is_not_asked_again(tmp_path: Path) -> None:
    result, cache = tmp_path / "eval", tmp_path / "cache"
    for place, text in ((result / "new", "1"), (result / "known", "1"), (cache / "known", "2")):
        place.mkdir(parents=True)
        (place / "answers.jsonl").write_text(text)
    recipe._hand_on_answers(result, cache)
    recipe._hand_on_answers(tmp_path / "none", cache)
    assert [(cache / name / "answers.jsonl").read_text() for name in ("new", "known")] == ["1", "2"]
