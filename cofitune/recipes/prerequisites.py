"""What a run stands on besides its config: artifacts of other commands, and the base's files."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from cofitune.config import schema
from cofitune.errors import ArtifactError, UnusableModelError, UserError
from cofitune.files import sha256_file
from cofitune.model.anatomy import Anatomy
from cofitune.model.weight_files import check_files, fingerprint, weight_files
from cofitune.ranks import this_rank

SECONDS_OF_STALENESS = 70  # for which a network file system may not show a machine what another one has written
T = TypeVar("T")


def look_again(look: Callable[[], T]) -> T:
    """Look for an artifact; on other machines than rank 0's, again and again while their file system may be stale.

    Rank 0 says at once what is missing or damaged, and its launcher ends the others.

    Raises:
        ArtifactError: `look` does, on rank 0 or for too long.
    """
    end = time.monotonic() + SECONDS_OF_STALENESS
    while True:
        try:
            return look()
        except ArtifactError:
            if this_rank().rank == 0 or time.monotonic() > end:
                raise
            time.sleep(SECONDS_OF_STALENESS / 70)


@dataclass
class Prerequisites:
    """Collects, while a plan is made, what was found and what a dry run could do without.

    Attributes:
        dry_run: whether something missing is noted instead of raised.
        used: artifacts that the run stands on: what → its path and sha256.
        missing: what the run will need and is not there yet, in words.
        notes: what is to be said before the run, such as an artifact that is poor.
    """

    dry_run: bool = False
    used: dict[str, dict[str, str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def use(self, name: str, path: Path) -> None:
        """Note a file that the run stands on."""
        self.used[name] = {"path": str(path), "sha256": sha256_file(path)}

    def lack(self, error: UserError) -> None:
        """Note what is missing, where this is a dry run.

        Raises:
            UserError: `error` itself, where it is none; or it names a model that is there and cannot be used.
        """
        if not self.dry_run or isinstance(error, UnusableModelError):
            raise error
        self.missing.append(str(error))

    def check_base(self, model: schema.Model, anatomy: Anatomy) -> str | None:
        """Compare the headers of the base's weight files with its config; its fingerprint, None where files lack.

        Raises:
            UserError: the files are not there, or not of this model.
        """
        name, revision, download = model.name, model.revision, not self.dry_run
        try:
            check_files(weight_files(name, revision, download=download), anatomy)
            return fingerprint(name, revision, download=download)
        except UserError as error:
            self.lack(error)
            return None
