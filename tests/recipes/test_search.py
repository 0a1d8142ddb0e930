"""The search recipe with a fake trainer, whose scores follow a formula; the real one runs in the end-to-end test."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cofitune.config.load import load_config
from cofitune.config.schema import Config
from cofitune.errors import ConfigError, UserError
from cofitune.model.region import resolve_region
from cofitune.recipes.search import search
from cofitune.search.store import read_trials
from cofitune.search.trial import TrialError
from cofitune.search.winner import read_winner

TARGET = {(1, "up_proj"), (1, "down_proj")}


def write_jsonl(path: Path, items: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return str(path)


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
    """Writes what a trial leaves, with the overlap of its region and a target as the score."""

    def __init__(self, kill_at: int | None = None, broken: tuple[str, ...] = (), unified: float | None = None) -> None:
        self.kill_at, self.broken, self.unified = kill_at, broken, unified
        self.configs: list[Config] = []
        self.trained: list[bool] = []

    def __call__(self, config: Config, folder: Path, *, train: bool) -> None:
        assert not (folder / "train").exists(), "a trial starts in an empty place"
        handed_on = sorted(path.name for path in folder.rglob("*"))
        assert handed_on == (["answers.jsonl", "cache", "eval", "key"] if train else []), "the base's answers, no more"
        (folder / "train").mkdir(parents=True)
        (folder / "train" / "delta.safetensors").write_bytes(b"heavy")
        if len(self.configs) == self.kill_at:
            raise KeyboardInterrupt
        self.configs.append(config)
        self.trained.append(train)
        region = config.region
        assert region is not None and region != "search"
        if region.layers in self.broken and train:
            raise TrialError(f"exit code 1 at {region.layers}")
        chosen = resolve_region(region.layers or "", region.modules or (), 4)
        own = {(layer, m) for layer in chosen.layers for m in chosen.modules} if train else set()
        speciality = 100 * len(own & TARGET) / len(own | TARGET)
        categories = {"speciality": speciality, "gen_kn": 50.0, "gen_rs": None}
        unified = (speciality + 50) / 2 if self.unified is None else self.unified
        scores = {"categories": categories, "versatility": 50.0, "unified": unified}
        (folder / "eval").mkdir(exist_ok=True)
        (folder / "eval" / "config.yaml").write_text("made: here\n")
        (folder / "eval" / "cache" / "key").mkdir(parents=True, exist_ok=True)
        (folder / "eval" / "cache" / "key" / "answers.jsonl").write_text("{}\n")
        (folder / "eval" / "scores.json").write_text(json.dumps({"models": {"run" if train else "base": scores}}))
        lines = [json.dumps({"step": s, "loss": 3.0 - s / 10}) for s in (1, 2)]
        (folder / "train" / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def run(config: Config, trainer: Trainer, **options: Any) -> tuple[Path, str]:
    out = io.StringIO()
    folder = search(config, start_trial=trainer, console=Console(file=out, width=100), **options)
    return folder, out.getvalue()


def records(folder: Path) -> list[dict[str, Any]]:
    """The store without what the clock wrote."""
    lines = (folder / "trials.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def test_it_finds_the_region_that_the_formula_favours_and_writes_it_for_train(config: Config) -> None:
    trainer = Trainer()
    folder, shown = run(config, trainer)
    assert folder == config.run / "search"
    assert read_winner(folder) == ("1", ("up_proj", "down_proj"))
    assert trainer.trained == [False] + [True] * 13
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
    for made, trained in zip(trainer.configs, trainer.trained, strict=True):
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


def test_a_second_call_trains_nothing_and_says_the_same(config: Config) -> None:
    folder, first = run(config, Trainer())
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    trainer = Trainer()
    _, second = run(config, trainer)
    assert trainer.configs == []
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
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


def test_scores_that_cannot_be_ranked_fail_the_trial_and_leave_a_readable_store(config: Config) -> None:
    with pytest.raises(UserError, match=r"the base could not be scored.*unified"):
        run(config, Trainer(unified=float("nan")))
    (trial,) = read_trials(config.run / "search" / "trials.jsonl")
    assert trial.id == "base" and not trial.done


def test_a_dry_run_counts_the_trials_and_writes_nothing(config: Config) -> None:
    trainer = Trainer()
    _, shown = run(config, trainer, dry_run=True)
    assert "at most 13 trials of 7 optimizer steps each, and the base once" in shown
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
        def __call__(self, config: Config, folder: Path, *, train: bool) -> None:
            with pytest.raises(UserError, match="another search is writing"):
                run(base, Trainer())
            super().__call__(config, folder, train=train)

    base = config
    folder, _ = run(config, Second())
    assert len(records(folder)) == 14


def load_levels(text: str, folder: Path) -> Any:
    path = folder / "levels.yaml"
    path.write_text(f"model: {{name: x}}\noutput_dir: y\nsearch: {{levels: {text}}}\n", encoding="utf-8")
    return load_config(path).search.levels


def test_the_trials_may_have_a_rate_of_their_own_and_only_that_one_makes_them(config: Config) -> None:
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
