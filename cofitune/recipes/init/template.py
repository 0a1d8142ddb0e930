"""The config that `cofitune init --template` writes: a shipped one with the user's own files and model in it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from cofitune.config.shipped import shipped_folder
from cofitune.recipes.init.look import ModelFacts
from cofitune.recipes.init.write import SELF_PROMPTED, Wanted, evaluation_text, schema_line, yaml_text
from cofitune.reports.text import weights_text

SIZES = {"7b": 7e9, "13b": 13e9}  # weights that a template's settings are meant for
OTHER_SIZE = 2  # times as many or as few weights need other settings
NO_GENERAL_ITEMS = '[] # general items with responses, {"instruction", "output"} a line, for `cofitune importance`'


def template_text(name: str, wanted: Wanted, named: str | None, model: ModelFacts | None, file: Path) -> str:
    """A shipped config with the user's own files in it.

    Args:
        name: 7b or 13b.
        named: the model that was asked for; None: the template's own.
        model: what was seen of it; None: nothing, and comments on it are left out.
    """
    text = (shipped_folder() / f"llama-{name}.yaml").read_text(encoding="utf-8")
    lines = text.splitlines()
    lines[0], lines[1] = schema_line(), f"# cofitune train {file}"
    text = "\n".join(lines) + "\n"
    general = yaml_text(wanted.general) if wanted.general else ""
    prompts = f"data: [{general}]" if general else f"self_prompted: {SELF_PROMPTED}"
    items = f"[{general}]" if general and wanted.general_has_responses else NO_GENERAL_ITEMS
    changes = [
        (r"^(  train:) \[.*$", f" [{yaml_text(wanted.data)}]"),
        (r"^(rehearsal:\n  )data: .*$", prompts),
        (r"^(importance:\n  data:) .*$", f" {items}"),
        (r"^()eval:.*\n(?:  .*\n)+\n", evaluation_text(wanted)),
        (r"^(output_dir:) .*$", f" {yaml_text(f'runs/{wanted.task}')}"),
    ]
    if named:
        about = f" # {model.num_layers} layers, {weights_text(model.num_parameters)} weights" if model else ""
        changes += [
            (r"^(  name:) .*$", f" {yaml_text(named)}{about}"),
            (r"^(  layers: \S+) #.*$", f" # {_about_region(model)}" if model else ""),
            (r"^(# )A \d+B LLaMA", f"{named}, by the template of a {name.upper()} LLaMA"),
        ]
    for pattern, new in changes:
        found = list(re.finditer(pattern, text, re.MULTILINE))
        if len(found) != 1:
            raise RuntimeError(f"llama-{name}.yaml has {len(found)} places like {pattern}")
        text = text[: found[0].end(1)] + new + text[found[0].end() :]
    return text


def _about_region(model: ModelFacts) -> str:
    share = 100 * model.trained / model.num_parameters
    return f"layers {model.layers} of {model.num_layers}: {model.trained:,} weights, {share:.1f} %"


def size_note(name: str, model: ModelFacts) -> str | None:
    """What is to be said where a model is of another size than the template; None where it is not."""
    ratio = model.num_parameters / SIZES[name]
    if 1 / OTHER_SIZE < ratio < OTHER_SIZE:
        return None
    return (
        f"{model.name} has {weights_text(model.num_parameters)} weights, and the rate, batch and schedule of this "
        f"template are those of {name.upper()}; `cofitune init` without --template chooses them for the model and this "
        "machine"
    )


def script_text(wanted: Wanted, file: Path) -> str:
    """The batch script of SLURM for a config."""
    text = (shipped_folder() / "llama-7b.sbatch").read_text(encoding="utf-8")
    text = text.replace("configs/llama-7b.sbatch", str(file.with_suffix(".sbatch")))
    text = re.sub(r"(?m)^# yours: .*\n", "", text)
    text = re.sub(r"(?m)^set -- .*$", lambda _: f"set -- {shlex.quote(str(file))}", text)
    return re.sub(r"(?m)^cofitune export .*$", f"cofitune export runs/{wanted.task} --to models/{wanted.task}", text)
