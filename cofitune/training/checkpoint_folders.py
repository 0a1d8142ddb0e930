"""The folders of checkpoints by their names: which there are, and how one is put in place and taken away."""

from __future__ import annotations

import re
from pathlib import Path

from cofitune.files import fsync_folder, remove_files

NAME = re.compile(r"step-(\d{6,})")
UNFINISHED = re.compile(r"\.step-\d{6,}(\.old)?\.tmp")
FILES = r"(state-\d{5}|rank-\d{5}-\d{5}|random)\.safetensors|manifest\.json|shared"  # of a checkpoint
OWN = re.compile(rf"{FILES}|\..+\.cofitune\.tmp")


def step_of(folder: Path) -> int:
    """The step that a folder's name says."""
    return int(folder.name.removeprefix("step-"))


def checkpoint_folders(folder: Path) -> list[Path]:
    """The folders of finished write-outs, the newest first; their contents may have suffered since."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def put_in_place(temporary: Path, target: Path) -> None:
    """Give a finished write-out its name."""
    if target.exists():  # a damaged one, which training has now reached again
        remove_checkpoint(target)
    temporary.replace(target)
    fsync_folder(target.parent)


def drop_old(folder: Path, step: int, save_total_limit: int) -> None:
    """Keep the newest `save_total_limit` up to `step`; later ones are damaged and were passed over."""
    result = checkpoint_folders(folder)
    keep = [path for path in result if step_of(path) <= step][:save_total_limit]
    for path in result:
        if path not in keep:
            remove_checkpoint(path)
    remove_unfinished(folder)


def remove_unfinished(folder: Path) -> None:
    """Take away the write-outs that killed processes left."""
    for path in folder.glob(".step-*.tmp"):
        if UNFINISHED.fullmatch(path.name):
            empty(path)


def remove_checkpoints(folder: Path) -> None:
    """Take away all checkpoints, and their folder where nothing else lies in it."""
    for path in checkpoint_folders(folder):
        remove_checkpoint(path)
    remove_unfinished(folder)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def remove_checkpoint(folder: Path) -> None:
    """Take away a checkpoint; files in its folder that we did not write stay, in a folder that bears another name."""
    hidden = folder.with_name(f".{folder.name}.old.tmp")
    empty(hidden)
    folder.rename(hidden)  # half a folder must not be taken for a checkpoint
    empty(hidden)
    if hidden.exists():
        hidden.rename(_free(folder.with_name(f"{folder.name}-kept")))


def empty(folder: Path) -> None:
    """Take away what we wrote into a checkpoint's folder, and the folder where nothing else lies in it."""
    remove_files(folder, OWN)


def _free(path: Path) -> Path:
    """The path, or with a number where there is one already."""
    number = 1
    while path.exists():
        number += 1
        path = path.with_name(f"{path.name.rstrip('0123456789')}{number}")
    return path
