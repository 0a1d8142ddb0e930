"""The commands that `faults.py` breaks: what is typed, what must come out, and the tiny run that they work on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import kill
import yaml

from cofitune.temporary import TEMPORARY

RANKS = ("--num-processes", "2")


@dataclass(frozen=True)
class Command:
    """A command, and the files of the run that it must write byte for byte.

    Attributes:
        words: what is typed behind `cofitune`; RUN stands for the run's folder, CONFIG for the config.
        folder: what it writes, below the run.
        results: globs below the run.
        needs: commands whose folders must be there.
    """

    words: tuple[str, ...]
    folder: str
    results: tuple[str, ...]
    needs: tuple[str, ...] = ()


_IMPORTANCE = Command(("importance", "CONFIG"), "importance", ("importance/*.safetensors",))
_TRAIN = Command(("train", "CONFIG", "--resume"), "train", ("train/delta.safetensors",), ("importance",))
_EVAL = Command(
    ("eval", "CONFIG"), "eval", ("eval/samples/*/*.jsonl", "eval/changed/*/*.jsonl"), ("importance", "train")
)


def _on_two_ranks(command: Command) -> Command:
    return Command((*command.words, *RANKS), command.folder, command.results, command.needs)


COMMANDS = {
    "importance": _IMPORTANCE,
    "importance on two ranks": _on_two_ranks(_IMPORTANCE),
    "rehearse": Command(
        ("rehearse", "CONFIG"), "rehearsal", ("rehearsal/items.jsonl", "rehearsal/*.safetensors")
    ),
    "train": _TRAIN,
    "train on two ranks": _on_two_ranks(_TRAIN),
    "eval": _EVAL,
    "eval on two ranks": _on_two_ranks(_EVAL),
    "search": Command(("search", "CONFIG"), "search", ("search/region.yaml",), ("importance",)),
    "compare": Command(
        ("compare", "CONFIG"),
        "compare",
        ("compare/runs/*/*/*/train/delta.safetensors", "compare/scored/eval/samples/*/*.jsonl"),
        ("importance",),
    ),
    "export": Command(
        ("export", "RUN", "--to", "RUN/whole", "--overwrite"), "whole", ("whole/*.safetensors",),
        ("importance", "train"),
    ),
    "report": Command(
        ("report", "RUN", "--to", "RUN/report"), "report", ("report/report.html",), ("importance", "train", "eval")
    ),
}  # fmt: skip


def hashes(run: Path, command: str) -> dict[str, str]:
    """sha256 of the files that must come out alike; a page names its run's folder, which differs."""
    files = sorted(path for pattern in COMMANDS[command].results for path in run.glob(pattern))
    contents = ((path, path.read_bytes().replace(str(run).encode(), b"RUN")) for path in files)
    return {str(path.relative_to(run)): hashlib.sha256(content).hexdigest() for path, content in contents}


def is_left(path: Path) -> bool:
    """Whether a file or folder is what only a process that runs may have."""
    name = path.name
    left = name.endswith((".tmp", ".building", ".lock")) or name.startswith(("cofitune-ranks-", "prefix-"))
    return left or bool(TEMPORARY.fullmatch(name))


def make_config(folder: Path) -> Path:
    """The kill test's tiny model and items, with what the other commands read."""
    path = kill.make_config(folder, 6)
    config = yaml.safe_load(path.read_text())
    questions = [
        {"question": f"is {word} a word", "choices": ["yes", "no"], "answer": 0} for word in ("ab", "cd", "ef")
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    task = {"path": str(folder / "questions.jsonl"), "kind": "multiple_choice"}
    items = str(folder / "items.jsonl")
    config["train"]["save_steps"] = 2
    config |= {
        "softmask": {"apply_to": "update"},
        "importance": {"data": items, "save_steps": 2, "max_items": 24},
        "rehearsal": {"data": items, "max_items": 12, "max_new_tokens": 8, "unfinished": "keep", "batch_size": 4},
        "eval": {"speciality": [task], "versatility": {"gen_kn": [{**task, "name": "general"}]}},
        "search": {
            "train_steps": 2, "measure": "score", "levels": [{"layers": ["0-1", "2-3"]}],
        },
        "compare": {
            "methods": {"upper": {"region": {"layers": "2-3", "modules": "all"}}, "lower": {"region": {"layers": "0"}}},
            "alphas": [0.5, 1.0],
        },
    }  # fmt: skip
    path.write_text(yaml.safe_dump(config))
    return path
