"""`cofitune init`: look at the model, the data and the machine, and write a config to begin with."""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from cofitune.config.load import load_config
from cofitune.config.shipped import TEMPLATES
from cofitune.errors import UnusableModelError, UserError, did_you_mean
from cofitune.files import write_text
from cofitune.recipes.init.look import (
    Machine,
    check_items,
    check_prompts,
    find_test,
    have_responses,
    kind_of_test,
    look_at_data,
    look_at_model,
)  # fmt: skip
from cofitune.recipes.init.template import script_text, size_note, template_text
from cofitune.recipes.init.write import Wanted, config_text
from cofitune.reports.console import say
from cofitune.reports.text import many

Ask = Callable[[str], str]
_UNFIT = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class InitOptions:
    """What was typed; None: it was not.

    Attributes:
        model: folder or hub name.
        data: file of training items.
        general: file of general prompts.
        test: file of the task's test items.
        task: names the run and the config.
        template: 7b | 13b | small | slurm.
        to: the config's file.
    """

    model: str | None = None
    data: str | None = None
    general: str | None = None
    test: str | None = None
    task: str | None = None
    template: str | None = None
    to: Path | None = None


def init(options: InitOptions, *, overwrite: bool, ask: Ask | None, console: Console) -> list[Path]:
    """Write a config, and beside it a batch script where the template is slurm's. Returns the files, the config first.

    Args:
        overwrite: replace the files.
        ask: asks a question on the terminal; None: there is none.

    Raises:
        UserError: something is missing and cannot be asked; the model or a file cannot be used; a file is there.
    """
    template = options.template
    if template is not None and template not in TEMPLATES:
        raise UserError(
            f"--template {template}: no such template{did_you_mean(template, TEMPLATES)} ({', '.join(TEMPLATES)})"
        )
    whole_node = template in ("7b", "13b", "slurm")
    options = _complete(options, ask, needs_model=not whole_node)
    data = options.data or ""
    task = _UNFIT.sub("-", options.task) if options.task else name_of(data)
    file = options.to or Path(f"{task}.yaml")
    files = [file, file.with_suffix(".sbatch")] if template == "slurm" else [file]
    for path in files:
        if path.exists() and not overwrite:
            raise UserError(f"{path}: is there already; choose another name with --to, or replace it with --overwrite")
    wanted = Wanted(task, data, options.general, _find_test(options, data))
    if options.general:
        say(console, f"general  {many(check_prompts(options.general), 'prompt')} in {options.general}")
        wanted = replace(wanted, general_has_responses=have_responses(options.general))
    if whole_node:
        text = _fill_template("13b" if template == "13b" else "7b", options.model, wanted, file, console)
    else:
        text = _look(options.model or "", wanted, file, console)
    _check(text)
    written = {file: text} | ({files[1]: script_text(wanted, file)} if len(files) > 1 else {})
    for path, content in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, content)
        say(console, "written  ", (str(path), "bold"))
    name = shlex.quote(str(file))
    say(console, f"\nnext:  cofitune config validate {name}")
    for command in ("train --dry-run", "rehearse", "train", "eval") if len(files) == 1 else ("train --dry-run",):
        word, _, option = command.partition(" ")
        say(console, f"       cofitune {word} {name} {option}".rstrip())
    for script in files[1:]:
        say(console, f"       sbatch {shlex.quote(str(script))}")
    return files


def name_of(data: str) -> str:
    """A run's name by its training data: law/train.jsonl is law, ledger_train.jsonl ledger."""
    path = Path(data)
    stem = path.name.split(".")[0]
    short = re.sub(r"[_-]?train$", "", stem)
    return _UNFIT.sub("-", short or path.absolute().parent.name or "run") or "run"


def _complete(options: InitOptions, ask: Ask | None, needs_model: bool) -> InitOptions:
    """Ask for what is missing, where there is a terminal."""
    missing = [] if options.model or not needs_model else ["model"]
    missing += [] if options.data else ["data"]
    if not missing:
        return options
    if ask is None:
        named = " and ".join(f"--{name}" for name in missing)
        raise UserError(
            f"init: {named} {'is' if len(missing) == 1 else 'are'} missing, and there is no terminal to ask on; for "
            "example cofitune init --model HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl"
        )
    questions = {
        "model": "Model to start from (a folder or a hub name)",
        "data": "Training items (JSONL: instruction and output, or messages)",
    }
    model = options.model or (ask(questions["model"]).strip() if "model" in missing else None)
    data = options.data or ask(questions["data"]).strip()
    general = options.general or ask("General prompts (a file; empty: the model writes its own)").strip()
    answered = replace(options, model=model, data=data, general=general or None)
    return answered if data and (model or not needs_model) else _complete(answered, None, needs_model)


def _find_test(options: InitOptions, data: str) -> tuple[str, str, int] | None:
    path = options.test or find_test(data)
    return (path, *kind_of_test(path)) if path else None


def _look(name: str, wanted: Wanted, file: Path, console: Console) -> str:
    model = look_at_model(name)
    say(console, f"model    {model.num_layers} layers, {model.num_parameters:,} weights in {name}")
    data = look_at_data(wanted.data, model)
    say(console, f"data     {many(data.items, 'item')} in {wanted.data}, {data.longest} tokens at most")
    _say_test(wanted, console)
    machine = Machine.here()
    say(console, f"machine  {machine}")
    return config_text(replace(wanted, answer=data.answer), model, data, machine, file)


def _fill_template(template: str, name: str | None, wanted: Wanted, file: Path, console: Console) -> str:
    """A template's text; a model that is not on this machine is named in it all the same, and that is said.

    Raises:
        UserError: the model is here and cannot be used; or an item cannot.
    """
    model = None
    try:
        model = look_at_model(name) if name else None
    except UnusableModelError:
        raise
    except UserError as error:
        say(console, f"note     {name} was not looked at: {error}")
    items, answer = check_items(wanted.data)
    if model:
        say(console, f"model    {model.num_layers} layers, {model.num_parameters:,} weights in {name}")
        if note := size_note(template, model):
            say(console, f"note     {note}")
        answer = look_at_data(wanted.data, model).answer
    say(console, f"data     {many(items, 'item')} in {wanted.data}")
    _say_test(wanted, console)
    return template_text(template, replace(wanted, answer=answer), name, model, file)


def _say_test(wanted: Wanted, console: Console) -> None:
    if wanted.test:
        say(console, f"test     {many(wanted.test[2], 'item')} of kind {wanted.test[1]} in {wanted.test[0]}")


def _check(text: str) -> None:
    """Load what is about to be written, so that nothing is written that does not load."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(text, encoding="utf-8")
        load_config(path)
