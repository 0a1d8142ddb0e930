"""A run's folders: one below `output_dir` a command, each with the resolved config that it was made by."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from cofitune import __version__
from cofitune.config.day import keep_day, today
from cofitune.config.load import dump_config, load_resolved
from cofitune.config.schema import FREE_SETTINGS, SECTIONS_READ, Config, Data, Eval, EvalModel, Importance, Rehearsal
from cofitune.errors import UserError, differences
from cofitune.files import gib, write_text
from cofitune.model.other_folders import is_missing_folder
from cofitune.recipes.own_files import foreign_files, is_own_config, remove_own
from cofitune.temporary import remove_leftovers

PACKAGES = ("torch", "transformers", "deepspeed", "lm-eval")

Place = tuple[str, str | None]  # a model's name and revision


def check_folder(config: Config, command: str, overwrite: bool, resumes: bool = False) -> Path:
    """Return the command's folder; nothing is written yet.

    Args:
        resumes: the folder holds a checkpoint to continue from, which knows better than the folder's config what may
            differ.

    Raises:
        UserError: a section that this command reads differs from the one the folder was made by, or the place cannot
            be written.
    """
    folder = config.run / command
    made_by = folder / "config.yaml"
    asked = config.search.eval if command == "search" and config.search.eval else config.eval
    sources = _sources(command, config.data, config.importance, config.rehearsal, asked)
    _check_own(config.run, command, [config.model.name, *sources])
    if made_by.is_file() and not (overwrite or resumes):
        before, now = (_without_free(c.model_dump()) for c in (load_resolved(made_by), config))
        parts = SECTIONS_READ[command]
        changed = [d for part in parts for d in differences(part, _part(before, part), _part(now, part))]
        if changed:
            raise UserError(
                f"{folder} was made by another config ({'; '.join(changed[:3])}{'; …' if len(changed) > 3 else ''}); "
                "choose another output_dir, or --overwrite it"
            )
    check_place(folder)
    return folder


def check_place(folder: Path) -> None:
    """Raise a UserError where a folder can be neither written nor made."""
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"output_dir: {folder} cannot be written ({parent} is not a writable folder)")


def start_folder(config: Config, command: str, overwrite: bool, resumes: bool = False) -> Path:
    """Make the command's folder (under `overwrite` without what is ours in it) and write the resolved config into it.

    What killed processes left there is taken away.
    """
    folder = check_folder(config, command, overwrite, resumes)
    try:
        if overwrite:
            remove_own(folder, command)
        remove_leftovers(folder)
        remove_leftovers(config.run, below=False)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a read-only file system says no only when asked to write
        raise UserError(f"output_dir: {folder} cannot be made: {error.strerror}") from error
    keep_day(config.run, config.data.date or today())
    text = "".join(f"# {line}\n" for line in environment()) + dump_config(config)
    write_text(folder / "config.yaml", text)
    # the run's own config is the one that its training was made by
    if command == "train" or not (config.run / "train").exists():
        write_text(config.run / "config.yaml", text)
    return folder


def _check_own(run: Path, command: str, sources: Iterable[str]) -> None:
    """Raise a UserError where a command's folder is not ours, or holds what the command reads (`sources`)."""
    folder = run / command
    for made_by in (run / "config.yaml", folder / "config.yaml"):
        if made_by.exists() and not (made_by.is_file() and is_own_config(made_by)):
            raise UserError(f"output_dir: {made_by} is not ours and would be replaced; choose another output_dir")
    place = Path(os.path.realpath(folder))  # which a loop of links does not stop
    for source in sources:
        read = Path(os.path.realpath(source))
        if place in (read, *read.parents):
            raise UserError(
                f"output_dir: {source} lies in {folder}, which this command writes; choose another output_dir, or move "
                "the file"
            )
    foreign = foreign_files(folder, command) if not (folder / "config.yaml").is_file() else []
    if foreign:
        raise UserError(
            f"output_dir: {folder} is no folder of ours: it holds {foreign[0].relative_to(folder)}; choose another "
            "output_dir, or move the file"
        )


def _sources(command: str, data: Data, importance: Importance, rehearsal: Rehearsal, tasks: Eval) -> Iterator[str]:
    """The paths that a command reads its data from, as these sections name them."""
    trained = [*data.train, *data.validation, *(data.replay.data if data.replay else ()), *importance.data]
    for source in {"importance": importance.data, "rehearsal": rehearsal.data}.get(command, trained):
        yield source.path
    if command in ("eval", "search", "compare"):
        versatility = [
            task for name in type(tasks.versatility).model_fields for task in getattr(tasks.versatility, name)
        ]
        for task in (*tasks.speciality, *versatility, *tasks.drift):
            yield from [task.path] if task.path else []


def environment() -> list[str]:
    """What made a run: our version, the packages' versions and the state of the git checkout it was typed in."""
    packages = [f"{name} {package_version(name)}" for name in PACKAGES]
    return [f"cofitune {__version__}; {', '.join(packages)}", f"git: {_git_state()}"]


def versions_of_packages() -> dict[str, str]:
    """The versions of Python, of us and of the packages that compute, which all ranks must share."""
    python = ".".join(map(str, sys.version_info[:2]))
    return {"python": python, "cofitune": __version__, **{name: package_version(name) for name in PACKAGES}}


@cache
def package_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _git_state() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (" with uncommitted changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return "not in a checkout"


def check_disk_space(folder: Path, needed: int) -> None:
    """Raise a UserError where fewer than `needed` bytes are free at `folder` (which need not exist yet)."""
    free = free_bytes(folder)
    if free < needed:
        raise UserError(f"output_dir: {folder} needs {gib(needed)} and {gib(free)} are free there")


def free_bytes(folder: Path) -> int:
    """Bytes that are free at `folder`, which need not exist yet."""
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(parent).free


def _without_free(config: dict[str, Any]) -> dict[str, object]:
    """Leave out the settings that may differ from one call to the next."""
    free = FREE_SETTINGS
    return {
        name: {k: v for k, v in section.items() if k not in free[name]} if name in free else section
        for name, section in config.items()
    }


def _part(config: dict[str, Any], dotted: str) -> object:
    for name in dotted.split("."):
        config = config[name]
    return config


def train_folder(path: str) -> Path | None:
    """A finished run's `train` folder: the manifest is written last."""
    folders = (Path(path) / "train", Path(path))
    return next((f for f in folders if (f / "manifest.json").is_file() and f.name == "train"), None)


def no_run(requested: EvalModel) -> UserError:
    """What is wrong with an alpha of what is no trained run."""
    return UserError(
        f"eval.models: {requested.path} at alpha {requested.alpha}: only a run whose training has finished "
        "(train/manifest.json) has a base to go back to"
    )


def find_base(manifest: Mapping[str, Any], moved: Place | None = None) -> Place:
    """A run's base: where the run's manifest says, or where it is now.

    Raises:
        UserError: it is a folder that is not here.
    """
    place = moved or (str(manifest["base"]), manifest["revision"])
    if is_missing_folder(place[0]):
        raise UserError(f"the base model {place[0]} is not here (seen from {Path.cwd()}); say where it is with --base")
    return place


def check_trusted(manifest: dict[str, object], trusted: bool) -> None:
    """Refuse to run a base's own code on the word of a run's manifest, which may come from anywhere.

    Raises:
        UserError: the run was trained with model.trust_remote_code, and nobody asks for it now.
    """
    if manifest.get("trust_remote_code") and not trusted:
        raise UserError(
            f"the base of this run, {manifest['base']}, brings code of its own: look at it, then say "
            "--trust-remote-code (in a config: model.trust_remote_code: true)"
        )
