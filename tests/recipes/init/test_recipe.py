"""`cofitune init`: it looks, asks for what is missing, and writes a config that a dry run takes; never over a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cofitune.config.load import load_config
from cofitune.errors import UserError
from cofitune.recipes.init.look import ModelFacts
from cofitune.recipes.init.recipe import InitOptions, init, name_of
from cofitune.recipes.init.template import size_note
from tests.helpers import run_command, write_jsonl

ITEM = {"instruction": "Is the contract void?", "output": "Yes, it is void."}


@pytest.fixture
def folder(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a model, own data, a test beside it, and general prompts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(tiny_model_folder)
    write_jsonl(tmp_path / "law_train.jsonl", [ITEM] * 40)
    write_jsonl(tmp_path / "law_test.jsonl", [ITEM] * 3)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Name {n} rivers."} for n in range(2, 9)])
    return tmp_path


def quiet(**options: Any) -> Path:
    return init(InitOptions(**options), overwrite=False, ask=None, console=Console(quiet=True))[0]


@pytest.mark.parametrize("general", [["--general", "prompts.jsonl"], []])
def test_what_is_written_passes_a_dry_run(
    folder: Path, general: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "init", "--model", "model", "--data", "law_train.jsonl", *general) == 0
    said = capsys.readouterr().out
    assert "40 items" in said and "3 items of kind generate in law_test.jsonl" in said and "law.yaml" in said
    assert run_command(monkeypatch, "config", "validate", "law.yaml") == 0
    assert run_command(monkeypatch, "train", "law.yaml", "--dry-run") == 0
    assert run_command(monkeypatch, "rehearse", "law.yaml", "--dry-run") == 0
    capsys.readouterr()
    assert run_command(monkeypatch, "eval", "law.yaml", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "law_test" in said and "still missing: eval.drift: no rehearsal in runs/law/rehearsal; run `cofitune" in said
    assert "still missing: no finished training in runs/law/train; run `cofitune train`" in said
    assert not (folder / "runs").exists()
    config = load_config("law.yaml")
    assert config.output_dir == "runs/law" and config.data.max_length == 256, "a rehearsed answer of 96 tokens has room"
    assert bool(config.rehearsal.self_prompted) != bool(general)


def test_a_file_that_is_there_is_never_replaced_unasked(folder: Path) -> None:
    quiet(model="model", data="law_train.jsonl")
    (folder / "law.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"law\.yaml: is there already; choose another name with --to"):
        quiet(model="model", data="law_train.jsonl")
    assert (folder / "law.yaml").read_text() == "mine"
    options = InitOptions(model="model", data="law_train.jsonl", task="my task")
    assert init(options, overwrite=True, ask=None, console=Console(quiet=True))[0].name == "my-task.yaml"


def test_what_is_missing_is_asked_on_a_terminal(folder: Path) -> None:
    answers = iter(["model", "law_train.jsonl", "prompts.jsonl"])
    asked: list[str] = []

    def ask(question: str) -> str:
        asked.append(question)
        return next(answers)

    [path] = init(InitOptions(), overwrite=False, ask=ask, console=Console(quiet=True))
    assert len(asked) == 3 and load_config(path).rehearsal.data[0].path == "prompts.jsonl"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--model and --data are missing, and there is no terminal"),
        ({"model": "model", "data": "none.jsonl"}, "none.jsonl: no such data file"),
        ({"model": "modell", "data": "law_train.jsonl"}, "modell"),
        ({"model": "model", "data": "prompts.jsonl"}, "--data prompts.jsonl:1: "),
        ({"model": "model", "data": "law_train.jsonl", "general": "none.jsonl"}, "none.jsonl: no such data file"),
        ({"model": "model", "data": "law_train.jsonl", "test": "prompts.jsonl"}, "fit no kind of task"),
        ({"template": "70b", "data": "law_train.jsonl"}, "no such template; did you mean '7b'?"),
    ],
)
def test_a_mistake_is_one_message_and_nothing_is_written(folder: Path, options: dict[str, Any], message: str) -> None:
    before = sorted(folder.iterdir())
    with pytest.raises(UserError) as error:
        quiet(**options)
    assert message in str(error.value) and sorted(folder.iterdir()) == before


@pytest.mark.parametrize("template", ["7b", "13b", "small", "slurm"])
def test_a_template_goes_by_its_name_and_holds_the_users_files(folder: Path, template: str) -> None:
    path = quiet(template=template, data="law_train.jsonl", general="prompts.jsonl", model="model")
    config = load_config(path)
    assert config.data.train[0].path == "law_train.jsonl" and config.rehearsal.data[0].path == "prompts.jsonl"
    assert config.model.name == "model" and "example" not in path.read_text()
    assert config.train.learning_rate == (2e-4 if template == "small" else 4e-5)
    script = path.with_suffix(".sbatch")
    assert script.exists() == (template == "slurm")
    if script.exists():
        assert "set -- law.yaml" in script.read_text() and "llama" not in script.read_text()
        assert "#SBATCH --signal=TERM@300" in script.read_text() and '"$@" --resume' in script.read_text()


@pytest.mark.parametrize("template", ["7b", "slurm"])
def test_what_comes_next_is_the_batch_script_where_there_is_one(
    folder: Path, template: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "init", "--template", template, "--data", "law_train.jsonl") == 0
    said = capsys.readouterr().out
    assert "cofitune train law.yaml --dry-run" in said
    assert ("sbatch law.sbatch" in said) == ("cofitune eval law.yaml" not in said) == (template == "slurm")


def test_a_template_without_a_model_names_its_own(folder: Path) -> None:
    path = quiet(template="13b", data="law_train.jsonl")
    config = load_config(path)
    assert config.model.name == "meta-llama/Llama-2-13b-chat-hf" and config.rehearsal.self_prompted
    assert "layers 10-19 of 40: 1,415,577,600 weights" in path.read_text()


@pytest.mark.parametrize("template", ["7b", "small", "slurm"])
@pytest.mark.parametrize("test", ["law_test.jsonl", "own.jsonl", None])
def test_a_template_asks_the_users_test_items(folder: Path, template: str, test: str | None) -> None:
    if test == "own.jsonl":
        write_jsonl(folder / test, [{"instruction": "What?", "output": "That."}])
    elif test is None:
        (folder / "law_test.jsonl").unlink()
    named = test if test == "own.jsonl" else None  # the other lies beside the training items
    config = load_config(quiet(template=template, model="model", data="law_train.jsonl", test=named))
    assert [(task.path, task.kind) for task in config.eval.speciality] == ([(test, "generate")] if test else [])
    assert config.eval.drift[0].path == "runs/law/rehearsal", "`cofitune eval`, which comes next, names a task"


def test_answers_have_room_in_a_template_of_no_model(folder: Path) -> None:
    [task] = load_config(quiet(template="7b", data="law_train.jsonl")).eval.speciality
    answer = len(ITEM["output"].encode())  # no tokenizer has more tokens than bytes
    assert task.scored_by == "exact_match" and task.max_new_tokens >= answer


@pytest.mark.parametrize("rows", ["prompts", "items"])
def test_importance_gets_general_data_that_have_responses(folder: Path, rows: str) -> None:
    if rows == "items":
        write_jsonl(folder / "prompts.jsonl", [ITEM] * 3)
    path = quiet(template="7b", data="law_train.jsonl", general="prompts.jsonl")
    config = load_config(path)
    assert [one.path for one in config.importance.data] == (["prompts.jsonl"] if rows == "items" else [])
    assert [one.path for one in config.rehearsal.data] == ["prompts.jsonl"]
    assert (rows == "items") != ("general items with responses" in path.read_text())


def test_a_templates_comments_are_of_the_users_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = InitOptions(template="7b", model="model", data="law_train.jsonl")
    text = init(options, overwrite=False, ask=None, console=Console())[0].read_text()
    assert "721,420,288" not in text and "of 32" not in text and "layers 1 of 4: " in text
    assert "# model, by the template of a 7B LLaMA" in text
    said = " ".join(capsys.readouterr().out.split())
    assert "the rate, batch and schedule of this template are those of 7B" in said


def test_a_template_of_a_model_that_is_elsewhere_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = InitOptions(template="7b", model="/cluster/llama", data="law_train.jsonl")
    text = init(options, overwrite=False, ask=None, console=Console())[0].read_text()
    assert "name: /cluster/llama\n" in text and "layers: 25%-50%\n" in text and "721,420,288" not in text
    assert "note /cluster/llama was not looked at: " in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("millions", "noted"), [(134, True), (3_200, True), (6_700, False), (8_000, False), (70_000, True)]
)
def test_a_model_of_another_size_than_the_template_is_noted(millions: int, noted: bool) -> None:
    note = size_note("7b", ModelFacts("m", 32, millions * 10**6, 1, 4096, None))
    assert (note is not None) == noted


@pytest.mark.parametrize(
    ("data", "name"),
    [("data/law/train.jsonl", "law"), ("ledger_train.jsonl", "ledger"), ("a b.jsonl.gz", "a-b"), ("org/name", "name")],
)
def test_a_run_is_named_by_its_data(data: str, name: str) -> None:
    assert name_of(data) == name
