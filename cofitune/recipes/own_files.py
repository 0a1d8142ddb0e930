"""Which files below an output folder are ours, by their names: nothing else there is ever removed."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Container, Iterator
from pathlib import Path

from cofitune.temporary import TEMPORARY
from cofitune.training.checkpoint_folders import FILES

ANY = r"[^/]+"
CHECKPOINT = rf"checkpoints/\.?step-\d{{6,}}(\.old)?(\.tmp)?/({FILES})"
TRAIN = (
    r"config\.yaml|manifest\.json|metrics\.jsonl|delta\.safetensors|"
    rf"adapter/(adapter_model\.safetensors|adapter_config\.json)|{CHECKPOINT}|tensorboard/events\.out\.tfevents\.{ANY}"
)
IMPORTANCE = (
    r"config\.yaml|manifest\.json|(importance|scores)\.safetensors|spread\.csv|importance\.(png|svg)|"
    r"partial/\d+-of-\d+(-zero3)?\.safetensors"
)
REHEARSAL = (
    r"config\.yaml|manifest\.json|items\.jsonl|top_k\.safetensors|"
    r"partial/(identity\.json|[a-z]+-\d{6}\.safetensors)"
)
EVAL = (
    rf"config\.yaml|scores\.json|samples/{ANY}/{ANY}\.jsonl?|changed/{ANY}/(lost|gained)\.jsonl|"
    r"cache/[0-9a-f]{20}/(key\.json|answers\.jsonl?)"
)
RUN = rf"config\.yaml|day\.txt|summary\.json|(train/({TRAIN}))|(eval/({EVAL}))"
SEARCH = (
    r"config\.yaml|trials\.jsonl|store\.json|tree\.json|region\.yaml|search\.(png|svg)|\.?proxy\.(json|yaml|log)|"
    rf"items/{ANY}\.json|trials/{ANY}/({RUN}|trial\.(yaml|log))"
)
COMPARE = (
    r"config\.yaml|compare\.json|runs\.jsonl|frontier\.(png|svg)|"
    rf"runs/{ANY}/{ANY}/{ANY}/({RUN}|asked\.yaml|scored\.yaml|(train|eval)\.log)|scored/({RUN}|eval\.log)"
)
OWN = {
    command: re.compile(pattern)
    for command, pattern in {
        "train": TRAIN,
        "importance": IMPORTANCE,
        "rehearsal": REHEARSAL,
        "eval": EVAL,
        "search": SEARCH,
        "compare": COMPARE,
    }.items()
}
SAMPLES = re.compile(rf"(.*/)?samples/{ANY}/{ANY}\.jsonl?")
HEADER = "# cofitune "  # how a config that we wrote begins


def is_own_config(path: Path) -> bool:
    """Whether a config was written by a command of ours, and not by the user."""
    with path.open("rb") as file:
        return file.read(len(HEADER)) == HEADER.encode()


def foreign_files(folder: Path, command: str) -> list[Path]:
    """The files and links below a command's folder that no command of ours has written."""
    return [path for path in _files(folder) if not _is_own(folder, path, command)]


def remove_own(folder: Path, command: str, keep: Container[str] = ()) -> None:
    """Take away what a command has written into its folder, and folders that are empty then; all else stays.

    Args:
        keep: names in the folder that stay, too.
    """
    own = [path for path in _files(folder) if _is_own(folder, path, command)]
    own = [path for path in own if path.relative_to(folder).parts[0] not in keep]
    own.sort(key=lambda path: path.name not in ("manifest.json", "scores.json"))  # what calls the rest whole goes first
    _remove(own, folder)


def remove_samples(folder: Path) -> None:
    """Take away the answers and changed items that an evaluation has written into its folder."""
    parts = [path for name in ("samples", "changed") for path in _files(folder / name)]
    _remove([path for path in parts if _is_own(folder, path, "eval")], folder)


def remove_partial(folder: Path) -> None:
    """Take away the partial sums of an importance folder."""
    _remove([path for path in _files(folder / "partial") if _is_own(folder, path, "importance")], folder)


def _files(folder: Path) -> Iterator[Path]:
    """All below a folder that is no folder itself, links not followed."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if stat.S_ISDIR(path.lstat().st_mode):
            yield from _files(path)
        else:
            yield path


def _is_own(folder: Path, path: Path, command: str) -> bool:
    name = path.relative_to(folder).as_posix()
    if TEMPORARY.fullmatch(path.name):
        return True
    if not OWN[command].fullmatch(name) or not stat.S_ISREG(path.lstat().st_mode):
        return False
    if path.name == "config.yaml":
        return is_own_config(path)
    return not SAMPLES.fullmatch(name) or _is_result(path.with_suffix(".json"))


def _is_result(path: Path) -> bool:
    """Whether a file holds a task's figures, as `save_result` writes them beside the samples."""
    try:
        return "samples_sha256" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _remove(files: list[Path], folder: Path) -> None:
    folders: set[Path] = set()
    for path in files:
        path.unlink(missing_ok=True)
        folders.update(parent for parent in path.parents if folder in parent.parents)
    for parent in sorted(folders, key=lambda p: len(p.parts), reverse=True):
        if not any(parent.iterdir()):
            parent.rmdir()
