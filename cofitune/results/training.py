"""What `train`, `importance`, `rehearse`, `export` and `report` leave."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cofitune.files import read_json, read_tensors
from cofitune.jsonl import json_object, read_lines
from cofitune.results.frame import to_frame

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor


@dataclass(frozen=True)
class TrainResult:
    """A finished training.

    Attributes:
        run: the config's output_dir.
        manifest: train/manifest.json: the base, what trained, on what, losses, drift, seconds.
        metrics: a record a step, validation or measurement of drift, as in train/metrics.jsonl.
    """

    run: Path
    manifest: dict[str, Any] = field(repr=False)
    metrics: tuple[dict[str, Any], ...] = field(repr=False)

    @classmethod
    def read(cls, run: Path | str) -> TrainResult:
        """Read a run.

        Raises:
            UserError: its training has not finished, or a file is damaged.
        """
        folder = Path(run) / "train"
        manifest = read_json(folder / "manifest.json", "trained run (its training manifest)")
        return cls(Path(run), manifest, tuple(read_lines(folder / "metrics.jsonl", json_object, may_be_torn=True)))

    @property
    def folder(self) -> Path:
        """`<run>/train`."""
        return self.run / "train"

    @property
    def delta(self) -> Path:
        """The trained tensors, a safetensors file."""
        return self.folder / "delta.safetensors"

    @property
    def last_loss(self) -> float:
        """The last step's loss, in nats a supervised token."""
        return float(self.manifest["last_loss"])

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors whole, by parameter name."""
        return read_tensors(self.delta, "delta")

    def frame(self) -> pd.DataFrame:
        """The metrics, a row a record."""
        return to_frame(self.metrics)

    def to_dict(self) -> dict[str, object]:
        """As `cofitune train --json` prints it."""
        about = ("region", "adapter", "steps", "first_loss", "last_loss", "tokens", "seconds", "ranks", "seed")
        return {
            "run": str(self.run),
            "delta": str(self.delta),
            "manifest": str(self.folder / "manifest.json"),
            "metrics": str(self.folder / "metrics.jsonl"),
            "summary": str(self.run / "summary.json"),
            **{name: self.manifest.get(name) for name in about},
        }


@dataclass(frozen=True)
class ImportanceResult:
    """A finished estimation of importance; `manifest`: importance/manifest.json."""

    run: Path
    manifest: dict[str, Any] = field(repr=False)

    @classmethod
    def read(cls, run: Path | str) -> ImportanceResult:
        """Read a run's importance.

        Raises:
            UserError: it has not finished, or the file is damaged.
        """
        return cls(Path(run), read_json(Path(run) / "importance" / "manifest.json", "importance manifest"))

    @property
    def file(self) -> Path:
        """The vectors, a safetensors file."""
        return self.run / "importance" / "importance.safetensors"

    def vectors(self) -> dict[str, Tensor]:
        """By kind of unit, importance in [0, 1]: [L, units]."""
        return read_tensors(self.file, "importance file")

    def to_dict(self) -> dict[str, object]:
        """As `cofitune importance --json` prints it."""
        return {"run": str(self.run), "importance": str(self.file), "manifest": self.manifest}


@dataclass(frozen=True)
class RehearseResult:
    """The base's own answers; `manifest`: rehearsal/manifest.json."""

    run: Path
    manifest: dict[str, Any] = field(repr=False)

    @classmethod
    def read(cls, run: Path | str) -> RehearseResult:
        """Read a run's rehearsal.

        Raises:
            UserError: it has not finished, or the file is damaged.
        """
        return cls(Path(run), read_json(Path(run) / "rehearsal" / "manifest.json", "rehearsal manifest"))

    @property
    def file(self) -> Path:
        """The prompts and answers, an item a line."""
        return self.run / "rehearsal" / "items.jsonl"

    def items(self) -> list[dict[str, object]]:
        """The prompts and answers."""
        return read_lines(self.file, json_object, may_be_torn=False)

    def to_dict(self) -> dict[str, object]:
        """As `cofitune rehearse --json` prints it."""
        about = ("items", "held_out", "unfinished", "tokens")
        return {"run": str(self.run), "items_file": str(self.file), **{name: self.manifest[name] for name in about}}


@dataclass(frozen=True)
class ExportResult:
    """A written model folder, and how much of the training is in it."""

    folder: Path
    alpha: float

    @classmethod
    def read(cls, folder: Path | str) -> ExportResult:
        """Read an exported folder.

        Raises:
            UserError: it holds no model.
        """
        config = read_json(Path(folder) / "config.json", "exported model", ours=False)
        return cls(Path(folder), float(config.get("cofitune_alpha", 1.0)))

    def to_dict(self) -> dict[str, object]:
        """As `cofitune export --json` prints it."""
        return {"folder": str(self.folder), "alpha": self.alpha}


@dataclass(frozen=True)
class ReportResult:
    """A written report: its one HTML page."""

    page: Path

    def to_dict(self) -> dict[str, object]:
        """As `cofitune report --json` prints it."""
        return {"page": str(self.page)}
