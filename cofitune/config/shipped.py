"""The configs that come along, by name: methods, suites, templates; a checkout and an installed wheel have them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from cofitune.config.section import expand
from cofitune.errors import did_you_mean

Kind = Literal["method", "suite"]
FOLDERS: dict[Kind, str] = {"method": "methods", "suite": "suites"}
ALIASES = {"cofitune": "cofitune_rehearsal"}  # what we recommend of the methods called so
TEMPLATES = {  # name → what `cofitune init --template NAME` writes
    "7b": "a 7B model on a node of 8 GPUs: the paper's region and schedule (llama-7b.yaml)",
    "13b": "a 13B model on a node of 8 GPUs: the same (llama-13b.yaml)",
    "small": "a model of some hundred million weights, on CPU cores or one GPU: more, smaller steps at a higher rate",
    "slurm": "the 7b config, and beside it the batch script that submits it (llama-7b.sbatch)",
}
_NAME = re.compile(r"[A-Za-z0-9_+-]+")


def shipped_folder() -> Path:
    """The folder `configs`: inside the package where a wheel has put it, beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped_names(kind: Kind) -> tuple[str, ...]:
    """The methods or suites that come along, sorted."""
    return tuple(sorted(path.stem for path in (shipped_folder() / FOLDERS[kind]).glob("*.yaml")))


def find_shipped(kind: Kind, text: str) -> Path:
    """The file that a config means: a name of what comes along, or a path. A file of that very name goes first.

    Raises:
        ValueError: it is a name, and nothing is called so; or a path with a variable that is not set.
    """
    if not _NAME.fullmatch(text) or Path(text).is_file():
        return Path(expand(text))
    known = shipped_names(kind)
    name = ALIASES.get(text, text) if kind == "method" else text
    if name not in known:
        near = did_you_mean(text, [*known, *(ALIASES if kind == "method" else ())])
        raise ValueError(f"no {kind} is called '{text}'{near} (there are: {', '.join(known)}; or give a YAML file)")
    return shipped_folder() / FOLDERS[kind] / f"{name}.yaml"


def say_first_words(path: Path) -> str:
    """What a shipped file says of itself: the first sentence below its first two lines."""
    lines = path.read_text(encoding="utf-8").splitlines()
    text = []
    for line in lines[2:]:
        if not line.startswith("#"):
            break
        text.append(line.lstrip("# "))
    return re.split(r"(?<=[.:;]) |\.$", " ".join(text))[0].rstrip(".:;")
