"""The search's memory: one JSON line a part of a trial, appended and fsynced: a killed search continues where it was.

`store.json` says what the trials depend on; a search with another identity is refused. The lock keeps a second search
out while one is writing.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

from cofitune.errors import ArtifactError, RepairWarning, differences
from cofitune.files import read_json, with_checksum, write_checked_json, write_text
from cofitune.jsonl import append_line, read_lines
from cofitune.model.region import Region
from cofitune.search.trial import Trial, trial_from_json, trial_id

VERSION = 3
LATER = ("computed_with",)  # entries of an identity that stores of an earlier version lack: these go on without them
LINE = "line of the search store"  # in messages


class Store:
    """The trials of one folder, in the order they were tried. Open it with `open_store`."""

    def __init__(self, path: Path, identity: Mapping[str, object], lines: list[Trial]) -> None:
        self.path = path
        self.identity = identity
        self._latest: dict[str, Trial] = {}
        self._scored: dict[tuple[str, int | None], Trial] = {}  # by id and step; None: the last
        self._failures: dict[str, int] = {}
        self._seconds: dict[str, float] = {}
        self._lines: list[Trial] = []
        for trial in lines:
            self._note(trial)

    def id_of(self, region: Region | None, seed: int | None = None) -> str:
        """The id that a trial of this region has in this store; with a seed of its own, that of a repeated training."""
        if seed is None:
            return trial_id(region, self.identity)
        train = self.identity.get("train")
        own = {**(train if isinstance(train, Mapping) else {}), "seed": seed}
        return trial_id(region, {**self.identity, "train": own})

    def get(self, trial: str) -> Trial | None:
        """The latest line of a trial, or None if it was never tried."""
        return self._latest.get(trial)

    def at(self, trial: str, step: int | None) -> Trial | None:
        """The trial as it was scored at a step (None: the last one), or None if it has not come there."""
        return self._scored.get((trial, step))

    def resume_step(self, trial: str, stop_step: int) -> int:
        """The step that a trial is paused at and may be taken on from to a later one; 0 where it must begin again."""
        latest = self.get(trial)
        return latest.steps if latest is not None and latest.status == "paused" and latest.steps < stop_step else 0

    def failures(self, trial: str) -> int:
        """How often a trial has failed."""
        return self._failures.get(trial, 0)

    def seconds(self, trial: str | None = None) -> float:
        """Wall time of all parts of a trial, failed ones included; None: of all trials, the base's too."""
        return sum(self._seconds.values()) if trial is None else self._seconds.get(trial, 0.0)

    def trials(self) -> list[Trial]:
        """The latest line of each trial, in the order of their first."""
        return list(self._latest.values())

    def lines(self) -> list[Trial]:
        """Every line, in the order they were written."""
        return list(self._lines)

    def append(self, trial: Trial) -> None:
        """Write one line and wait until it is on the disk; half a line left by a killed process is cut off first."""
        line = with_checksum(json.loads(trial.to_json()))
        append_line(self.path, json.dumps(line, ensure_ascii=False, allow_nan=False))
        self._note(trial)

    def _note(self, trial: Trial) -> None:
        self._lines.append(trial)
        self._latest[trial.id] = trial
        self._seconds[trial.id] = self.seconds(trial.id) + trial.seconds
        if trial.done:
            self._scored[trial.id, None] = trial
        elif trial.status == "paused":
            self._scored[trial.id, trial.steps] = trial
        elif trial.status == "failed":
            self._failures[trial.id] = self.failures(trial.id) + 1


def open_store(folder: Path, identity: Mapping[str, object], *, repair: bool = False) -> Store:
    """Open the store of a folder, or begin one. Lines that are damaged are left out, and it is said: they come again.

    Args:
        folder: holds `trials.jsonl` and `store.json`.
        identity: what the scores depend on, as JSON values.
        repair: take damaged lines out of the file, too; for who holds the lock.

    Raises:
        ArtifactError: the store was made with another identity (the message names what differs), its store.json is
            damaged, or one of the two files is gone.
    """
    path, card = folder / "trials.jsonl", folder / "store.json"
    identity = json.loads(json.dumps(identity))  # as it reads back: a tuple is a list there
    if card.exists():
        made_with = read_json(card, "search store")
        if made_with.get("version") != VERSION:
            raise ArtifactError(f"{card}: this search store is damaged or of another version; --overwrite starts over")
        before = made_with.get("identity")
        if isinstance(before, dict):  # its trials' ids are hashes of it as it was
            identity = {key: value for key, value in identity.items() if key in before or key not in LATER}
        changed = differences("", before, identity)
        if changed:
            shown = "; ".join(changed[:3]) + ("; …" if len(changed) > 3 else "")
            raise ArtifactError(
                f"{folder} holds trials of another config or machine ({shown}): their scores cannot be compared with "
                "new ones; choose another output_dir, or --overwrite it"
            )
        if not path.is_file():
            raise ArtifactError(f"{path}: is gone, and with it all trials of {card.name}; --overwrite starts over")
    elif path.exists() and path.stat().st_size:
        raise ArtifactError(f"{folder}: trials.jsonl has no store.json that says whose it is; --overwrite starts over")
    else:
        write_text(path, "")
        write_checked_json(card, {"version": VERSION, "identity": identity})
    damaged: list[str] = []
    lines = read_lines(path, _parsed, may_be_torn=True, what=LINE, on_damaged=damaged.append)
    for message in damaged:
        warnings.warn(f"{message}; that trial is run again", RepairWarning, stacklevel=1)
    if damaged and repair:
        write_text(path, "".join(f"{text}\n" for text, _ in lines))
    return Store(path, identity, [trial for _, trial in lines])


def with_stored(folder: Path, identity: Mapping[str, object], key: str) -> dict[str, object]:
    """The identity with the store's own value of a key, where it has one."""
    made_with = read_json(folder / "store.json", "search store")
    before = made_with.get("identity")
    return {**identity, **({key: before[key]} if isinstance(before, dict) and key in before else {})}


def _parsed(text: str) -> tuple[str, Trial]:
    return text, trial_from_json(text)


def read_trials(path: Path) -> list[Trial]:
    """Read every line of a store; a last line without its line break was torn by a kill and is left out.

    Raises:
        ArtifactError: another line is damaged (file:line).
    """
    return read_lines(path, trial_from_json, may_be_torn=True, what=LINE)
