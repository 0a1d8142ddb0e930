"""What a run's alpha is chosen by: its development items, and its rehearsal for the drift. No weights load here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from cofitune import __version__
from cofitune.config import schema
from cofitune.config.load import load_resolved
from cofitune.config.schema import Config, Versatility
from cofitune.data.chat import ChatTemplate, set_template
from cofitune.data.encoded import Encoding, Examples, encode_sources, tokenizer_sha256
from cofitune.distributed import device_name
from cofitune.errors import ArtifactError, UserError
from cofitune.evaluation.items import EvalTask
from cofitune.evaluation.metrics import METRICS
from cofitune.evaluation.tasks import load_drift, load_tasks
from cofitune.files import sha256_file, sha256_json
from cofitune.model.load import load_tokenizer
from cofitune.model.weight_files import fingerprint
from cofitune.recipes.alpha.batches import Batches
from cofitune.recipes.alpha.measure import DriftMeasure, LossMeasure, Measure, TaskMeasure
from cofitune.recipes.folders import Place, check_trusted, find_base
from cofitune.recipes.from_config import base_config, data_sources, eval_tasks, kernels_recorded
from cofitune.rehearsal.items import check_base
from cofitune.training.delta import check_delta, read_manifest

FORMAT = 1  # of alpha.json
FOLDER = "alpha"  # below a run


@dataclass(frozen=True)
class AlphaPlan:
    """All that a choice of alpha depends on.

    Attributes:
        config: the one that the run was trained by.
        folder: `<run>/alpha`.
        train: the folder of its training, with the delta.
        base: where the base is now.
        base_fingerprint, delta_sha256: which base and which delta they are, by content.
        model: how the base is loaded: the section `model`, in the training's dtype.
        drift: None where it cannot be measured.
        no_drift: why it cannot; empty where it can.
        settings: what all measurements depend on besides their items.
    """

    config: Config
    folder: Path
    train: Path
    base: Place
    base_fingerprint: str
    delta_sha256: str
    model: schema.Model
    measure: Measure
    drift: DriftMeasure | None
    no_drift: str
    settings: dict[str, Any]

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.train.parent

    @property
    def own_config(self) -> Path:
        """The config that the run was trained by."""
        return _own_config_file(self.train)

    @property
    def file(self) -> Path:
        """Where the choice is written."""
        return self.folder / "alpha.json"

    @property
    def identity(self) -> str:
        """A hash over all that a measurement depends on, by content: points of another one are measured again."""
        drift = self.drift and [self.drift.loaded.sha256, self.drift.batch_size]
        own = {"format": FORMAT, "base": self.base_fingerprint, "delta": self.delta_sha256, "drift": drift}
        return sha256_json(own | {"measure": self.measure.settings(), "settings": self.settings})

    def about(self) -> dict[str, object]:
        """What alpha.json tells besides the points and the choice."""
        drift: dict[str, object] = {"unknown": self.no_drift}
        if self.drift:
            loaded = self.drift.loaded
            drift = {"path": loaded.task.path, "items": len(loaded.items), "sha256": loaded.sha256}
        return {
            "measure": self.measure.about(),
            "drift": drift,
            "delta_sha256": self.delta_sha256,
            "base_fingerprint": self.base_fingerprint,
            "settings": {name: value for name, value in self.settings.items() if name != "versions"},
            "versions": {**self.settings["versions"], **self.measure.settings().get("versions", {})},
            "identity": self.identity,
        }


def plan_alpha(run: Path, base: Place | None = None, *, trust_remote_code: bool = False) -> AlphaPlan:
    """Find out by what a run's alpha is chosen, and check everything that the user could have got wrong.

    Args:
        run: the run's output_dir (or its `train` folder).
        base: where the base model is now, if it has moved since the training.
        trust_remote_code: whether code of the base's folder may run; the run's own word is not enough.

    Raises:
        UserError: the run is not trained, its base is gone, another one, or needs code that is not trusted, it names no
            development items, or they are items of its test.
    """
    train = run if run.name == "train" else run / "train"
    manifest = read_manifest(train)
    config = load_resolved(_own_config_file(train))
    name, revision = find_base(manifest, base)
    base_fingerprint = fingerprint(name, revision)
    check_delta(train, manifest)
    check_trusted(manifest, trust_remote_code)
    about = {"name": name, "revision": revision, "dtype": manifest["dtype"]}
    model = config.model.model_copy(update={**about, "trust_remote_code": trust_remote_code})
    tokenizer = load_tokenizer(name, revision, model.trust_remote_code)
    template = set_template(tokenizer, ChatTemplate.from_manifest(manifest))
    tokens = tokenizer_sha256(tokenizer)  # before anyone sets its padding
    batches = Batches(model, tokenizer)
    measure = _measure(config.search.eval, config.data, config.train, batches, _Tested(config.eval))
    drift, no_drift = _drift(
        _rehearsal_folders(manifest, train.parent), batches, config.eval.batch_size, (name, base_fingerprint, tokens)
    )
    settings = {
        "dtype": manifest["dtype"],
        "attn_implementation": model.attn_implementation,
        **kernels_recorded(model, base_config(model).model_type),
        "device": device_name(),
        "trust_remote_code": trust_remote_code,
        "template": template,
        "tokenizer_sha256": tokens,
        "versions": {"cofitune": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    return AlphaPlan(
        config=config,
        folder=train.parent / FOLDER,
        train=train,
        base=(name, revision),
        base_fingerprint=base_fingerprint,
        delta_sha256=manifest["delta_sha256"],
        model=model,
        measure=measure,
        drift=drift,
        no_drift=no_drift,
        settings=settings,
    )


def _own_config_file(train: Path) -> Path:
    """The resolved config that the run was trained by."""
    places = (train / "config.yaml", train.parent / "config.yaml")
    result = next((place for place in places if place.is_file()), None)
    if result is None:
        raise ArtifactError(f"{places[0]}: is missing; it names the development items that alpha is chosen by")
    return result


def _measure(
    requested: schema.Eval | None,
    data: schema.Data,
    train: schema.Train,
    batches: Batches,
    tested: _Tested,
) -> Measure:
    """The speciality tasks of search.eval (`requested`), or else the loss on data.validation."""
    tokenizer = batches.tokenizer
    if requested is not None and requested.speciality:
        only = requested.model_copy(update={"versatility": Versatility(), "drift": ()})
        # a cross-entropy has no scale from guessing to all right, and enters no mean
        tasks = tuple(t for t in load_tasks(eval_tasks(only)) if t.metric.unit == "share")
        if tasks:
            tested.refuse("search.eval.speciality", [t.task for t in tasks])
            return TaskMeasure(tasks, tokenizer, batches.size(requested.batch_size, tasks))
    if data.validation:
        encoding = Encoding(data.max_length, data.train_on, data.on_bad_item)
        encoded = encode_sources(data_sources(data.validation), tokenizer, encoding)
        sources = tuple(e.opened for e in encoded)
        tested.refuse_files("data.validation", (file for source in sources for file in source.files))
        examples, size = Examples.chain(e.examples for e in encoded), train.per_device_train_batch_size
        return LossMeasure(examples, sources, encoding, size, tokenizer.pad_token_id)
    raise UserError(
        "alpha: auto needs development items, and the config that the run was trained by names none: name tasks with a "
        "share of right answers in search.eval.speciality, or items in data.validation (never those of eval, the test)"
    )


class _Tested:
    """The items of a config's test, the section `eval`, by their files' contents and the harness's names."""

    def __init__(self, test: schema.Eval) -> None:
        tasks = [task for task in eval_tasks(test) if task.kind != "drift"]
        self._names = {task.harness for task in tasks if task.harness}
        files = (Path(task.path) for task in tasks if not task.harness)
        self._files = {sha256_file(file) for file in files if file.is_file()}

    def refuse(self, where: str, tasks: Iterable[EvalTask]) -> None:
        """Raise a UserError where one of these tasks asks what the test asks."""
        for task in tasks:
            if task.harness in self._names:
                raise self._error(where, str(task.harness))
        self.refuse_files(where, (Path(task.path) for task in tasks if not task.harness))

    def refuse_files(self, where: str, files: Iterable[Path]) -> None:
        """Raise a UserError where one of these files is one of the test's."""
        for file in files:
            if sha256_file(file) in self._files:
                raise self._error(where, str(file))

    @staticmethod
    def _error(where: str, what: str) -> UserError:
        return UserError(
            f"{where}: {what} is in the test (eval), too: alpha must not be chosen by what it is judged by"
        )


def _rehearsal_folders(manifest: dict[str, Any], run: Path) -> list[Path]:
    """Where the rehearsal of a run may lie: the one that it was trained on first."""
    used = manifest.get("used", {}).get("rehearsal")
    return [*([Path(used["path"]).parent] if used else []), run / "rehearsal"]


def _drift(
    places: Sequence[Path], batches: Batches, batch_size: int | str, made_by: tuple[str, str, str]
) -> tuple[DriftMeasure | None, str]:
    """What drift is measured on, or why it is not.

    Args:
        places: where a rehearsal may lie, the first that holds one counts.
        made_by: the base's name and fingerprint, and the tokenizer's hash, which the rehearsal must be of.
    """
    folder = next((place for place in places if (place / "manifest.json").is_file()), None)
    if folder is None:
        return None, f"no rehearsal in {places[0]} (`cofitune rehearse` writes one)"
    task = EvalTask("drift", "drift", str(folder), "drift", METRICS["drift"].name)
    try:
        loaded = load_drift(task)
        if loaded.rehearsal is not None:
            check_base(loaded.rehearsal, *made_by)
    except ArtifactError as error:
        return None, str(error)
    return DriftMeasure(loaded, batches.tokenizer, batches.size(batch_size, (loaded,))), ""
