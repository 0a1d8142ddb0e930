"""A Hugging Face folder that we write: whole or absent, and replaced only where all that it holds is ours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from cofitune.errors import UserError
from cofitune.files import exclusive, gib, read_json, write_checked_json, write_json
from cofitune.recipes.for_transformers4 import make_readable
from cofitune.temporary import BUILDER, built_folder, put_in_place, remove_leftovers

MARK = "cofitune_export.json"  # in such a folder: the files that we wrote into it
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


def write_model_folder(to: Path, command: str, fill: Callable[[Path], None]) -> None:
    """Let `fill` write all of it beside `to`, then put it there in one move: half a folder must not pass for a model.

    What killed processes were writing beside `to` is taken away first.

    Args:
        to: as `check_target` returns it.
        command: who writes, for the message that another one is writing there.

    Raises:
        UserError: another process writes there.
    """
    with exclusive(to, command):
        remove_leftovers(to.parent, below=False)
        with built_folder(to) as building:
            fill(building)
            make_readable(building)
            files = (path.relative_to(building).as_posix() for path in building.rglob("*") if path.is_file())
            write_checked_json(building / MARK, {"files": sorted(name for name in files if name != BUILDER)})
            put_in_place(building, to)  # what is there is empty, or a folder of ours of which all files are known


def check_room(target: str, size: int, free: int) -> None:
    """Refuse a folder whose disk has too little room for the weights; what is there is replaced only at the end.

    Args:
        target: as the message names it.
        size, free: bytes.
    """
    if free < size:
        raise UserError(f"{target}: needs {gib(size)}, and {gib(free)} are free there")


def copy_rest(source: Path, folder: Path, changes: Mapping[str, object], without: Iterable[str] = ()) -> None:
    """Copy what is small and not written yet, and the config.json with changes.

    Args:
        changes: of config.json's keys.
        without: keys of config.json that are left out.
    """
    for file in source.iterdir():
        is_weights = file.suffix in WEIGHTS or file.name.endswith(".index.json") or file.name.startswith("adapter_")
        if file.is_file() and not is_weights and file.name != MARK and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    config: dict[str, object] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    # of a base that was exported or converted itself, another's
    for key in ("torch_dtype", "cofitune_alpha", "cofitune_converted", *without):
        config.pop(key, None)
    write_json(folder / "config.json", {**config, **changes})


def check_target(to: Path, kept: Iterable[Path], overwrite: bool) -> Path:
    """The folder to write, absolute.

    Args:
        kept: folders that are read.

    Raises:
        UserError: it is a file, is or holds one of `kept`, or holds something that may not be replaced.
    """
    target = to.resolve()
    for folder in (k.resolve() for k in kept):
        if target == folder or target in folder.parents:
            raise UserError(f"--to {to}: would replace {folder}, which is read; choose another folder")
    if target.exists() and not target.is_dir():
        raise UserError(f"--to {to}: is a file; name a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UserError(f"--to {to}: exists already and is not empty; choose another folder, or --overwrite it")
    if target.is_dir() and any(target.iterdir()):
        _check_replaceable(target, to)
    return target


def _check_replaceable(target: Path, to: Path) -> None:
    """Raise a UserError where a folder is no export, or holds files that no export wrote."""
    if not (target / MARK).is_file():
        raise UserError(f"--to {to}: is no folder that an export wrote (it has no {MARK}), so it is not replaced")
    listed = read_json(target / MARK, "list of an export's files").get("files")
    known = {MARK, *(name for name in (listed if isinstance(listed, list) else ()) if isinstance(name, str))}
    found = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir())
    foreign = [name for name in found if name not in known]
    if foreign:
        raise UserError(f"--to {to}: holds {foreign[0]}, which no export wrote; move it away, or choose another folder")
