"""What the documents show is true: configs load, commands parse, keys and options exist, links lead somewhere."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.main
import yaml
from pydantic import BaseModel

from cofitune.cli import app
from cofitune.config.load import load_config
from cofitune.config.schema import Config
from tests.docs.documents import DOCS, INLINE, LINK, ROOT, Block, anchors, blocks, commands, documents, split

LANGUAGES = {"yaml", "bash", "text", "json", "jsonl", "python", "bibtex", "{toctree}", "{include}", "{literalinclude}"}
# what a fragment leaves out
BASE: dict[str, Any] = {
    "model": {"name": "base"}, "output_dir": "runs/x",
    "data": {"train": ["train.jsonl"]}, "importance": {"data": ["general.jsonl"]},
}  # fmt: skip
SUFFIXES = ("jsonl", "json", "yaml", "csv", "png", "svg", "safetensors", "py", "html", "md", "log")
EXAMPLE = re.compile(r"/a/|NAME")  # paths that stand for others
OTHERS = {  # commands of others that the documents use
    ".", ".venv/bin/pip", ".venv/bin/pre-commit", ".venv/bin/python", "./llama-quantize", "cp", "hf",
    "mkdir", "ollama", "pip", "python", "python3", "sbatch", "vllm",
}  # fmt: skip


def _id(block: Block) -> str:
    return block.where


def _config(folder: Path, sections: dict[str, Any], overrides: list[str]) -> Config:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**BASE, **sections}), encoding="utf-8")
    return load_config(path, overrides)


def test_blocks_name_a_language_that_is_checked() -> None:
    everything = [block for path in documents() for block in split(path)[0]]
    assert len(everything) > 40
    strange = [(b.where, b.language) for b in everything if b.language not in LANGUAGES]
    assert not strange


@pytest.mark.parametrize("block", blocks("yaml"), ids=_id)
def test_yaml_loads_as_a_config(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block without `model` is a fragment, and the rest is filled in. Suites are read from the repository."""
    monkeypatch.chdir(ROOT)
    path = tmp_path / "config.yaml"
    path.write_text(block.text, encoding="utf-8")
    keys = re.findall(r"^(\w+):", block.text, re.MULTILINE)
    assert keys, "no section"
    rest = {key: value for key, value in BASE.items() if key not in keys}
    path.write_text(block.text + "\n" + (yaml.safe_dump(rest) if rest else ""), encoding="utf-8")
    load_config(path)


@pytest.mark.parametrize("block", blocks("bash"), ids=_id)
def test_commands_parse(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for line in commands(block):
        for command in re.split(r"\s+&&\s+|\s+\|\s+", line):
            _check_command(command, tmp_path)


@pytest.mark.parametrize("block", blocks("json", "jsonl", "python"), ids=_id)
def test_data_and_code_parse(block: Block) -> None:
    if block.language == "python":
        ast.parse(block.text)
    elif block.language == "json":
        json.loads(block.text)
    else:
        assert [json.loads(line) for line in block.text.splitlines()]


@pytest.mark.parametrize("path", documents(), ids=lambda p: str(p.relative_to(ROOT)))
def test_inline_code_names_what_there_is(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train.save_steps`, `softmask.apply_to: update` and `cofitune eval --require …` as they are in the program."""
    monkeypatch.chdir(ROOT)
    wrong = []
    for text in INLINE.findall(split(path)[1]):
        try:
            if text.startswith("cofitune "):
                _check_words(shlex.split(text.replace("…", "")), tmp_path, whole=False)
            elif re.match(r"scripts/\S+ ", text):
                _check_command(text.replace("…", ""), tmp_path)
            elif re.match(r"(cofitune|configs|docs|scripts|tests)/", text):
                assert EXAMPLE.search(text) or (ROOT / text).exists(), f"no file {text}"
            elif found := re.match(r"(\w+(?:\.\w+)+)(?:[:=]|$)", text):
                parts = found[1].split(".")
                past = path.name == "CHANGELOG.md"  # which names keys of earlier versions, too
                if not past and parts[0] in Config.model_fields and parts[-1] not in SUFFIXES:
                    assert _is_key(parts), f"no key {found[1]}"
        except Exception as error:  # noqa: BLE001  (whatever it is, it is told with its place)
            wrong.append(f"{text}: {error}")
    assert not wrong


@pytest.mark.parametrize("path", documents(), ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    wrong = []
    for target in LINK.findall(split(path)[1]):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        place = (path.parent / name).resolve() if name else path
        if not place.exists() or (anchor and anchor not in anchors(place)):
            wrong.append(target)
    assert not wrong


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = {
        name
        for block in split(DOCS / "index.md")[0]
        if block.language == "{toctree}"
        for name in block.text.splitlines()
        if name and not name.startswith(":")
    }
    pages = {str(p.relative_to(DOCS).with_suffix("")) for p in DOCS.rglob("*.md")}
    assert pages == listed | {"index"}
    assert not pages & {"search", "genindex"}, "Sphinx writes pages of these names over them"


def test_the_readme_is_one_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= 12 * 1024
    first_screen = "\n".join(text.splitlines()[:40])
    assert "scripts/demo" in first_screen
    assert "scripts/test" in first_screen


def test_ci_runs_the_readmes_test_command() -> None:
    command = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1].removeprefix("exec ")
    shown = [line.split("#")[0].strip() for block in split(ROOT / "README.md")[0] for line in commands(block)]
    assert command == "scripts/test"
    assert command in shown
    assert ".ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")


def _check_command(command: str, folder: Path) -> None:
    words = shlex.split(re.sub(r"\s>\s*\S+$", "", command), comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if not words:
        return
    if words[0] == "srun":
        words = words[next(i for i, w in enumerate(words) if not w.startswith("-") and i) :]
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
    if words[0].endswith("cofitune"):
        _check_words(words, folder, whole=True)
    elif words[0].startswith(("scripts/", ".ci/")):
        assert (ROOT / words[0]).is_file(), f"no {words[0]}"
        _check_script_options(words)
    else:
        assert words[0] in OTHERS, f"{words[0]} is no command that the documents use"


def _check_script_options(words: list[str]) -> None:
    """A bench's options are in its own text or in the Python files beside it."""
    path = ROOT / words[0]
    sources = [path, path.with_suffix(".py"), *path.parent.glob(f"{path.name}_*.py")]
    text = "".join(source.read_text(encoding="utf-8") for source in sources if source.is_file())
    for option in (word.split("=")[0] for word in words[1:] if word.startswith("--")):
        assert option in text, f"{words[0]} has no {option}"


def _check_words(words: list[str], folder: Path, *, whole: bool) -> None:
    """The real CLI parses the words; overrides are laid over the config, or over a small one where it is not here."""
    root: Any = typer.main.get_command(app)
    if words[1].startswith("--"):
        assert words[1] in ("--help", "--version", "--install-completion"), f"no option {words[1]}"
        return
    assert words[1] in root.commands, f"no command {words[1]}"
    command, given = root.commands[words[1]], words[2:]
    if below := getattr(command, "commands", None):
        if not given and not whole:  # `cofitune config` in a sentence
            return
        command, given = below[given[0]], given[1:]
    if "--help" in given:
        return
    if not whole and not any(not word.startswith("-") for word in given):  # `cofitune eval --require` in a sentence
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(given) <= known, f"{set(given) - known}: no options of {words[1]}"
        return
    context = command.make_context(words[1], list(given))
    overrides = context.params.get("overrides") or []
    if "config" in context.params:
        path = Path(str(context.params["config"]))
        if path.is_file():
            load_config(path, list(overrides))
        else:
            _config(folder, {}, list(overrides))


def _is_key(parts: list[str]) -> bool:
    """Whether the config's schema has a key at this place."""
    models: list[type[BaseModel]] = [Config]
    for part in parts:
        fields = [m.model_fields[part] for m in models if part in m.model_fields]
        if not fields:
            return False
        models = [m for field in fields for m in _models_in(field.annotation)]
        if not models and any("dict" in str(field.annotation) for field in fields):
            return True  # compare.methods.NAME, deepspeed.raw.KEY
    return True


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
