"""The search recipe with a fake trainer, whose scores follow a formula; the real one runs in the end-to-end test."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from cofitune.config import schema
from cofitune.config.eval import EvalModel
from cofitune.config.load import load_config
from cofitune.config.schema import Config
from cofitune.config.search import Halving
from cofitune.errors import ConfigError, UserError
from cofitune.evaluation.metrics import Metric
from cofitune.evaluation.samples import Sample, TaskResult, save_result
from cofitune.files import read_json
from cofitune.model.layouts import MODULES
from cofitune.model.load import choose_dtype
from cofitune.model.region import resolve_region
from cofitune.recipes.search.gradient_statistics import take_statistics
from cofitune.recipes.search.plan import plan_search
from cofitune.recipes.search.proxy import StartProxy
from cofitune.recipes.search.recipe import search
from cofitune.recipes.trial.executor import Measured, TrialRequest, TrialResult
from cofitune.reports.text import duration
from cofitune.search.proxy import statistics_from_json
from cofitune.search.store import Store, read_trials
from cofitune.search.trial import Trial
from cofitune.search.winner import read_winner

TARGET = {(1, "up_proj"), (1, "down_proj")}
STEPS, FIRST_RUNG = 7, 3  # of a trial, and where it may pause


def write_jsonl(path: Path, items: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a second each."""
    monkeypatch.setattr("cofitune.recipes.search.recipe.figure.can_draw", lambda: False)


@pytest.fixture
def config(tmp_path: Path, tiny_model_folder: Path) -> Config:
    item = {"instruction": "What is two plus two?", "input": "", "output": "Four."}
    choice = {"question": "Which city?", "choices": ["Paris", "Rome"], "answer": 0}
    law = write_jsonl(tmp_path / "law.jsonl", [item] * 4)
    law_dev = write_jsonl(tmp_path / "law_dev.jsonl", [item] * 6)
    general = write_jsonl(tmp_path / "general.jsonl", [choice] * 6)
    text = f"""
model: {{name: {tiny_model_folder}}}
data: {{train: {law}, max_length: 64}}
region: search
train: {{num_train_epochs: 2, learning_rate: 1e-3}}
softmask: {{apply_to: update}}
eval: {{speciality: [{{path: {law}, kind: generate}}]}}
search:
  train_steps: 7
  limit: 5
  eval:
    speciality: [{{path: {law_dev}, kind: generate, limit: 3}}]
    versatility: {{gen_kn: [{{path: {general}, kind: multiple_choice}}]}}
output_dir: {tmp_path / "run"}
"""
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


class Trainer:
    """Runs requests: leaves what a trial leaves, with the overlap of its region and a target as the score."""

    def __init__(self, kill_at: int | None = None, broken: tuple[str, ...] = (), unified: float | None = None) -> None:
        self.kill_at, self.broken, self.unified = kill_at, broken, unified
        self.requests: list[TrialRequest] = []
        self.batches: list[int] = []
        self.measured: list[Config] = []
        self.backwards = False

    @property
    def configs(self) -> list[Config]:
        return [request.config for request in self.requests]

    def __call__(self, requests: Sequence[TrialRequest]) -> Iterator[TrialResult]:
        self.batches.append(len(requests))
        for request in reversed(requests) if self.backwards else requests:
            yield self.run_one(request)

    def run_one(self, request: TrialRequest) -> TrialResult:
        folder, config = request.folder, request.config
        assert Path(config.output_dir) == folder
        results = sorted(path.name for path in folder.rglob("*"))
        paused = (folder / "train" / "checkpoints").exists()
        if not paused:
            handed_on = ["answers.jsonl", "cache", "eval", "key"] if request.train else []
            assert results == handed_on, "a trial starts in an empty place, with the base's answers and no more"
        (folder / "train").mkdir(parents=True, exist_ok=True)
        (folder / "train" / "delta.safetensors").write_bytes(b"heavy")
        if request.stop_step:
            (folder / "train" / "checkpoints").mkdir(exist_ok=True)
        if len(self.requests) == self.kill_at:
            raise KeyboardInterrupt
        self.requests.append(request)
        region = config.region
        assert region is not None and region != "search"
        if region.layers in self.broken and request.train:
            return TrialResult(request, f"exit code 1 at {region.layers}", {"start": 1.0})
        self.leave(request)
        steps = (request.stop_step or STEPS) - (FIRST_RUNG if paused else 0)
        return TrialResult(request, None, {"start": 0.5, "train": 2.0 * steps, "evaluate": 3.0, "other": 0.0})

    def leave(self, request: TrialRequest) -> None:
        folder, region = request.folder, request.config.region
        assert region is not None and region != "search"
        chosen = resolve_region(region.layers or "", region.modules or (), 4)
        own = {(layer, m) for layer in chosen.layers for m in chosen.modules} if request.train else set()
        overlap = len(own & TARGET) / len(own | TARGET)
        speciality = 100 * overlap
        categories = {"speciality": speciality, "gen_kn": 50.0, "gen_rs": None}
        unified = (speciality + 50) / 2 if self.unified is None else self.unified
        scores = {"categories": categories, "versatility": 50.0, "unified": unified}
        model = "run" if request.train else "base"
        (folder / "eval").mkdir(exist_ok=True)
        (folder / "eval" / "config.yaml").write_text("made: here\n")
        (folder / "eval" / "cache" / "key").mkdir(parents=True, exist_ok=True)
        (folder / "eval" / "cache" / "key" / "answers.jsonl").write_text("{}\n")
        law = [overlap + (0.01 * i) % 0.1 for i in range(20)]
        save_result(task("law", "speciality", law), folder / "eval" / "samples" / model / "law.jsonl")
        save_result(task("kn", "gen_kn", [0.0, 1.0] * 10), folder / "eval" / "samples" / model / "kn.jsonl")
        change = {"value": 1.0, "low": -2.0, "high": 4.0, "within_noise": None}
        compared = [{"model": model, "against": "base", "summary": {"unified": change, "gen_rs": None}}]
        content = {"models": {model: scores}, "comparisons": compared if request.train else []}
        (folder / "eval" / "scores.json").write_text(json.dumps(content))
        lines = [json.dumps({"step": s, "loss": 3.0 - s / 10}) for s in (1, 2)]
        (folder / "train" / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    def measure(self, request: TrialRequest) -> Measured:
        self.measured.append(request.config)
        return Measured(5.0, 2.0, 10.0)


def task(title: str, category: str, scores: list[float]) -> TaskResult:
    """A task's result with these scores; no answer is looked at."""
    samples = tuple(Sample(i, f"{title} {i}", "yes", "yes", None, None, score) for i, score in enumerate(scores, 1))
    return TaskResult(title, category, Metric("f1", binary=False), sum(scores) / len(scores), 0.0, samples, 1.0)


def no_proxy(config: Config, path: Path) -> None:
    raise AssertionError("no proxy was asked for")


def run(config: Config, trainer: Trainer, start_proxy: StartProxy = no_proxy, **options: Any) -> tuple[Path, str]:
    out = io.StringIO()
    console = Console(file=out, width=100)
    kept = {"execute": trainer, "start_proxy": start_proxy, "measure": trainer.measure}
    folder = search(config, console=console, **{**kept, **options})
    return folder, out.getvalue()


def records(folder: Path) -> list[dict[str, Any]]:
    """The store without what the clock wrote."""
    lines = (folder / "trials.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "parts")} for line in lines]


def test_it_finds_the_region_the_formula_favours_and_writes_it_for_train(config: Config) -> None:
    trainer = Trainer()
    folder, shown = run(config, trainer)
    assert folder == config.run / "search"
    assert read_winner(folder) == ("1", ("up_proj", "down_proj"))
    assert [request.train for request in trainer.requests] == [False] + [True] * 13
    assert trainer.batches == [1, 3, 2, 2, 6], "the base, and then a level's candidates together"
    tree = json.loads((folder / "tree.json").read_text(encoding="utf-8"))
    winner = next(t for t in tree["trials"] if t["id"] == tree["winner"])
    assert winner["region"] == {"layers": "1", "modules": ["up_proj", "down_proj"]}
    assert winner["unified"] == 75.0 and winner["train_loss"] == 2.8
    assert winner["num_trained"] == 2 * 32 * 48
    assert winner["speciality"] == 100.0 and winner["categories"] == {"gen_kn": 50.0, "gen_rs": None}
    assert tree["base"]["unified"] == 25.0 and tree["base"]["region"] is None
    assert len(tree["levels"]) == 4
    assert "★ 1 × up+down" in shown and "Winner: 1 × up+down" in shown


def test_each_trial_gets_its_own_config(config: Config) -> None:
    trainer = Trainer()
    folder, _ = run(config, trainer)
    for request in trainer.requests:
        made, trained = request.config, request.train
        assert made.softmask.apply_to == "none"
        assert made.train.max_steps == 7
        assert made.train.learning_rate == config.train.learning_rate
        assert [t.limit for t in made.eval.speciality] == [3], "a task's own smaller limit stays"
        assert [t.limit for t in made.eval.versatility.gen_kn] == [5]
        assert Path(made.output_dir).parent == folder / "trials"
        assert (Path(made.output_dir).name == "base") == (not trained)
        assert not list(Path(made.output_dir).rglob("*.safetensors")), "weights are dropped"
        assert (Path(made.output_dir) / "eval" / "scores.json").is_file(), "scores are kept"
    assert [Path(c.output_dir).name for c in trainer.configs] == [t["id"] for t in records(folder)]


def test_without_a_search_limit_trials_keep_the_evaluations_own(config: Config) -> None:
    given = config.search.eval
    assert given is not None
    given = given.model_copy(update={"limit": 2, "models": (EvalModel(path="rival"),)})
    tasks = plan_search(change(config, "search", eval=given, limit=None)).measure.tasks
    assert tasks.limit == 2 and tasks.models == ()
    tasks = plan_search(change(config, "search", eval=given, limit=1)).measure.tasks
    assert tasks.limit is None and [t.limit for t in tasks.speciality] == [1] and tasks.models == ()


def test_the_scores_depend_on_the_precision_that_auto_comes_to(config: Config) -> None:
    assert config.model.dtype == "auto"
    here = str(choose_dtype("auto")).removeprefix("torch.")
    assert plan_search(config).identity["model"]["dtype"] == here
    on_ray = change(config, "search", executor="ray")
    assert plan_search(on_ray).identity["model"]["dtype"] == "auto, on the cluster"
    assert plan_search(change(on_ray, "model", dtype="float32")).identity["model"]["dtype"] == "float32"


def test_a_second_call_trains_nothing_and_says_the_same(config: Config) -> None:
    folder, first = run(config, Trainer())
    before = {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    trainer = Trainer()
    _, second = run(config, trainer)
    assert trainer.configs == []
    assert {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert second[second.index("region (layers") :] == first[first.index("region (layers") :]


@pytest.mark.parametrize("kill_at", [0, 1, 6, 13])
def test_a_killed_search_goes_on_to_the_same_store(config: Config, tmp_path: Path, kill_at: int) -> None:
    whole, _ = run(config.model_copy(update={"output_dir": str(tmp_path / "whole")}), Trainer())
    killed = Trainer(kill_at)
    with pytest.raises(KeyboardInterrupt):
        run(config, killed)
    assert not (config.run / "search" / "region.yaml").exists()
    again = Trainer()
    folder, _ = run(config, again)
    assert len(killed.configs) == kill_at and len(again.configs) == 14 - kill_at
    assert records(folder) == records(whole)
    assert (folder / "region.yaml").read_text() == (whole / "region.yaml").read_text()


def test_overwrite_begins_anew(config: Config) -> None:
    folder, _ = run(config, Trainer())
    trainer = Trainer()
    run(config, trainer, overwrite=True)
    assert len(trainer.configs) == 14
    assert len(records(folder)) == 14


def test_changed_data_behind_the_same_path_is_refused(config: Config) -> None:
    run(config, Trainer())
    path = Path(config.data.train[0].path)
    path.write_text(path.read_text() * 2, encoding="utf-8")
    trainer = Trainer()
    with pytest.raises(UserError, match=r"data\.train is .* there and .* here"):
        run(config, trainer)
    assert trainer.configs == []


def test_another_config_is_refused(config: Config) -> None:
    run(config, Trainer())
    other = config.model_copy(update={"train": config.train.model_copy(update={"learning_rate": 5e-3})})
    with pytest.raises(UserError, match="learning_rate"):
        run(other, Trainer())


def test_trials_on_another_number_of_ranks_are_refused(config: Config) -> None:
    run(config, Trainer())
    with pytest.raises(UserError, match=r"train\.ranks is 1 there and 2 here"):
        run(config, Trainer(), ranks=2)


def test_a_failed_trial_is_recorded_with_its_reason_and_the_search_goes_on(config: Config) -> None:
    folder, shown = run(config, Trainer(broken=("0-1",)))
    failed = [t for t in records(folder) if t["status"] == "failed"]
    assert [t["reason"] for t in failed] == ["exit code 1 at 0-1"] * 2
    assert "failed: exit code 1 at 0-1" in shown
    assert read_winner(folder) == ("1", ("up_proj", "down_proj")), "reached through layers 1-2"
    assert not list(folder.rglob("*.safetensors"))


def test_when_all_fail_the_first_reason_is_told(config: Config) -> None:
    broken = tuple(f"{a}-{b}" if a < b else str(a) for a in range(4) for b in range(4))
    with pytest.raises(UserError, match="exit code 1 at 0-1"):
        run(config, Trainer(broken=broken))


def test_scores_that_cannot_be_ranked_fail_the_trial_not_the_store(config: Config) -> None:
    with pytest.raises(UserError, match=r"the base could not be scored.*unified"):
        run(config, Trainer(unified=float("nan")))
    (trial,) = read_trials(config.run / "search" / "trials.jsonl")
    assert trial.id == "base" and not trial.done


def test_a_dry_run_counts_the_trials_and_writes_nothing(config: Config) -> None:
    trainer = Trainer()
    _, shown = run(config, trainer, dry_run=True)
    assert "at most 19 trials of 7 optimizer steps each, and the base once" in shown
    assert "(3 trials)" in shown and "0-1 × all" in shown
    assert trainer.configs == [] and not config.run.exists()


def test_a_dry_run_of_a_finished_search_counts_what_is_there(config: Config) -> None:
    folder, _ = run(config, Trainer())
    before = sorted(p.name for p in folder.iterdir())
    _, shown = run(config, Trainer(), dry_run=True)
    assert "In the store already, and not to be repeated: 13 trials." in shown
    assert sorted(p.name for p in folder.iterdir()) == before


def test_choosing_on_the_test_items_is_pointed_out(config: Config) -> None:
    shared = config.model_copy(
        update={"eval": config.search.eval, "search": config.search.model_copy(update={"eval": None})}
    )
    _, shown = run(shared, Trainer(), dry_run=True)
    assert "search.eval is not given" in shown
    assert "search.eval is not given" not in run(config, Trainer(), dry_run=True)[1]


def change(config: Config, section: str, **update: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=update)})


def test_mistakes_are_found_before_the_first_trial(config: Config, tmp_path: Path) -> None:
    tasks = config.search.eval
    assert tasks is not None
    gone = tasks.speciality[0].model_copy(update={"path": "gone.jsonl"})
    levels = load_levels("[{layers: [0-9, 0-1]}, {modules: [[up_prj]]}]", tmp_path)
    mistakes = {
        r"search\.levels\.0: '0-9' lies outside.*\n.*search\.levels\.1: 'up_prj'": change(
            config, "search", levels=levels
        ),
        r"data\.train": change(config, "data", train=()),
        r"gone\.jsonl: no such data file": change(
            config, "search", eval=tasks.model_copy(update={"speciality": (gone,)})
        ),
        r"search\.eval\.speciality: names no task": change(
            config, "search", eval=tasks.model_copy(update={"speciality": ()})
        ),
        r"max_length 3": change(config, "data", max_length=3),
        r"model\.name": change(config, "model", name="no/such/folder/here"),
    }
    for pattern, wrong in mistakes.items():
        trainer = Trainer()
        with pytest.raises(UserError, match=pattern):
            run(wrong, trainer)
        assert trainer.configs == [] and not config.run.exists(), pattern


def test_without_a_general_task_the_message_names_the_section(config: Config) -> None:
    only_law = config.model_copy(update={"search": config.search.model_copy(update={"eval": None})})
    with pytest.raises(ConfigError, match=r"eval\.versatility: names no task"):
        run(only_law, Trainer())


def test_a_search_that_is_already_being_written_is_refused(config: Config) -> None:
    class Second(Trainer):
        def run_one(self, request: TrialRequest) -> TrialResult:
            with pytest.raises(UserError, match="another search is writing"):
                run(config, Trainer())
            return super().run_one(request)

    folder, _ = run(config, Second())
    assert len(records(folder)) == 14


def load_levels(text: str, folder: Path) -> Any:
    path = folder / "levels.yaml"
    path.write_text(f"model: {{name: x}}\noutput_dir: y\nsearch: {{levels: {text}}}\n", encoding="utf-8")
    return load_config(path).search.levels


def test_trials_may_have_a_learning_rate_of_their_own_and_only_that(config: Config) -> None:
    own = config.model_copy(update={"search": config.search.model_copy(update={"learning_rate": 3e-3})})
    trainer = Trainer()
    run(own, trainer)
    assert {made.train.learning_rate for made in trainer.configs} == {3e-3}
    again = Trainer()
    slower = own.model_copy(update={"train": own.train.model_copy(update={"learning_rate": 1e-6})})
    run(slower, again)
    assert not again.configs, "the rate of the later training is not the trials'"
    with pytest.raises(UserError, match=r"train\.learning_rate is 0\.003 there and 0\.004 here"):
        run(own.model_copy(update={"search": own.search.model_copy(update={"learning_rate": 4e-3})}), Trainer())


HALVING = Halving(steps=(FIRST_RUNG,), keep=0.5)


def test_halving_prunes_a_level_and_drops_the_weights_of_what_stopped(config: Config) -> None:
    trainer = Trainer()
    folder, shown = run(change(config, "search", halving=HALVING), trainer)
    assert trainer.batches == [1, 3, 2, 2, 1, 2, 1, 6, 1], "of the last level two more are worse beyond chance"
    assert [request.stop_step for request in trainer.requests[1:6]] == [FIRST_RUNG] * 3 + [None] * 2
    lines = records(folder)
    assert [line["status"] for line in lines[1:7]] == ["paused"] * 3 + ["stopped"] + ["done"] * 2
    assert {line["start_step"] for line in lines if line["status"] == "done" and line["region"]} == {FIRST_RUNG}
    assert read_winner(folder) == ("1", ("up_proj", "down_proj"))
    assert not list(folder.rglob("*.safetensors")) and not list(folder.rglob("checkpoints"))
    assert "stopped after 3 steps" in shown and "8 trials stopped early, after 3 steps, and could not win." in shown
    assert "points below the best (95 % interval" in (folder / "trials.jsonl").read_text(encoding="utf-8")
    tree = json.loads((folder / "tree.json").read_text(encoding="utf-8"))
    by_status = {t["status"]: t for t in tree["trials"]}
    assert by_status["stopped"]["to_winner"] is None and by_status["done"]["steps"] == STEPS
    first = next(t for t in tree["trials"] if t["status"] == "done")
    assert first["seconds"] == 0.5 + 2.0 * FIRST_RUNG + 3.0 + 0.5 + 2.0 * (STEPS - FIRST_RUNG) + 3.0, "all its parts"
    again = Trainer()
    run(change(config, "search", halving=HALVING), again)
    assert again.requests == []


def test_each_trial_is_compared_with_the_winner_on_the_same_items(config: Config) -> None:
    folder, shown = run(config, Trainer())
    tree = json.loads((folder / "tree.json").read_text(encoding="utf-8"))
    beside = {t["region"]["layers"] + "+".join(t["region"]["modules"]): t["to_winner"] for t in tree["trials"]}
    assert sum(value is None for value in beside.values()) == 1, "the winner itself"
    half = beside["1up_proj"]
    assert half["value"] == pytest.approx(-25.0) and half["low"] < -10 < half["high"] + 30 and not half["tied"]
    assert "No other region is within chance of it" in shown
    assert tree["trials"][0]["intervals"] == {"unified": [-2.0, 4.0]}
    assert tree["sentences"][0] == tree["reason"]


def test_a_search_that_goes_on_still_has_every_items_score(config: Config) -> None:
    whole, _ = run(config, Trainer())
    expected = json.loads((whole / "tree.json").read_text(encoding="utf-8"))
    for samples in whole.rglob("samples"):
        shutil.rmtree(samples)
    run(config, Trainer())
    assert json.loads((whole / "tree.json").read_text(encoding="utf-8")) == expected


def test_regions_with_equal_answers_are_tied_whatever_their_scores_say(config: Config) -> None:
    class Same(Trainer):
        def leave(self, request: TrialRequest) -> None:
            super().leave(request)
            law = task("law", "speciality", [0.0, 1.0] * 10)
            save_result(law, request.folder / "eval" / "samples" / ("run" if request.train else "base") / "law.jsonl")

    levels = load_levels("[{layers: [0-1, 2-3]}, {modules: [mha, ffn]}]", config.run.parent)
    folder, shown = run(change(config, "search", levels=levels), Same())
    words = " ".join(shown.split())
    assert "3 regions cannot be told apart from it" in words and "the one with the fewest weights is 0-1 × mha" in words
    tree = json.loads((folder / "tree.json").read_text(encoding="utf-8"))
    assert all(t["to_winner"]["tied"] for t in tree["trials"] if t["id"] != tree["winner"])
    assert "cannot be told apart" in (folder / "region.yaml").read_text(encoding="utf-8")


def test_a_budget_ends_with_the_best_so_far_and_says_what_was_not_tried(config: Config) -> None:
    folder, shown = run(change(config, "search", budget_trials=4), Trainer())
    assert "search.budget_trials: 4 ended the search" in shown
    content = yaml.safe_load((folder / "region.yaml").read_text(encoding="utf-8"))
    assert "search.budget_trials: 4 ended" in content["reason"] and "not begun: modules: mha, ffn" in content["reason"]
    tree = json.loads((folder / "tree.json").read_text(encoding="utf-8"))
    assert len(tree["trials"]) == 4 and len(tree["not_tried"]["regions"]) == 1 and len(tree["not_tried"]["levels"]) == 2
    again = Trainer()
    run(change(config, "search", budget_trials=None, budget_hours=10.0), again)
    assert len(again.requests) == 9 and "ended" not in (folder / "region.yaml").read_text(encoding="utf-8")


def test_fewer_weights_take_a_higher_rate_where_asked(config: Config) -> None:
    trainer = Trainer()
    scaled = change(config, "search", rate_scaling="sqrt", learning_rate=1e-3)
    folder, _ = run(scaled, trainer)
    regions = [(request.config.region, request.config.train.learning_rate) for request in trainer.requests]
    by_region = {(region.layers, region.modules): rate for region, rate in regions if region and region != "search"}
    everything = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert by_region["0-1", everything] == 1e-3
    assert by_region["1", everything] == pytest.approx(2**0.5 * 1e-3, rel=1e-3), "half of the weights"
    stored = {t["id"]: t["learning_rate"] for t in records(folder)}
    assert stored["base"] is None and max(filter(None, stored.values())) > 2e-3
    written = yaml.safe_load((folder / "region.yaml").read_text(encoding="utf-8"))
    assert written["trained"] == {"steps": STEPS, "learning_rate": by_region["1", ("up_proj", "down_proj")]}
    with pytest.raises(UserError, match=r"rate_scaling is 'sqrt' there and None here"):
        run(change(config, "search", rate_scaling="none", learning_rate=1e-3), Trainer())


def test_the_floor_decides_among_the_regions_that_keep_it(config: Config) -> None:
    class Forgetting(Trainer):
        """The more is trained, the more versatility is lost."""

        def leave(self, request: TrialRequest) -> None:
            super().leave(request)
            path = request.folder / "eval" / "scores.json"
            content = read_json(path, "scores")
            for scores in content["models"].values():
                region = request.config.region
                assert region is not None and region != "search"
                chosen = resolve_region(region.layers or "", region.modules or (), 4)
                lost = len(chosen.layers) * len(chosen.modules) if request.train else 0
                scores["versatility"] = 50.0 - lost
                scores["categories"]["speciality"] = 10.0 + 5 * lost if request.train else 0.0
            path.write_text(json.dumps(content))

    requested = change(config, "search", objective="speciality", floor=-7.0)
    folder, shown = run(requested, Forgetting())
    assert read_winner(folder)[0] == "0", "one layer × seven modules: the most that loses no more than 7 points"
    assert re.search("the highest speciality of the .* that keep versatility of -7 points", " ".join(shown.split()))
    _, shown = run(change(config, "search", objective="speciality", floor=0.0), Trainer(), overwrite=True)
    assert re.search(r"of the (\d+) of \1 finished trials that keep", " ".join(shown.split()))


def test_a_dry_run_tells_the_time_from_measured_steps(config: Config) -> None:
    trainer = Trainer()
    _, shown = run(change(config, "search", budget_hours=2.0, prefix_cache="disk"), trainer, dry_run=True)
    words = " ".join(shown.split())
    assert "proxy" not in words
    (measured,) = trainer.measured
    assert measured.region == schema.Region(layers="0-1", modules=MODULES)
    assert "A step takes 2.00 s, an evaluation 10 s (measured on 0-1 × all, the largest region" in words
    seconds = 5 + 10 + 19 * (7 * 2 + 10)
    assert (
        f"at most about {duration(seconds)} without halving" in words
        and "if search.halving were {steps: [1, 3]}" in words
    )
    assert "The budget ends it after 2 hours" in words
    assert re.search(r"prefix cache takes 0 MiB in .* at most 0 MiB for 3 layers", words)
    assert not config.run.exists()


def test_a_dry_run_of_a_begun_search_goes_by_its_trials(config: Config) -> None:
    halving = change(config, "search", halving=HALVING)
    run(halving, Trainer())
    trainer = Trainer()
    words = " ".join(run(halving, trainer, dry_run=True)[1].split())
    assert trainer.measured == [] and "A step takes 2.00 s, an evaluation 4 s (by the mean of the trials" in words
    parts = 19 + 2 + 1 + 1 + 6  # a level's candidates once, and those that go on
    steps = 19 * FIRST_RUNG + 10 * (STEPS - FIRST_RUNG)
    assert f"{duration(17.5 + 2 * steps + 3.5 * parts)} with" in words


def test_a_dry_run_without_weights_says_that_the_time_is_not_known(config: Config, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(Path(config.model.name) / "config.json", bare)
    trainer = Trainer()
    _, shown = run(change(config, "model", name=str(bare)), trainer, dry_run=True)
    assert "The time is not known" in shown and "still missing" in shown and trainer.measured == []


def test_the_proxy_needs_general_data_and_is_judged_each_time(config: Config, tmp_path: Path) -> None:
    requested = change(config, "search", proxy="prune", proxy_keep=0.5)
    with pytest.raises(ConfigError, match=r"search\.proxy: prune needs general data .*importance\.data"):
        run(requested, Trainer())
    general = schema.Source(path=config.data.train[0].path)
    requested = change(requested, "importance", data=(general,))
    taken: list[Path] = []

    def statistics(config: Config, path: Path) -> None:
        taken.append(path)
        high = {m: [1.0, 5.0, 1.0, 1.0] for m in MODULES}
        path.write_text(json.dumps({"gain": high, "harm": {m: [1.0] * 4 for m in MODULES}}))

    trainer = Trainer()
    _, shown = run(requested, trainer, dry_run=True)
    words = " ".join(shown.split())
    seconds = 2 * 64 / config.train.per_device_train_batch_size / config.train.gradient_accumulation_steps * 2
    assert (
        f"gradients of all weights for at most 64 items of either data, by the step's time about {duration(seconds)}"
        in words
    )
    most = 2 + 1 + 1 + 6
    assert f"at most {most} trials" in words
    assert f"at most about {duration(5 + 10 + seconds + most * (7 * 2 + 10))} without halving" in words
    folder, shown = run(requested, trainer, statistics)
    assert trainer.batches == [1, 2, 1, 1, 6], "half of each level"
    assert "Left out by the proxy: 2-3 × all" in shown and "(Spearman)" in shown
    tree = json.loads((folder / "tree.json").read_text(encoding="utf-8"))
    assert tree["proxy"]["trials"] == 10 and -1 <= tree["proxy"]["rank_correlation"] <= 1
    assert all("proxy" in trial for trial in tree["trials"]) and len(tree["not_tried"]["pruned"]) == 9
    run(requested, Trainer(), statistics)
    assert len(taken) == 1, "kept in proxy.json"
    assert json.loads((folder / "proxy.json").read_text(encoding="utf-8"))["seconds"] >= 0
    assert "proxy's pass" not in run(requested, Trainer(), dry_run=True)[1], "it is there"
    anew = run(requested, Trainer(), dry_run=True, overwrite=True)[1]
    assert "The proxy's pass comes first" in " ".join(anew.split()), "what --overwrite forgets, it takes again"
    Path(general.path).write_text(Path(general.path).read_text() * 2, encoding="utf-8")
    run(requested, Trainer(), statistics, overwrite=True)
    assert len(taken) == 2, "of other data"


def test_a_search_killed_as_a_paused_trial_ends_finds_its_checkpoint(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested = change(config, "search", halving=HALVING)
    whole, _ = run(requested.model_copy(update={"output_dir": str(tmp_path / "whole")}), Trainer())
    append = Store.append

    def killed(store: Store, trial: Trial) -> None:
        if trial.done and trial.start_step:
            raise KeyboardInterrupt
        append(store, trial)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Store, "append", killed)
        run(requested, Trainer())
    folder, _ = run(requested, Trainer())  # which begins a trial in an empty folder, or where its checkpoint lies
    assert not list((folder / "trials").rglob("*.safetensors")) and not list((folder / "trials").rglob("checkpoints"))
    stores = [{(r["id"], r["steps"], r["status"]): r["unified"] for r in records(f)} for f in (folder, whole)]
    assert stores[0] == stores[1]


@pytest.mark.processes
def test_a_search_killed_at_random_ends_with_the_uninterrupted_store(config: Config, tmp_path: Path) -> None:
    requested = change(config, "search", halving=HALVING, beam=2)
    whole, _ = run(requested.model_copy(update={"output_dir": str(tmp_path / "whole")}), Trainer(broken=("2-3",)))
    random_moment, context = random.Random(4), get_context("fork")
    kills = 0
    while True:
        process = context.Process(target=run, args=(requested, Slow(broken=("2-3",))))
        process.start()
        process.join(random_moment.uniform(0.05, 1.2) if kills < KILLS else 60)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0 and kills >= KILLS // 2
    folder = requested.run / "search"

    def scores(folder: Path) -> dict[tuple[str, int, str], Any]:
        return {(r["id"], r["steps"], r["status"]): r for r in records(folder) if r["status"] != "failed"}

    assert scores(folder) == scores(whole)
    trees = [read_json(f / "tree.json", "tree") for f in (folder, whole)]
    for tree in trees:
        tree.pop("seconds")
        for trial in tree["trials"]:
            trial.pop("seconds")
            trial.pop("parts")
    assert trees[0] == trees[1]


KILLS = 12


class Slow(Trainer):
    """Takes some time for a trial, so that a kill may hit any part of it."""

    def leave(self, request: TrialRequest) -> None:
        time.sleep(0.02)
        super().leave(request)
        time.sleep(0.02)


def test_the_statistics_are_taken_from_both_sets_of_data(config: Config, tmp_path: Path) -> None:
    general = schema.Source(path=config.data.train[0].path)
    take_statistics(change(config, "importance", data=(general,)), tmp_path / "proxy.json")
    result = statistics_from_json(json.loads((tmp_path / "proxy.json").read_text()), "here")
    for part in (result.gain, result.harm):
        assert set(part) == set(MODULES) and all(len(v) == 4 and min(v) > 0 for v in part.values())
    # with the items of one set alike, one micro-batch's gradient is each item's: ‖g‖₂ ≤ ‖g‖₁ ≤ √n·‖g‖₂
    for module, values in result.gain.items():
        for gain, harm in zip(values, result.harm[module], strict=True):
            assert harm**0.5 <= gain * 1.001 and gain <= (harm * 32 * 48) ** 0.5 * 1.001


def test_on_a_terminal_a_tree_lives_and_in_the_end_there_are_pictures(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cofitune.recipes.search.recipe.figure.can_draw", lambda: True)
    out = io.StringIO()
    console = Console(file=out, width=120, height=50, force_terminal=True, color_system=None)
    trainer = Trainer()
    folder = search(config, execute=trainer, start_proxy=no_proxy, measure=trainer.measure, console=console)
    last = r"13 of at most 13 trials; best so far 1 × up\+down \(\S+\); at most 0:00:00 left"
    assert re.search(last, out.getvalue())
    assert "trial 1 of at most" not in out.getvalue()
    assert (folder / "search.png").stat().st_size > 10_000 and (folder / "search.svg").exists()
