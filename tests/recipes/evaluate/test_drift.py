"""`cofitune eval` on the base's own answers: the base's drift is nothing, a run's is told and enters no mean."""

from __future__ import annotations

import json
import re
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cofitune.config.load import dump_config
from cofitune.config.schema import Config, Train
from cofitune.errors import ArtifactError
from cofitune.model.weight_files import fingerprint
from cofitune.recipes.evaluate import recipe
from cofitune.recipes.rehearse.recipe import rehearse
from cofitune.rehearsal.items import read_rehearsal
from cofitune.training.delta import write_delta
from tests.helpers import write_jsonl

pytestmark = pytest.mark.processes

TOPICS = ("rain", "bread", "trains", "stars", "tea", "chess")
REPLACED = "model.layers.1.mlp.up_proj.weight"


class Place:
    """A config with a task of its own and one of drift, two trained runs, and what the recipe says."""

    def __init__(self, folder: Path, model: Path, rehearsal: Path) -> None:
        self.folder, self.model, self.rehearsal, self.said = folder, model, rehearsal, ""
        rows = [{"instruction": f"Who won case {i}?", "output": "the buyer"} for i in range(3)]
        write_jsonl(folder / "law.jsonl", rows)

    def config(self, run: str = "run", model: Path | None = None, **changes: Any) -> Config:
        law = {"path": str(self.folder / "law.jsonl"), "kind": "loss"}
        return Config.model_validate(
            {
                "model": {"name": str(model or self.model), "dtype": "float32"},
                "output_dir": str(self.folder / run),
                "eval": {"speciality": law, "drift": str(self.rehearsal), "batch_size": 2} | changes,
            }
        )

    def train(self, run: str, size: float) -> Path:
        """A run as training leaves it: one matrix replaced by what it was and some noise."""
        noise = torch.randn(48, 32, generator=torch.Generator().manual_seed(1))
        tensor = load_file(self.model / "model.safetensors")[REPLACED] + size * noise
        stood_on = {
            "base": str(self.model), "base_fingerprint": fingerprint(str(self.model)), "revision": None,
            "template": "chat", "trust_remote_code": False, "dtype": "float32",
        }  # fmt: skip
        folder = self.folder / run
        (folder / "train").mkdir(parents=True)
        write_delta(folder / "train", {REPLACED: tensor}, stood_on)
        config = self.config(run).model_copy(update={"train": Train(), "output_dir": str(folder)})
        (folder / "train/config.yaml").write_text(dump_config(config))
        return folder

    def evaluate(self, config: Config) -> dict[str, Any]:
        output = StringIO()
        folder = recipe.evaluate(config, console=Console(file=output, width=120, no_color=True)).folder
        self.said = output.getvalue()
        results: dict[str, Any] = json.loads((folder / "scores.json").read_text())
        return results


@pytest.fixture
def place(tmp_path: Path, tiny_model_folder: Path) -> Place:
    place = Place(tmp_path, tiny_model_folder, tmp_path / "base/rehearsal")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Tell me about {t}."}) + "\n" for t in TOPICS))
    requested = {"data": str(prompts), "max_new_tokens": 9, "max_repetition": 1.0, "top_k": 8, "held_out": 0.5}
    config = {"model": {"name": str(tiny_model_folder), "dtype": "float32"}, "output_dir": str(tmp_path / "base")}
    rehearse(Config.model_validate(config | {"rehearsal": requested}), console=Console(quiet=True))
    return place


def test_drift_of_each_model_is_told_with_an_interval_and_enters_no_mean(place: Place) -> None:
    place.train("run", 0.3)
    other = place.train("other", 3.0)
    scores = place.evaluate(place.config(models=[str(other)]))
    rehearsal = read_rehearsal(place.rehearsal)
    assert scores["tasks"]["drift"]["items"] == 3 and scores["tasks"]["drift"]["unit"] == "nats"
    assert abs(scores["models"]["base"]["tasks"]["drift"]["raw"]) <= 1e-5
    model = AutoModelForCausalLM.from_pretrained(place.model, dtype=torch.float32).eval()
    model.load_state_dict(load_file(other / "train/delta.safetensors"), strict=False)
    lost = tokens = 0.0
    for index in rehearsal.of(held_out=True):
        item = rehearsal.items[index]
        with torch.no_grad():
            logits = model(torch.tensor([[*item.prompt_ids, *item.answer_ids]])).logits[0]
        own = logits[len(item.prompt_ids) - 1 : -1].log_softmax(-1)
        now = own.gather(1, torch.tensor(item.answer_ids)[:, None])[:, 0]
        lost += float((rehearsal.log_probs_of(index) - now).sum())
        tokens += len(item.answer_ids)
    assert scores["models"]["other"]["tasks"]["drift"]["raw"] == pytest.approx(lost / tokens, abs=1e-5)
    for comparison in scores["comparisons"]:
        change = comparison["tasks"]["drift"]
        assert change["low"] <= change["value"] <= change["high"] and change["low"] < change["high"]
        assert change["lost"] == change["gained"] == [] and change["p_holm"] is None
        assert "drift" not in comparison["summary"]
    assert "drift" not in scores["models"]["other"]["categories"]
    assert "drift (nats a token)" in place.said
    without = place.evaluate(place.config("run", models=[str(other)], drift=[]))
    for name in ("base", "run", "other"):
        for key in ("categories", "versatility", "unified"):
            assert without["models"][name][key] == scores["models"][name][key]


def test_a_second_call_asks_no_model_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.train("run", 0.3)
    first = place.evaluate(place.config())

    def load(*_: Any, **__: Any) -> None:
        raise RuntimeError("weights were loaded")

    monkeypatch.setattr(recipe, "load_base", load)
    again = place.evaluate(place.config())
    assert again["models"] == first["models"] and again["comparisons"] == first["comparisons"]


def test_the_answers_of_another_base_are_refused(place: Place) -> None:
    changed = Path(shutil.copytree(place.model, place.folder / "changed"))
    weights = load_file(changed / "model.safetensors")
    weights[REPLACED] = weights[REPLACED] + 1
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"answers of another base .*run `cofitune rehearse` with this config"):
        place.evaluate(place.config(model=changed))


def test_a_folder_that_is_no_rehearsal_is_named(place: Place) -> None:
    with pytest.raises(ArtifactError, match=r"eval\.drift: no rehearsal in .*/nowhere; run `cofitune rehearse`"):
        place.evaluate(place.config(drift=str(place.folder / "nowhere")))


@pytest.mark.parametrize("alone", [False, True])
def test_a_dry_run_plans_what_needs_no_rehearsal_yet(place: Place, alone: bool) -> None:
    shutil.rmtree(place.rehearsal)
    config = place.config(speciality=[]) if alone else place.config()
    message = f"eval.drift: no rehearsal in {place.rehearsal}; run `cofitune rehearse` with this config first"
    with pytest.raises(ArtifactError, match=re.escape(message)):
        recipe.evaluate(config, console=Console(quiet=True))
    output = StringIO()
    facts: list[Any] = []
    recipe.evaluate(config, dry_run=True, console=Console(file=output, width=300), on_plan=facts.append)
    said = output.getvalue()
    assert f"still missing: {message}" in said and f"no finished training in {place.folder / 'run/train'}" in said
    assert [line.startswith(message) for line in facts[0]["missing"]] == [True, False]
    assert list(facts[0]["tasks"]) == ([] if alone else ["law"]) and not (place.folder / "run").exists()


def test_of_what_is_there_nothing_is_missing(place: Place) -> None:
    place.train("run", 0.01)
    output = StringIO()
    recipe.evaluate(place.config(), dry_run=True, console=Console(file=output, width=300))
    assert "still missing" not in output.getvalue()
