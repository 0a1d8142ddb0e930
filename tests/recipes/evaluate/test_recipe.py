"""`cofitune eval` from end to end on a tiny model: what is scored, what is kept, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from cofitune import cli
from cofitune.config.load import dump_config
from cofitune.config.schema import Config, Train
from cofitune.distributed import device_name
from cofitune.errors import ArtifactError, DataError, UserError
from cofitune.evaluation import lengths
from cofitune.evaluation import score as harness
from cofitune.files import exclusive, sha256_file
from cofitune.model.weight_files import fingerprint
from cofitune.recipes.evaluate import recipe
from cofitune.recipes.evaluate.plan import plan_eval
from cofitune.recipes.evaluate.recipe import Evaluation, evaluate
from cofitune.recipes.export import export
from cofitune.training.delta import write_delta
from tests.helpers import write_jsonl

pytestmark = pytest.mark.processes

CHOICES: list[dict[str, Any]] = [
    {"question": "Two plus two?", "choices": ["four", "three"], "answer": 0},
    {"question": "The capital of France?", "choices": ["Paris", "court", "hello"], "answer": 0},
]
LAW = [{"instruction": "Who won?", "input": f"Case {i}.", "output": "the buyer"} for i in range(3)]
REPLACED = "model.layers.1.mlp.up_proj.weight"
COMMA = {"key": 1, "prompt": "Hello.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}


class Place:
    """A folder with data files, a config that uses them, and what the recipe says."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model, self.said = folder, model, StringIO()
        self.write("law", LAW)
        self.write("know", CHOICES)
        self.write("follow", [COMMA])

    def write(self, name: str, items: list[dict[str, Any]]) -> None:
        write_jsonl(self.folder / f"{name}.jsonl", items)

    def config(self, **changes: Any) -> Config:
        data = str(self.folder)
        requested = {
            "speciality": {"path": f"{data}/law.jsonl", "kind": "generate", "max_new_tokens": 4},
            "versatility": {
                "gen_kn": {"path": f"{data}/know.jsonl", "kind": "multiple_choice", "metric": "acc_norm"},
                "instruct": {"path": f"{data}/follow.jsonl", "kind": "ifeval", "max_new_tokens": 4},
            },
            "batch_size": 2,
        }
        return Config.model_validate(
            {"model": {"name": str(self.model)}, "output_dir": f"{data}/run", "eval": requested | changes}
        )

    def evaluate(self, **options: Any) -> Evaluation:
        self.said.seek(0)
        self.said.truncate()
        console = Console(file=self.said, width=100, no_color=True)
        return evaluate(options.pop("config", None) or self.config(), console=console, **options)

    def scores(self) -> Any:
        return json.loads((self.folder / "run/eval/scores.json").read_text())

    def train(self, seed: int, run: str = "run", base: Path | None = None, **manifest: Any) -> Path:
        """A run as training leaves it: one matrix replaced, the manifest, the config."""
        base, folder = base or self.model, self.folder / run
        shape = load_file(base / "model.safetensors")[REPLACED].shape
        tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        stood_on = {"base": str(base), "base_fingerprint": fingerprint(str(base)), "revision": None, "template": "chat"}
        (folder / "train").mkdir(parents=True, exist_ok=True)
        write_delta(
            folder / "train", {REPLACED: tensor}, stood_on | {"trust_remote_code": False, "dtype": "float32"} | manifest
        )
        config = self.config().model_copy(update={"train": Train(seed=seed), "output_dir": str(folder)})
        (folder / "train/config.yaml").write_text(dump_config(config))
        return folder

    def copy_of_model(self, name: str) -> Path:
        """The model's folder once more, to be changed."""
        return Path(shutil.copytree(self.model, self.folder / name))


@pytest.fixture
def place(tmp_path: Path, tiny_model_folder: Path) -> Place:
    return Place(tmp_path, tiny_model_folder)


def forbid_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise RuntimeError("weights were loaded")

    monkeypatch.setattr(recipe, "load_base", load)


def record_scoring(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, list[str]]]:
    """What is scored, in order: a number that tells the weights apart (the replaced matrix's sum), and the tasks."""
    scored: list[tuple[float, list[str]]] = []
    score = recipe.score_model

    def listen(model: Any, request: Any, **rest: Any) -> Any:
        weights = float(model.model.layers[1].mlp.up_proj.weight.detach().sum())
        scored.append((round(weights, 3), [t.task.title for t in request.tasks]))
        return score(model, request, **rest)

    monkeypatch.setattr(recipe, "score_model", listen)
    return scored


def total(file: Path) -> float:
    """The replaced matrix's sum in a file of weights or a delta."""
    return round(float(load_file(file)[REPLACED].sum()), 3)


ALL = ["law", "know", "follow"]


def test_without_training_the_base_alone_is_scored_and_that_is_said(place: Place) -> None:
    folder = place.evaluate().folder
    scores = place.scores()
    assert folder == place.folder / "run/eval"
    assert "only the base was scored" in place.said.getvalue()
    assert list(scores["models"]) == ["base"] and scores["comparisons"] == []
    assert scores["missing"] == ["gen_rs"]
    base = scores["models"]["base"]
    assert base["categories"]["gen_rs"] is None
    know = scores["tasks"]["know"]
    assert (know["items"], know["metric"], know["chance"]) == (2, "acc_norm", pytest.approx(5 / 12))
    lines = (folder / "samples/base/know.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [s["line"] for s in samples] == [1, 2]
    assert base["tasks"]["know"]["raw"] == sum(s["score"] for s in samples) / 2
    assert all(len(s["log_likelihoods"]) == len(c["choices"]) for s, c in zip(samples, CHOICES, strict=True))
    assert {"line", "prompt", "reference", "answer", "score"} <= set(
        json.loads((folder / "samples/base/law.jsonl").read_text().splitlines()[0])
    )


def test_a_second_evaluation_is_refused_before_it_loads_weights(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_loading(monkeypatch)
    refused = pytest.raises(UserError, match="another evaluation is writing here")
    with exclusive(place.folder / "run/eval", recipe.WHAT), refused:
        place.evaluate()


def test_files_of_others_among_the_samples_stay(place: Place) -> None:
    place.evaluate()
    folder = place.folder / "run/eval"
    theirs = [folder / name for name in ("samples/base/mine.jsonl", "samples/notes.md", "changed/base/mine.txt")]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    place.evaluate(overwrite=True)
    assert all(path.exists() for path in theirs)


def test_every_model_is_scored_on_its_own_weights(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.train(1)
    other = place.train(2, "other")
    whole = export(place.train(3, "third"), place.folder / "whole", console=Console(quiet=True))
    models = [str(other), {"path": str(whole), "role": "full_sft"}]
    scored = record_scoring(monkeypatch)
    place.evaluate(config=place.config(models=models))
    base = total(place.model / "model.safetensors")
    deltas = [total(place.folder / run / "train/delta.safetensors") for run in ("run", "other", "third")]
    assert scored == [(value, ALL) for value in (base, *deltas)]
    scores = place.scores()
    assert list(scores["models"]) == ["base", "run", "other", "full_sft"]
    assert scores["models"]["run"]["delta_sha256"] == sha256_file(place.folder / "run/train/delta.safetensors")
    assert scores["models"]["full_sft"]["delta_sha256"] is None
    asked = {name: read_samples(place, name) for name in scores["models"]}
    assert len({json.dumps([s["log_likelihoods"] for s in samples]) for samples in asked.values()}) == 4
    assert len({json.dumps([s["prompt"] for s in samples]) for samples in asked.values()}) == 1
    pairs = [(c["model"], c["against"]) for c in scores["comparisons"]]
    assert pairs == [
        ("run", "base"),
        ("other", "base"),
        ("full_sft", "base"),
        ("run", "full_sft"),
        ("other", "full_sft"),
    ]


def read_samples(place: Place, model: str, task: str = "know") -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (place.folder / f"run/eval/samples/{model}/{task}.jsonl").read_text().splitlines()
    ]


def test_an_exported_run_gives_the_runs_own_answers(place: Place) -> None:
    whole = export(place.train(1), place.folder / "whole", console=Console(quiet=True))
    place.evaluate(config=place.config(models=f"exported={whole}"))
    assert read_samples(place, "exported") == read_samples(place, "run") != read_samples(place, "base")
    models = place.scores()["models"]
    assert models["run"]["categories"] == models["exported"]["categories"]


def test_a_second_call_loads_nothing_and_a_new_delta_scores_the_run_only(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.train(1)
    place.evaluate()
    first = place.scores()
    with monkeypatch.context() as patch:
        forbid_loading(patch)
        (place.folder / "run/train/delta.safetensors").rename(place.folder / "away")  # a search frees its trials' disk
        place.evaluate()
        assert "6 of 6 results as scored before" in place.said.getvalue()
        assert "unified" in place.said.getvalue()
        assert place.scores() == first
        (place.folder / "away").rename(place.folder / "run/train/delta.safetensors")
        with pytest.raises(RuntimeError, match="weights were loaded"):
            place.evaluate(overwrite=True)
    place.evaluate()
    place.train(2)
    scored = record_scoring(monkeypatch)
    place.evaluate()
    assert scored == [(total(place.folder / "run/train/delta.safetensors"), ALL)]


def test_a_new_task_or_model_is_all_that_is_scored(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.train(1)
    general = {"gen_kn": {"path": f"{place.folder}/know.jsonl", "kind": "multiple_choice", "metric": "acc_norm"}}
    place.evaluate(config=place.config(versatility=general))
    scored = record_scoring(monkeypatch)
    place.evaluate()
    base, run = total(place.model / "model.safetensors"), total(place.folder / "run/train/delta.safetensors")
    assert scored == [(base, ["follow"]), (run, ["follow"])]
    scored.clear()
    other = place.train(2, "other")
    place.evaluate(config=place.config(models=str(other)))
    assert scored == [(total(other / "train/delta.safetensors"), ALL)]
    scored.clear()
    renamed = {"gen_rs": general["gen_kn"] | {"name": "reasoning"}}  # a name and a category are the reader's
    place.evaluate(config=place.config(versatility=renamed))
    assert scored == [] and place.scores()["models"]["run"]["categories"]["gen_kn"] is None


def test_answers_are_kept_under_the_device_and_the_code_that_gave_them(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_eval(place.config())
    key = plan.key(plan.models[0], plan.tasks[0])
    settings = key["settings"]
    assert isinstance(settings, dict)
    assert settings["device"] == device_name() and settings["versions"]["tokenizers"]
    config = place.config()
    trusting = config.model_copy(update={"model": config.model.model_copy(update={"trust_remote_code": True})})
    other = plan_eval(trusting)
    assert other.key(other.models[0], other.tasks[0]) != key
    monkeypatch.setattr("cofitune.recipes.evaluate.plan.device_name", lambda: "NVIDIA H100")
    other = plan_eval(config)
    assert other.key(other.models[0], other.tasks[0]) != key
    assert other.agreed() == plan.agreed(), "GPUs of several models may share the work"


def test_no_model_is_served_anothers_answers(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = place.train(1), place.train(2, "other")
    place.evaluate(config=place.config(models=str(other)))
    before = {name: read_samples(place, name) for name in ("run", "other")}
    for part in ("delta.safetensors", "manifest.json"):  # swap the two runs' contents
        one, two = mine / "train" / part, other / "train" / part
        one.rename(place.folder / "between")
        two.rename(one)
        (place.folder / "between").rename(two)
    forbid_loading(monkeypatch)
    place.evaluate(config=place.config(models=str(other)))
    assert read_samples(place, "run") == before["other"] and read_samples(place, "other") == before["run"]


def test_weights_edited_in_place_are_scored_anew_at_equal_size_and_time(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.model = place.copy_of_model("base")
    place.evaluate()
    file = place.model / "model.safetensors"
    status = file.stat()
    tensors = load_file(file)
    tensors[REPLACED] = tensors[REPLACED].flip(0).contiguous() * 3
    save_file(tensors, file, {"format": "pt"})
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    scored = record_scoring(monkeypatch)
    place.evaluate()
    assert scored == [(total(file), ALL)]


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 1},
        {"speciality": {"path": "law.jsonl", "kind": "generate", "max_new_tokens": 4, "limit": 2}},
        {"dtype": "bfloat16"},
        {"template": "plain"},
    ],
)
def test_other_settings_are_other_answers(place: Place, monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    place.evaluate()
    monkeypatch.chdir(place.folder)
    config = place.config(**{k: v for k, v in change.items() if k in ("batch_size", "speciality")})
    if "dtype" in change:
        config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    if "template" in change:
        config = config.model_copy(update={"data": config.data.model_copy(update={"template": "plain"})})
    config = config.model_copy(update={"output_dir": str(place.folder / "again")})
    shutil.copytree(place.folder / "run/eval/cache", place.folder / "again/eval/cache")
    scored = record_scoring(monkeypatch)
    place.evaluate(config=config)
    assert [tasks for _, tasks in scored] == [["law"] if "speciality" in change else ALL]


def test_an_interrupted_evaluation_goes_on_with_the_next_unfinished_task(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.train(1)
    ask = harness._score_task

    def interrupt(judge: Any, loaded: Any, asked: Any) -> Any:
        if loaded.task.title == "know" and float(judge.model.model.layers[1].mlp.up_proj.weight.detach().sum()) != base:
            raise KeyboardInterrupt
        return ask(judge, loaded, asked)

    base = float(load_file(place.model / "model.safetensors")[REPLACED].sum())
    with monkeypatch.context() as patch:
        patch.setattr(harness, "_score_task", interrupt)
        with pytest.raises(KeyboardInterrupt):
            place.evaluate()
    assert not (place.folder / "run/eval/scores.json").exists()
    scored = record_scoring(monkeypatch)
    place.evaluate()
    assert scored == [(total(place.folder / "run/train/delta.safetensors"), ["know", "follow"])]
    assert list(place.scores()["models"]) == ["base", "run"]


def test_changed_data_is_scored_anew(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.evaluate()
    picked = read_samples(place, "base")[0]["pick"]
    scored = record_scoring(monkeypatch)
    for answer in (1 - picked, picked):
        place.write("know", [CHOICES[0] | {"answer": answer}])
        place.evaluate()
        assert place.scores()["models"]["base"]["tasks"]["know"]["raw"] == int(answer == picked)
    assert [tasks for _, tasks in scored] == [["know"], ["know"]]


def test_answers_that_were_edited_are_not_believed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.evaluate()
    first = place.scores()["models"]["base"]["tasks"]
    for file in (place.folder / "run/eval/cache").glob("*/answers.jsonl"):
        file.write_text(file.read_text().replace('"score": 0', '"score": 1'))
    scored = record_scoring(monkeypatch)
    place.evaluate()
    assert scored
    again = place.scores()["models"]["base"]["tasks"]
    assert {t: v["raw"] for t, v in again.items()} == {t: v["raw"] for t, v in first.items()}


def test_lost_and_gained_items_are_written_with_their_text(place: Place) -> None:
    place.train(1)
    place.evaluate()
    before, after = read_samples(place, "base"), read_samples(place, "run")
    for what, sign in (("lost", -1), ("gained", 1)):
        lines = (place.folder / f"run/eval/changed/run/{what}.jsonl").read_text().splitlines()
        results = [e for e in map(json.loads, lines) if e["task"] == "know"]
        requested = [i for i in range(2) if after[i]["score"] - before[i]["score"] == sign]
        assert [e["line"] for e in results] == [i + 1 for i in requested]
        for entry, i in zip(results, requested, strict=True):
            assert CHOICES[i]["question"] in entry["prompt"] and entry["choices"] == CHOICES[i]["choices"]
            assert (entry["before"]["pick"], entry["after"]["pick"]) == (before[i]["pick"], after[i]["pick"])


def test_runs_that_differ_by_their_seed_give_the_noise_floor(place: Place) -> None:
    place.train(1)
    again = place.train(2, "again")
    place.evaluate(config=place.config(models=str(again)))
    noise = place.scores()["noise_floor"]
    assert noise["runs"] == [["run", "again"]] and set(noise["scores"]["summary"]) >= {"speciality", "versatility"}
    another = place.train(3, "again", steps=7)
    place.evaluate(config=place.config(models=str(another)))
    assert place.scores()["noise_floor"]["scores"] is None
    place.train(2, "again")  # the same files, and another share of one of them
    saved = place.folder / "again/train/config.yaml"
    saved.write_text(saved.read_text().replace("train: []", "train: [{path: law.jsonl, weight: 0.5}]"))
    assert "weight: 0.5" in saved.read_text()
    place.evaluate(config=place.config(models=str(again)))
    assert place.scores()["noise_floor"]["scores"] is None


def test_a_run_of_another_base_brings_its_own(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    base = place.copy_of_model("second")
    tensors = load_file(base / "model.safetensors")
    tensors[REPLACED] = tensors[REPLACED] * 2
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    other = place.train(1, "other", base=base)
    scored = record_scoring(monkeypatch)
    loaded: list[str] = []
    load = recipe.load_base

    def listen(model: Any, **options: Any) -> Any:
        loaded.append(model.name)
        return load(model, **options)

    monkeypatch.setattr(recipe, "load_base", listen)
    place.evaluate(config=place.config(models=[str(other), str(base)]))
    assert loaded == [str(place.model), str(base)]
    assert [value for value, _ in scored] == [
        total(place.model / "model.safetensors"), total(other / "train/delta.safetensors"),
        total(base / "model.safetensors"),
    ]  # fmt: skip


def test_the_gate_holds_the_change_against_the_base(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.train(1)
    assert place.evaluate(require=["versatility>=-100", "know<=200"]).met
    assert "met     run:versatility>=-100: the change is" in place.said.getvalue()
    forbid_loading(monkeypatch)
    done = place.evaluate(require=["versatility>=-100", "run:speciality>=+99"])
    assert not done.met and [v.met for v in done.verdicts] == [True, False]
    assert "NOT MET run:speciality>=+99" in place.said.getvalue()
    assert [v["met"] for v in place.scores()["gate"]] == [True, False]


def test_exit_codes_of_the_gate(place: Place, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    other = place.train(1, "other")
    (place.folder / "c.yaml").write_text(dump_config(place.config()))

    def exit_code(*words: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["cofitune", "eval", str(place.folder / "c.yaml"), *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code

    given = ("--model", f"mine={other}", "--require", "versatility>=-100")
    assert exit_code(*given) == 0
    assert list(place.scores()["models"]) == ["base", "mine"]
    forbid_loading(monkeypatch)
    assert exit_code(*given, "--require", "mine:versatility.low>=+200") == 3
    assert "NOT MET mine:versatility.low>=+200" in capsys.readouterr().out
    assert exit_code(*given, "--require", "versatility>") == 2
    assert "write [MODEL:]SCORE>=POINTS" in capsys.readouterr().err
    assert exit_code("--full-sft", str(other), "eval.models=[{path: x, role: full_sft}]") == 2
    assert exit_code("eval.models=[{path: x, role: base}, {path: y, role: base}]") == 2
    assert "one model has the role base, not 2 (x, y)" in capsys.readouterr().err


def test_dry_run_shows_the_tasks_and_writes_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_loading(monkeypatch)
    before = sorted(place.folder.rglob("*"))
    place.evaluate(dry_run=True)
    output = place.said.getvalue()
    assert sorted(place.folder.rglob("*")) == before
    for words in ("gen_kn", "multiple_choice", "acc_norm", "512 positions", "base"):
        assert words in output
    assert "scores.json" in output and "the same command continues" in output
    place.evaluate(dry_run=True, overwrite=True)
    assert "the same command without --overwrite continues" in place.said.getvalue()


@pytest.mark.parametrize("dry_run", [False, True])
def test_user_mistakes_are_told_before_weights_load(
    place: Place, monkeypatch: pytest.MonkeyPatch, dry_run: bool
) -> None:
    forbid_loading(monkeypatch)
    with pytest.raises(UserError, match="no model to compare with the base"):
        place.evaluate(require=["versatility>=1"], dry_run=dry_run)
    with pytest.raises(UserError, match="eval: names no task"):
        place.evaluate(config=place.config(speciality=[], versatility={}), dry_run=dry_run)
    place.write("know", [{"question": "?", "choices": ["a", "b"], "answer": 9}])
    with pytest.raises(DataError, match=r"know\.jsonl:1: 'answer' must be"):
        place.evaluate(dry_run=dry_run)
    place.write("know", [{"question": "long " * 600, "choices": ["a", "b"], "answer": 0}])
    with pytest.raises(DataError, match=r"know\.jsonl: no item of task 'know' fits"):
        place.evaluate(dry_run=dry_run)


def test_models_that_would_be_asked_otherwise_are_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_loading(monkeypatch)
    template = place.copy_of_model("template")
    tokenizer = AutoTokenizer.from_pretrained(template)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "bot")
    tokenizer.save_pretrained(template)
    with pytest.raises(UserError, match="side by side: 'template' .*template_sha256 is"):
        place.evaluate(config=place.config(models=str(template)))
    words = place.copy_of_model("words")
    text = json.loads((words / "tokenizer.json").read_text())
    text["model"]["merges"] = text["model"]["merges"][:-20]
    (words / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(UserError, match="'words' .*tokenizer_sha256 is .*: the tokenizer is another one"):
        place.evaluate(config=place.config(models=str(words)))
    ends = place.copy_of_model("ends")
    generation = json.loads((ends / "generation_config.json").read_text())
    (ends / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [5, 7]}))
    with pytest.raises(UserError, match="'ends' .*end_tokens is .5, 7"):
        place.evaluate(config=place.config(models=str(ends)))
    plain = place.train(1, "plain", template="plain")
    with pytest.raises(UserError, match="trained under the template 'plain' and would be asked in 'chat'"):
        place.evaluate(config=place.config(models=str(plain)))


def test_weights_rounded_more_than_the_bases_are_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    rounded = export(place.train(1, "one"), place.folder / "rounded", dtype="bfloat16", console=Console(quiet=True))
    with monkeypatch.context() as patch:
        forbid_loading(patch)
        with pytest.raises(
            UserError, match="'rounded' .* are in bfloat16, those of 'base' .* in float32; model.dtype="
        ):
            place.evaluate(config=place.config(models=str(rounded)))
        other = place.train(2, "other", dtype="bfloat16")
        with pytest.raises(UserError, match="'other' .* are in bfloat16"):
            place.evaluate(config=place.config(models=str(other)))
    in_bf16 = {"model": place.config().model.model_copy(update={"dtype": "bfloat16"})}
    place.evaluate(config=place.config(models=str(rounded)).model_copy(update=in_bf16))
    place.model = rounded  # a base in bfloat16 beside a run in float32: both as their weights are
    place.evaluate(config=place.config(models=str(place.train(3, "fine"))), overwrite=True)


def test_a_changed_prompt_is_asked_anew(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.evaluate()
    ask = lengths.ask_item
    monkeypatch.setattr(lengths, "ask_item", lambda *given: replace(ask(*given), prompt="another"))
    scored = record_scoring(monkeypatch)
    place.evaluate()
    assert [titles for _, titles in scored] == [ALL]


def test_a_run_that_learned_to_think_is_left_to_think(place: Place) -> None:
    place.train(1, items=[{"kept": 3, "reasoning": 2}])
    with pytest.raises(UserError, match=r"learned to think .*2 of 3 items.*set eval\.think_end_token"):
        plan_eval(place.config())
    thinking = place.config().eval.model_copy(update={"think_end_token": "</think>"})
    plan = plan_eval(place.config().model_copy(update={"eval": thinking}))
    assert {task.task.think_end_token for task in plan.tasks} == {"</think>"}


def test_a_run_under_other_settings_of_the_template_is_refused(place: Place) -> None:
    settings = {"kwargs": {"enable_thinking": False}, "system": "keep", "day": None, "sha256": "0" * 64}
    place.train(1, chat_template=settings)
    with pytest.raises(UserError, match=r"other settings of its chat template .*'enable_thinking': False"):
        plan_eval(place.config())


def test_weights_that_give_no_numbers_are_named(place: Place) -> None:
    broken = place.copy_of_model("broken")
    tensors = load_file(broken / "model.safetensors")
    save_file(tensors | {REPLACED: torch.full((48, 32), torch.nan)}, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"'broken' .* no numbers \(task 'know'\).*did its training diverge"):
        place.evaluate(config=place.config(models=str(broken)))


def test_models_that_cannot_be_used_are_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_loading(monkeypatch)
    empty = place.folder / "empty"
    empty.mkdir()
    run = place.train(1, "one")
    edited = place.train(2, "edited")
    tensor = {REPLACED: torch.zeros(48, 32)}
    save_file(tensor, edited / "train/delta.safetensors")
    for models, words in (
        ([str(empty)], "neither a run whose training has finished"),
        ([str(place.folder / "nowhere")], "is not there"),
        ([f"run={run}", f"RUN={place.model}"], "two models are called 'RUN'"),
        ([f"base={run}"], "two models are called 'base'"),
        ([f"a/b={run}"], "'a/b' cannot be a name"),
        ([str(edited)], "its bytes are not those that the manifest names"),
    ):
        with pytest.raises(UserError, match=words):
            place.evaluate(config=place.config(models=models))


def test_a_delta_of_another_base_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_loading(monkeypatch)
    (place.folder / "run/train").mkdir(parents=True)
    write_delta(place.folder / "run/train", {"x": torch.zeros(1)}, {"base": "other", "base_fingerprint": "0" * 64})
    with pytest.raises(ArtifactError, match="trained from another model"):
        place.evaluate()


def test_a_folder_of_another_model_is_refused_unless_overwritten(place: Place) -> None:
    place.evaluate()
    other = place.copy_of_model("other")
    place.model = other
    with pytest.raises(UserError, match=r"model.name is .* there and .* here"):
        place.evaluate()
    place.evaluate(overwrite=True)
    assert place.scores()["models"]["base"]["path"] == str(other)
