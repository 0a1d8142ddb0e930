"""What a run stands on besides its config: artifacts of other commands, and the base's files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cofitune.config import schema
from cofitune.errors import UnusableModelError, UserError
from cofitune.files import sha256_file
from cofitune.model.anatomy import Anatomy
from cofitune.model.check_weights import check_files
from cofitune.model.weight_files import fingerprint, weight_files


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

    def use(self, name: str, path: Path, sha256: str | None = None) -> None:
        """Note a file that the run stands on; `sha256` where it is known already."""
        self.used[name] = {"path": str(path), "sha256": sha256 or sha256_file(path)}

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
