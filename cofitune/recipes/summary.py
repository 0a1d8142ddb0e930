"""`summary.json` of a run: what was trained, on what, its scores, its drift, how long it took, what lies where.

It repeats what the artifacts say, so that a script or a person needs one small file. It is written anew by `train` and
`eval`, from what lies in the run's folder then.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cofitune.errors import ArtifactError
from cofitune.files import read_json, write_checked_json

FORMAT = 1
FILE = "summary.json"
SUMMARY = ("speciality", "versatility", "unified")
# what a run may hold, by the name that the summary gives it
PATHS = {
    "config": "config.yaml",
    "delta": "train/delta.safetensors",
    "manifest": "train/manifest.json",
    "metrics": "train/metrics.jsonl",
    "adapter": "train/adapter",
    "tensorboard": "train/tensorboard",
    "scores": "eval/scores.json",
    "samples": "eval/samples",
    "changed": "eval/changed",
    "region": "search/region.yaml",
    "importance": "importance/importance.safetensors",
    "rehearsal": "rehearsal/items.jsonl",
    "report": "report/report.html",
}


def write_summary(run: Path) -> Path:
    """Write `RUN/summary.json` and return its path.

    Args:
        run: the config's output_dir.

    Raises:
        ArtifactError: an artifact of the run is damaged.
    """
    path = run / FILE
    write_checked_json(path, summarise_run(run))
    return path


def summarise_run(run: Path) -> dict[str, object]:
    """The content of summary.json; a part that the run does not have is None.

    Paths are relative to the run, so that it may be moved.

    Raises:
        ArtifactError: an artifact of the run is damaged.
    """
    manifest = _read(run / "train" / "manifest.json", "training manifest")
    scores = _read(run / "eval" / "scores.json", "evaluation")
    try:
        return {
            "format": FORMAT,
            "training": _training(manifest) if manifest else None,
            "evaluation": _evaluation(run, manifest, scores) if scores else None,
            "paths": {name: place for name, place in PATHS.items() if (run / place).exists()},
        }
    except (KeyError, TypeError, IndexError) as error:
        raise ArtifactError(f"{run}: train/manifest.json or eval/scores.json is damaged: {error!r}") from error


def _read(path: Path, what: str) -> dict[str, Any] | None:
    return read_json(path, what) if path.is_file() else None


def _training(manifest: Mapping[str, Any]) -> dict[str, object]:
    """Of a run by an older version, what its manifest does not say is None."""
    get = manifest.get
    region, drift = get("region") or {}, get("drift") or {}
    curve, losses = drift.get("curve"), (get("validation") or {}).get("losses")
    same = (
        "base", "base_fingerprint", "adapter", "softmask", "data", "rehearsal", "steps", "tokens", "first_loss",
        "last_loss", "seconds", "ranks", "seed", "dtype", "delta_sha256", "made_with",
    )  # fmt: skip
    return {
        **{name: get(name) for name in same},
        # under an adapter the region is what carries it
        "region": {name: region.get(name) for name in ("layers", "modules")},
        "trained_weights": region.get("trained_weights"),
        "all_weights": region.get("all_weights"),
        "items": sum(counts["kept"] for counts in get("items", ())),
        "validation_loss": losses[-1]["validation_loss"] if losses else None,
        "drift": curve[-1]["drift"] if curve else None,
        "max_drift_exceeded": bool(drift.get("exceeded")),
    }


def _evaluation(run: Path, manifest: Mapping[str, Any] | None, scores: Mapping[str, Any]) -> dict[str, object]:
    models, base = scores["models"], next(iter(scores["models"]))
    trained = manifest.get("delta_sha256") if manifest else None
    own = [m["delta_sha256"] for m in models.values() if Path(m["path"]).resolve() == run.resolve()]
    return {
        # a training begun anew leaves the scores of the one before it, until the next `cofitune eval`
        "of_this_training": trained in own if trained else None,
        "models": {name: {s: _score(model, s) for s in SUMMARY} for name, model in models.items()},
        "changes": {
            c["model"]: {s: c["summary"][s]["value"] for s in SUMMARY if c["summary"].get(s)}
            for c in scores["comparisons"]
            if c["against"] == base
        },
        "gate": scores.get("gate", []),
        "seconds": round(sum(t.get("seconds", 0.0) for m in models.values() for t in m["tasks"].values()), 1),
    }


def _score(model: Mapping[str, Any], name: str) -> float | None:
    found = model["categories"].get(name) if name == "speciality" else model[name]
    return None if found is None else float(found)
