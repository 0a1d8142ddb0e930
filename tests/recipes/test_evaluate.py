"""`cofitune eval` from end to end on a tiny model: what is scored, what is kept, what is refused."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from cofitune.config.schema import Config
from cofitune.errors import ArtifactError, DataError, UserError
from cofitune.model.load import fingerprint
from cofitune.recipes import evaluate as recipe
from cofitune.recipes.evaluate import evaluate
from cofitune.training.delta import write_delta

CHOICES: list[dict[str, Any]] = [
    {"question": "Two plus two?", "choices": ["four", "three"], "answer": 0},
    {"question": "The capital of France?", "choices": ["Paris", "court", "hello"], "answer": 0},
]
LAW = [{"instruction": "Who won?", "input": f"Case {i}.", "output": "the buyer"} for i in range(3)]
COMMA = {"key": 1, "prompt": "Hello.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}


class Place:
    """A folder with data files, a config that uses them, and what the recipe says."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model, self.said = folder, model, StringIO()
        self.write("law", LAW)
        self.write("know", CHOICES)
        self.write("follow", [COMMA])

    def write(self, name: str, items: list[dict[str, Any]]) -> None:
        (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(i) + "\n" for i in items))

    def config(self, **changes: Any) -> Config:
        data = str(self.folder)
        wanted = {
            "speciality": {"path": f"{data}/law.jsonl", "kind": "generate", "max_new_tokens": 4},
            "versatility": {
                "gen_kn": {"path": f"{data}/know.jsonl", "kind": "multiple_choice", "metric": "acc_norm"},
                "instruct": {"path": f"{data}/follow.jsonl", "kind": "ifeval", "max_new_tokens": 4},
            },
            "batch_size": 2,
        }
        return Config.model_validate(
            {"model": {"name": str(self.model)}, "output_dir": f"{data}/run", "eval": wanted | changes}
        )

    def evaluate(self, **options: Any) -> Path:
        self.said.seek(0)
        self.said.truncate()
        console = Console(file=self.said, width=100, no_color=True)
        return evaluate(options.pop("config", None) or self.config(), console=console, **options)

    def scores(self) -> Any:
        return json.loads((self.folder / "run/eval/scores.json").read_text())

    def train(self, seed: int) -> None:
        """A delta as training leaves it: one matrix replaced."""
        name = "model.layers.1.mlp.up_proj.weight"
        weight = load_file(self.model / "model.safetensors")[name]
        tensor = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        manifest = {"base": "tiny", "base_fingerprint": fingerprint(str(self.model))}
        (self.folder / "run/train").mkdir(parents=True, exist_ok=True)
        write_delta(self.folder / "run/train", {name: tensor}, manifest)


@pytest.fixture
def place(tmp_path: Path, tiny_model_folder: Path) -> Place:
    return Place(tmp_path, tiny_model_folder)


def forbid_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise RuntimeError("weights were loaded")

    monkeypatch.setattr(recipe, "load_base", load)


def record_scoring(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A number for each scored model that tells the base from a run: the sum of what the delta replaces."""
    scored: list[float] = []
    score = recipe.score_model

    def listen(model: Any, *arguments: Any) -> Any:
        scored.append(float(model.model.layers[1].mlp.up_proj.weight.detach().sum()))
        return score(model, *arguments)

    monkeypatch.setattr(recipe, "score_model", listen)
    return scored


def test_without_training_the_base_alone_is_scored_and_that_is_said(place: Place) -> None:
    folder = place.evaluate()
    scores = place.scores()
    assert folder == place.folder / "run/eval"
    assert "only the base was scored" in place.said.getvalue()
    assert scores["run"] is None and scores["changes"] is None
    assert scores["missing"] == ["gen_rs"]
    assert scores["base"]["categories"]["gen_rs"] is None
    know = scores["tasks"]["know"]
    assert (know["items"], know["metric"], know["chance"]) == (2, "acc_norm", pytest.approx(5 / 12))
    lines = (folder / "samples/base/know.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [s["line"] for s in samples] == [1, 2]
    assert scores["base"]["tasks"]["know"]["raw"] == sum(s["score"] for s in samples) / 2
    assert all(len(s["log_likelihoods"]) == len(c["choices"]) for s, c in zip(samples, CHOICES, strict=True))
    assert set(json.loads((folder / "samples/base/law.jsonl").read_text().splitlines()[0])) == {
        "line", "prompt", "reference", "answer", "score"
    }  # fmt: skip


def test_base_and_run_are_scored_on_one_model_before_and_after_the_delta(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.train(seed=1)
    scored = record_scoring(monkeypatch)
    place.evaluate()
    base = load_file(place.model / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    run = load_file(place.folder / "run/train/delta.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert scored == pytest.approx([float(base.sum()), float(run.sum())], abs=1e-4)
    scores = place.scores()
    manifest = json.loads((place.folder / "run/train/manifest.json").read_text())
    assert scores["run"]["delta_sha256"] == manifest["delta_sha256"]
    before, after = (
        [json.loads(line) for line in (place.folder / f"run/eval/samples/{m}/know.jsonl").read_text().splitlines()]
        for m in ("base", "run")
    )
    assert [s["prompt"] for s in before] == [s["prompt"] for s in after]
    assert [s["log_likelihoods"] for s in before] != [s["log_likelihoods"] for s in after]
    assert "speciality 0.0, versatility" in place.said.getvalue()
    gained = scores["run"]["categories"]["speciality"] - scores["base"]["categories"]["speciality"]
    assert scores["changes"]["spec_gain"] == gained


def test_a_second_call_loads_no_weights_and_a_new_delta_scores_the_run_only(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.train(seed=1)
    place.evaluate()
    first = place.scores()
    with monkeypatch.context() as patch:
        forbid_loading(patch)
        place.evaluate()
        assert "is finished already" in place.said.getvalue()
        assert "unified" in place.said.getvalue()
        assert place.scores() == first
        with pytest.raises(RuntimeError, match="weights were loaded"):
            place.evaluate(overwrite=True)
    place.evaluate()
    place.train(seed=2)
    scored = record_scoring(monkeypatch)
    place.evaluate()
    assert len(scored) == 1
    assert place.scores()["base"] != {} and place.scores()["run"]["delta_sha256"] != first["run"]["delta_sha256"]


def test_an_interrupted_evaluation_keeps_the_base(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.train(seed=1)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "apply_delta", interrupt)
        with pytest.raises(KeyboardInterrupt):
            place.evaluate()
    base = place.scores()["base"]
    scored = record_scoring(monkeypatch)
    place.evaluate()
    assert len(scored) == 1
    assert place.scores()["base"] == base
    assert place.scores()["run"] is not None


def test_an_interruption_leaves_no_old_scores_beside_new_samples(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.evaluate()
    place.write("know", CHOICES[:1])

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "score_model", interrupt)
        with pytest.raises(KeyboardInterrupt):
            place.evaluate()
    place.write("know", CHOICES)
    scored = record_scoring(monkeypatch)
    place.evaluate()
    assert len(scored) == 1


def test_changed_data_is_scored_anew_and_that_is_said(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.evaluate()
    picked = json.loads((place.folder / "run/eval/samples/base/know.jsonl").read_text().splitlines()[0])["pick"]
    place.write("know", [CHOICES[0] | {"answer": 1 - picked}])
    place.evaluate()
    assert "scored anew, because tasks.know changed" in place.said.getvalue()
    assert place.scores()["base"]["tasks"]["know"]["raw"] == 0
    place.write("know", [CHOICES[0] | {"answer": picked}])
    place.evaluate()
    assert place.scores()["base"]["tasks"]["know"]["raw"] == 1


def test_dry_run_shows_the_tasks_and_writes_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_loading(monkeypatch)
    before = sorted(place.folder.rglob("*"))
    place.evaluate(dry_run=True)
    said = place.said.getvalue()
    assert sorted(place.folder.rglob("*")) == before
    for words in ("gen_kn", "multiple_choice", "acc_norm", "512 positions", "run      no finished training yet"):
        assert words in said
    assert "scores.json" in said


@pytest.mark.parametrize("dry_run", [False, True])
def test_user_mistakes_are_told_before_weights_load(
    place: Place, monkeypatch: pytest.MonkeyPatch, dry_run: bool
) -> None:
    forbid_loading(monkeypatch)
    with pytest.raises(UserError, match="eval: names no task"):
        place.evaluate(config=place.config(speciality=[], versatility={}), dry_run=dry_run)
    place.write("know", [{"question": "?", "choices": ["a", "b"], "answer": 9}])
    with pytest.raises(DataError, match=r"know\.jsonl:1: 'answer' must be"):
        place.evaluate(dry_run=dry_run)
    place.write("know", [{"question": "long " * 600, "choices": ["a", "b"], "answer": 0}])
    with pytest.raises(DataError, match=r"know\.jsonl: no item of task 'know' fits"):
        place.evaluate(dry_run=dry_run)


def test_a_delta_of_another_base_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_loading(monkeypatch)
    (place.folder / "run/train").mkdir(parents=True)
    write_delta(place.folder / "run/train", {"x": torch.zeros(1)}, {"base": "other", "base_fingerprint": "0" * 64})
    with pytest.raises(ArtifactError, match="trained from another model"):
        place.evaluate()


def test_another_config_is_refused_unless_overwritten(place: Place) -> None:
    place.evaluate()
    with pytest.raises(UserError, match=r"eval.batch_size is 2 there and 1 here"):
        place.evaluate(config=place.config(batch_size=1))
    place.evaluate(config=place.config(batch_size=1), overwrite=True)
    assert place.scores()["settings"]["batch_size"] == 1
