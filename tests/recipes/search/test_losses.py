"""The search by losses with a fake trainer, whose curves follow a formula; real trials: tests/recipes/trial."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from cofitune.config.load import load_config
from cofitune.config.schema import Config
from cofitune.config.search import Halving, Search
from cofitune.errors import ConfigError, UserError
from cofitune.evaluation.batch_size import DeviceMemory
from cofitune.model.region import resolve_region
from cofitune.recipes.evaluate import plan as planning
from cofitune.recipes.prerequisites import Prerequisites as Needs
from cofitune.recipes.rehearse.recipe import rehearse
from cofitune.recipes.search import batches
from cofitune.recipes.search.plan import plan_search
from cofitune.recipes.search.recipe import search
from cofitune.recipes.search.trial_config import trial_config
from cofitune.recipes.train.data import read_train_data
from cofitune.recipes.trial.executor import Measured, TrialRequest, TrialResult
from cofitune.recipes.trial.loss_items import read_loss_items
from cofitune.rehearsal.items import read_rehearsal
from cofitune.search.measured import CurvePoint
from cofitune.search.store import open_store, read_trials
from cofitune.search.winner import read_winner
from tests.helpers import write_jsonl

WORDS = ["court", "contract", "void", "seller", "buyer", "tenant", "lease", "landlord"]
STEPS, BASE_LOSS = 6, 3.0


def write(path: Path, items: list[dict[str, Any]]) -> str:
    write_jsonl(path, items)
    return str(path)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """A folder of the base's own answers, three of them held out."""
    folder = tmp_path_factory.mktemp("rehearsed")
    prompts = write(folder / "prompts.jsonl", [{"prompt": f"Tell me of the {w}."} for w in WORDS])
    text = f"""
model: {{name: {tiny_model_folder}, dtype: float32}}
rehearsal: {{data: {prompts}, max_new_tokens: 6, max_repetition: 1.0, top_k: 4, engine: transformers, held_out: 0.4}}
output_dir: {folder / "run"}
"""
    (folder / "c.yaml").write_text(text)
    rehearse(load_config(folder / "c.yaml"), console=Console(quiet=True))
    return folder / "run" / "rehearsal"


@pytest.fixture
def settings(tmp_path: Path, tiny_model_folder: Path, rehearsal: Path) -> dict[str, Any]:
    taught = [{"instruction": f"Say {w}", "output": "the buyer"} for w in WORDS]
    choices = [{"question": f"Is it {w}?", "choices": ["yes", "no"], "answer": i % 2} for i, w in enumerate(WORDS)]
    ifeval = {"key": 1, "prompt": "Say.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    return {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"train": write(tmp_path / "law.jsonl", taught), "max_length": 64},
        "region": "search",
        "train": {"rehearsal": {"share": 0.2, "path": str(rehearsal)}, "seed": 11},
        "search": {
            "levels": [{"layers": ["0-1", "2-3"]}, {"modules": [["mha"], ["up_proj", "down_proj"]]}],
            "train_steps": STEPS,
            "points": 2,
            "eval": {
                "speciality": [{"path": write(tmp_path / "law_dev.jsonl", taught), "kind": "generate"}],
                "versatility": {
                    "gen_kn": [{"path": write(tmp_path / "kn.jsonl", choices), "kind": "multiple_choice"}],
                    "instruct": [{"path": write(tmp_path / "follow.jsonl", [ifeval]), "kind": "ifeval"}],
                },
            },
        },
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip


def load(settings: dict[str, Any]) -> Config:
    path = Path(settings["output_dir"]).parent / "config.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return load_config(path)


def searching(settings: dict[str, Any], **update: Any) -> Config:
    return load(settings | {"search": settings["search"] | update})


class Trainer:
    """Every region learns at a pace by its size, and drifts by the layers that it trains, the lower the more."""

    def __init__(self, noise: float = 0.0) -> None:
        self.requests: list[TrialRequest] = []
        self.noise = noise

    def __call__(self, requests: Sequence[TrialRequest]) -> Iterator[TrialResult]:
        for request in requests:
            self.requests.append(request)
            yield TrialResult(request, None, {"train": 2.0, "evaluate": 1.0}, *self.figures(request))

    def figures(self, request: TrialRequest) -> tuple[tuple[CurvePoint, ...], dict[str, float]]:
        if not request.train:
            return (CurvePoint(0, BASE_LOSS, 0.0),), {"gen_kn": 0.5}
        given = request.config.region
        assert given is not None and given != "search"
        region = resolve_region(given.layers or "", given.modules or (), 4)
        seed = request.config.train.seed - 11
        pace = len(region.layers) * len(region.modules) / 28
        leak = 0.1 * (5 - region.first) + self.noise * seed * (region.first - 1.5)
        steps = [s for s in request.config.search.measured_steps if s <= (request.stop_step or STEPS)]
        gained = [min(2.5, (0.6 + pace) * 0.35 * step) for step in steps]
        return tuple(CurvePoint(s, BASE_LOSS - g, leak * g) for s, g in zip(steps, gained, strict=True)), {
            "gen_kn": 0.4
        }

    def measure(self, request: TrialRequest) -> Measured:
        return Measured(5.0, 2.0, 3.0)


def run(config: Config, trainer: Trainer, **options: Any) -> tuple[Path, str, dict[str, Any]]:
    out = io.StringIO()
    folder = search(
        config,
        execute=trainer,
        start_proxy=lambda *_: None,
        measure=trainer.measure,
        console=Console(file=out, width=100),
        **options,
    )
    tree = folder / "tree.json"
    return folder, " ".join(out.getvalue().split()), json.loads(tree.read_text()) if tree.exists() else {}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a second each."""
    monkeypatch.setattr("cofitune.recipes.search.recipe.figure.can_draw", lambda: False)


def test_the_region_that_drifts_least_at_equal_loss_wins(settings: dict[str, Any]) -> None:
    trainer = Trainer()
    folder, shown, tree = run(load(settings), trainer)
    assert [r.config.search.measure for r in trainer.requests] == ["loss"] * 5
    assert read_winner(folder)[0] == "2-3", "the upper layers leak least"
    finished = {t["id"]: t for t in tree["trials"]}
    won = finished[tree["winner"]]
    common = tree["common_loss"]
    assert won["drift_at_common_loss"] == pytest.approx(0.1 * 3 * (BASE_LOSS - common))
    assert all(t["drift_at_common_loss"] >= won["drift_at_common_loss"] for t in finished.values())
    assert (tree["measure"], tree["unit"], tree["lower_is_better"]) == ("loss", "nats a token", True)
    assert "speciality" not in {k for k, v in won.items() if v is not None}, "there are no scores"
    assert "loss ↓" in shown and "nats a token, lower is better" in shown and "unified" not in shown
    assert "with the least drift at equal speciality loss of the" in shown
    assert "gen_kn +0.400 (-0.100)" in shown and "search.repeat: 2 finds out" in shown


def test_the_winners_file_has_losses_and_their_unit(settings: dict[str, Any]) -> None:
    folder, _, tree = run(load(settings), Trainer())
    content = yaml.safe_load((folder / "region.yaml").read_text(encoding="utf-8"))
    won = next(t for t in tree["trials"] if t["id"] == tree["winner"])
    assert content["losses"] == {
        "speciality_loss": won["speciality_loss"],
        "drift": won["drift"],
        "unit": "nats a token",
        "margins": {"gen_kn": 0.4},
    }
    assert "scores" not in content and "drift at equal speciality loss" in content["reason"]


def test_a_second_call_measures_nothing_and_says_the_same(settings: dict[str, Any]) -> None:
    folder, first, tree = run(load(settings), Trainer())
    again = Trainer()
    _, second, same = run(load(settings), again)
    assert not again.requests and same == tree
    assert second[second.index("region (layers") :] == first[first.index("region (layers") :]
    assert all(trial.curve for trial in read_trials(folder / "trials.jsonl"))
    with pytest.raises(UserError, match=r"losses is .*measured_steps.* there and None here|eval\."):
        run(searching(settings, measure="score"), Trainer())


@pytest.mark.parametrize(
    ("steps", "points", "expected"),
    [(60, 3, (15, 30, 60)), (7, 3, (2, 4, 7)), (4, 9, (1, 2, 4)), (16, 1, (16,)), (1, 3, (1,))],
)
def test_looks_are_at_the_end_at_half_and_at_a_quarter(steps: int, points: int, expected: tuple[int, ...]) -> None:
    assert Search(train_steps=steps, points=points).measured_steps == expected
    if steps == 60:  # a halving's are among them, and are no other search's
        halving = Search(train_steps=60, points=points, halving=Halving(steps=(20,)))
        assert halving.measured_steps == (15, 20, 30, 60) and halving.halved_steps == expected


@pytest.mark.parametrize(
    ("measure", "limit", "items"),
    [("loss", "auto", 32), ("score", "auto", 64), ("loss", 5, 5), ("score", None, None)],
)
def test_losses_need_fewer_items(settings: dict[str, Any], measure: str, limit: Any, items: int | None) -> None:
    plan = plan_search(searching(settings, measure=measure, limit=limit))
    (law,), (know,) = plan.measure.tasks.speciality, plan.measure.tasks.versatility.gen_kn
    assert (plan.measure.limit, law.limit, know.limit) == (items, items, items)
    config = trial_config(plan, plan.largest, plan.folder)
    assert config.search.items_for(plan.measure.kind) == items


def test_the_prefix_cache_is_planned_with_what_is_measured(settings: dict[str, Any]) -> None:
    taught = plan_search(searching(settings, prefix_cache="memory", measure="score")).prefix_bytes
    plan = plan_search(searching(settings, prefix_cache="memory"))
    data = read_train_data(plan.config.model, plan.config.data, (), Needs())
    items = read_loss_items(plan.measure.tasks, 64, data, plan.measure.limit)
    rehearsed = read_rehearsal(Path(settings["train"]["rehearsal"]["path"]))
    held_out = [rehearsed.items[place] for place in rehearsed.of(held_out=True)]
    measured = items.tokens + sum(len(item.prompt_ids) + len(item.answer_ids) for item in held_out)
    assert measured > 100 and plan.prefix_bytes == taught + measured * plan.anatomy.hidden_size * 4


def test_halving_compares_at_equal_loss_too(settings: dict[str, Any]) -> None:
    trainer = Trainer()
    config = searching(settings, halving={"steps": [3], "keep": 0.5})
    folder, shown, tree = run(config, trainer)
    assert {r.stop_step for r in trainer.requests if r.train} == {3, None}
    stopped = [t for t in tree["trials"] if t["status"] == "stopped"]
    assert [t["region"]["layers"] for t in stopped] == ["0-1", "2-3"] and all(len(t["curve"]) == 1 for t in stopped)
    assert read_winner(folder)[0] == "2-3" and "stopped after 3 steps: loss" in shown


def test_a_trial_without_its_last_measurement_fails(settings: dict[str, Any]) -> None:
    class Short(Trainer):
        def figures(self, request: TrialRequest) -> tuple[tuple[CurvePoint, ...], dict[str, float]]:
            curve, margins = super().figures(request)
            given = request.config.region
            broken = request.train and given is not None and given != "search" and given.layers == "0-1"
            return (curve[:-1] if broken else curve), margins

    _, shown, _ = run(load(settings), Short())
    assert "failed: it was not measured after 6 steps" in shown


def test_a_dry_run_says_what_is_measured_and_what_is_not(settings: dict[str, Any], rehearsal: Path) -> None:
    _, shown, _ = run(searching(settings, repeat=2), Trainer(), dry_run=True)
    assert f"measure: loss, since {rehearsal} holds out answers to measure drift on" in shown
    assert "the answers in search.eval.speciality" in shown
    assert "measure: loss asks nothing of follow, which would need generated answers" in shown
    assert "A step takes 2.00 s, measuring 3 s" in shown
    assert "Then the 4 best are trained with 1 further seed: 4 trials" in shown


def test_without_answers_to_measure_drift_on_scores_decide(settings: dict[str, Any]) -> None:
    settings["train"]["rehearsal"] = None
    plan = plan_search(load(settings))
    assert plan.measure.kind == "score" and "measure: score, since there are no held-out answers" in plan.notes[0]
    assert "losses" not in plan.identity
    with pytest.raises(ConfigError, match=r"search\.measure: loss cannot be taken: there are no held-out answers"):
        plan_search(searching(settings, measure="loss"))


def test_an_objective_of_scores_decides_by_scores(settings: dict[str, Any]) -> None:
    plan = plan_search(searching(settings, objective="versatility", floor=5.0))
    assert plan.measure.kind == "score" and "search.objective: versatility ranks by scores" in plan.notes[0]
    with pytest.raises(ConfigError, match="with measure: loss the drift at equal speciality loss decides"):
        searching(settings, objective="versatility", floor=5.0, measure="loss")


def test_validation_data_stand_in_for_the_test_items(settings: dict[str, Any]) -> None:
    """Without search.eval, the development items of training are nearer than the test's."""
    own = settings["search"].pop("eval")
    settings |= {"eval": own, "data": settings["data"] | {"validation": settings["data"]["train"]}}
    plan = plan_search(load(settings))
    assert plan.measure.validation and "the answers in data.validation" in plan.notes[0]
    assert plan.identity["losses"]["validation"] and "kn" in plan.identity["eval"]["tasks"]
    assert not any("flatters" in note for note in plan.notes)
    del settings["data"]["validation"]
    assert any("flatters" in note for note in plan_search(load(settings)).notes)


def test_development_items_that_do_not_fit_are_told(settings: dict[str, Any]) -> None:
    path = Path(settings["search"]["eval"]["speciality"][0]["path"])
    long = {"instruction": "Say " * 100, "output": "the buyer"}
    path.write_text(path.read_text() + json.dumps(long) + "\n")
    assert any("1 items do not fit into data.max_length" in note for note in plan_search(load(settings)).notes)
    path.write_text(json.dumps(long) + "\n")
    with pytest.raises(ConfigError, match="not one development item fits"):
        plan_search(load(settings))


def test_further_seeds_tell_how_sure_the_winner_is(settings: dict[str, Any]) -> None:
    trainer = Trainer(noise=0.01)
    _, shown, tree = run(searching(settings, repeat=3, repeat_regions=4), trainer)
    seeds = [r.config.train.seed for r in trainer.requests if r.train]
    assert sorted(seeds) == [11] * 4 + [12] * 4 + [13] * 4
    judged = tree["reliability"]
    assert judged["seeds"] == [11, 12, 13] and len(tree["repeats"]) == 8 and judged["standard_error"] > 0
    assert "3 seeds of the 4 leading regions: the rank correlation between seeds is" in shown
    assert "with the winner within it (95 %)" in shown
    assert "2-3 × up+down (seed 13): loss" in shown and "(seed 11)" not in shown
    assert {t["id"] for t in tree["trials"] if t["tied"]} == set(judged["tied"])
    assert "not known" not in shown
    again = Trainer(noise=0.01)
    assert run(searching(settings, repeat=3, repeat_regions=4), again)[2] == tree and not again.requests


def test_rounds_of_seeds_drop_what_is_worse_and_go_on_after_a_stop(settings: dict[str, Any]) -> None:
    """The three regions of the upper layers drift alike, and the lower layers' more."""
    rounds = {"repeat": "auto", "repeat_regions": 4, "repeat_most": 3}
    _, told, _ = run(searching(settings, **rounds), Trainer(), dry_run=True)
    assert "those of the 4 best that tie are trained with up to 2 further seeds: at most 8 trials" in told
    trainer = Trainer(noise=0.0001)
    folder, shown, tree = run(searching(settings, **rounds), trainer)
    seeds = [r.config.train.seed for r in trainer.requests if r.train]
    assert seeds == [11] * 4 + [12] * 4 + [13] * 3 and len(tree["repeats"]) == 7
    upper = {t["id"] for t in tree["trials"] if t["region"]["layers"] == "2-3"}
    assert set(tree["race"]["left"]) == upper and tree["winner"] in upper
    assert "Rounds of seeds over the 4 leading regions: 7 further trainings, up to 3 seeds a region, until 3" in shown
    assert "ended by search.repeat_most: 3" in shown and "2 of 3 other regions tie with the winner" in shown
    again = Trainer(noise=0.0001)
    assert run(searching(settings, **rounds), again)[2] == tree and not again.requests
    lines = (folder / "trials.jsonl").read_text().splitlines(keepends=True)
    (folder / "trials.jsonl").write_text("".join(lines[:-2]))  # it was killed before the last two
    assert run(searching(settings, **rounds), again)[2]["race"] == tree["race"] and len(again.requests) == 2


def test_rounds_of_seeds_end_with_the_budget(settings: dict[str, Any]) -> None:
    trainer = Trainer(noise=0.05)
    rounds = {"repeat": "auto", "repeat_regions": 4, "repeat_most": 9, "budget_trials": 9}
    _, shown, tree = run(searching(settings, **rounds), trainer)
    assert len([r for r in trainer.requests if r.train]) == 9 and len(tree["repeats"]) == 5
    assert tree["race"]["ended"] == "search.budget_trials: 9" and len(tree["race"]["left"]) > 1
    assert tree["winner"] in tree["race"]["left"] and "ended by search.budget_trials: 9" in shown


def test_the_winner_is_the_best_mean_over_the_seeds(settings: dict[str, Any]) -> None:
    class Lucky(Trainer):
        """The first seed flatters the upper layers."""

        def figures(self, request: TrialRequest) -> tuple[tuple[CurvePoint, ...], dict[str, float]]:
            curve, margins = super().figures(request)
            given = request.config.region
            assert given is not None and given != "search"
            unlucky = request.train and request.config.train.seed > 11 and (given.layers or "").startswith("2")
            return tuple(CurvePoint(p.steps, p.loss, p.drift * (9 if unlucky else 1)) for p in curve), margins

    config = searching(settings, levels=[{"layers": ["0-1", "2-3"]}], repeat=2, repeat_regions=2)
    folder, _, tree = run(config, Lucky())
    assert read_winner(folder)[0] == "0-1" and tree["runner_up"] != tree["winner"]
    first, _, _ = run(searching(settings, levels=[{"layers": ["0-1", "2-3"]}]), Lucky(), overwrite=True)
    assert read_winner(first)[0] == "2-3"


def test_halving_goes_on_from_a_search_without_it(settings: dict[str, Any]) -> None:
    run(load(settings), Trainer())
    again = Trainer()
    run(searching(settings, halving={"steps": [2], "keep": 0.5}), again)
    assert not again.requests, "what was trained to its end needs no rung"


@pytest.mark.parametrize("kind", ["loss", "score"])
def test_a_search_keeps_the_batches_that_it_began_with(
    settings: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings["search"]["measure"] = kind
    config = load(settings)

    def give(total: int) -> None:
        for module in (batches, planning):
            monkeypatch.setattr(module, "device_memory", lambda: DeviceMemory(total, None, True))

    give(2**40)
    begun = plan_search(config)
    assert begun.measure.tasks.batch_size == begun.identity["eval"]["batch_size"] == 64
    assert trial_config(begun, begun.largest, begun.folder).eval.batch_size == 64
    begun.folder.mkdir(parents=True)
    open_store(begun.folder, begun.identity)
    give(1)
    assert plan_search(config).measure.tasks.batch_size == 64
    assert plan_search(config, overwrite=True).measure.tasks.batch_size == 1
    assert plan_search(config, dry_run=True).measure.tasks.batch_size == 64
