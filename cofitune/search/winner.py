"""The winner's region file: what a search hands to `train` under `region: search`."""

from __future__ import annotations

from pathlib import Path

import yaml

from cofitune.errors import ArtifactError, RegionError
from cofitune.files import write_text
from cofitune.model.layouts import expand_modules
from cofitune.search.trial import Trial

FILE_NAME = "region.yaml"
_HEAD = (
    "# The winner of `cofitune search`; `cofitune train` takes its layers and modules under `region: search`, and\n"
    "# trains by the settings of its own section `train`: the steps and the peak rate below were the trial's.\n"
)


def write_winner(folder: Path, winner: Trial, reason: str, model: str) -> Path:
    """Write `region.yaml`: layers and modules as a config's `region` section has them, then scores and reason.

    Args:
        folder: the search's folder.
        reason: why it won, and what else there is to know: what ties with it, what was not tried.
        model: fingerprint of the base model that the trials started from.

    Returns:
        The file's path.

    Raises:
        ArtifactError: the winner trains nothing (the base has no region to write).
    """
    if winner.region is None:
        raise ArtifactError(f"{folder}: the base is no region that could be trained")
    scores = {"speciality": winner.speciality, "versatility": winner.versatility, "unified": winner.unified}
    figures: dict[str, object] = {"scores": {**scores, "categories": winner.categories}}
    if winner.curve:  # nats a token, lower is better; margins in nats, higher is better
        losses = {"speciality_loss": winner.loss, "drift": winner.drift, "unit": "nats a token"}
        figures = {"losses": {**losses, "margins": winner.margins}}
    content = {
        **winner.region.to_dict(),
        "trial": winner.id,
        "trained": {"steps": winner.steps, "learning_rate": winner.learning_rate},
        **figures,
        "reason": reason,
        "model": model,
    }
    path = folder / FILE_NAME
    write_text(path, _HEAD + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120))
    return path


def read_winner(folder: Path, model: str | None = None) -> tuple[str, tuple[str, ...]]:
    """Read the winner's layers (`8-15`) and modules.

    Args:
        folder: the search's folder.
        model: fingerprint of the base model that is to be trained; None leaves it unchecked.

    Raises:
        ArtifactError: there is no finished search here, the file is damaged, or it belongs to another base model.
    """
    path = folder / FILE_NAME
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no finished search here; run `cofitune search` with this config first") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: this region file is damaged: {str(error).splitlines()[0]}") from None
    layers, modules = _region_of(content, path)
    if model is not None and content.get("model") not in (None, model):
        raise ArtifactError(f"{path}: this region was searched for another base model; run `cofitune search` again")
    return layers, modules


def _region_of(content: object, path: Path) -> tuple[str, tuple[str, ...]]:
    layers = content.get("layers") if isinstance(content, dict) else None
    modules = content.get("modules") if isinstance(content, dict) else None
    if isinstance(layers, int) and not isinstance(layers, bool):
        layers = str(layers)  # a hand-written `layers: 3`
    if not isinstance(layers, str) or not isinstance(modules, list) or not modules:
        raise ArtifactError(f"{path}: this region file is damaged: it needs 'layers' and a list 'modules'")
    try:
        return layers, expand_modules([str(m) for m in modules])
    except RegionError as error:
        raise ArtifactError(f"{path}: this region file is damaged: {error}") from None
