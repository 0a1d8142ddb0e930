"""The models of an evaluation: which there are, what their answers depend on, whether they can stand side by side."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from cofitune.config import schema
from cofitune.config.load import load_resolved
from cofitune.config.schema import EvalModel
from cofitune.data.chat import set_template
from cofitune.data.template import template_sha256
from cofitune.errors import ArtifactError, ConfigError, UserError
from cofitune.evaluation.lengths import max_positions
from cofitune.evaluation.tasks import is_title
from cofitune.model.anatomy import is_missing_folder, read_model_config
from cofitune.model.folder import read_generation_config
from cofitune.model.load import DTYPES, choose_dtype, coarser, load_tokenizer
from cofitune.model.weight_files import fingerprint, remembered_sha256, stored_dtype, weight_files
from cofitune.recipes.folders import no_run, train_folder
from cofitune.recipes.from_config import chat_template
from cofitune.training.delta import read_manifest

PARTS = ("dtype", "template", "region", "adapter", "softmask", "steps", "ranks")  # of a manifest, what was trained
WHY = {
    "template": "data.template: plain asks all alike",
    "template_sha256": "the chat template's text is another one; data.template: plain asks all alike",
    "tokenizer_sha256": "the tokenizer is another one",
    "end_tokens": "other tokens end its answers (generation_config.json)",
}


@dataclass(frozen=True)
class Source:
    """Whole weights: a folder or a hub name, and what is asked of them.

    Attributes:
        asked: what the prompts and the ends of answers depend on.
        dtype: what its weights are stored in; None where they are no floating-point numbers.
        positions: tokens that the model can attend to.
    """

    name: str
    revision: str | None
    fingerprint: str
    tokenizer: PreTrainedTokenizerBase
    asked: dict[str, Any]
    dtype: torch.dtype | None
    positions: int | None

    @property
    def place(self) -> tuple[str, str | None]:
        """Where it is loaded from."""
        return self.name, self.revision


GetSource = Callable[[str, str | None], Source]  # by name and revision


@dataclass(frozen=True)
class EvalTarget:
    """One model of the table.

    Attributes:
        path: as the config names it.
        source: the whole weights that it stands on.
        train: a run's `train` folder, with the delta; None for whole weights.
        delta_sha256: of the delta; None for whole weights.
        dtype: what its weights, or its delta's, are stored in.
        seed: a run's training seed.
        training: what a run's training stood on, the seed left out: runs that share it differ by their seeds only.
        alpha: how much of a run's training stays; 0 is its base.
        keep: the share of the run's gain that its alpha was chosen to keep; None: the alpha was named.
    """

    name: str
    role: str | None
    path: str
    source: Source
    train: Path | None = None
    delta_sha256: str | None = None
    dtype: torch.dtype | None = None
    seed: int | None = None
    training: str | None = None
    alpha: float = 1.0
    keep: float | None = None

    @property
    def weights(self) -> dict[str, Any]:
        """What names the weights, by content."""
        delta = self.delta_sha256 if self.alpha else None
        results = {"fingerprint": self.source.fingerprint, "delta_sha256": delta}
        return results if self.alpha in (0, 1) else {**results, "alpha": self.alpha}


def find_models(
    base: schema.Model,
    named: Sequence[EvalModel],
    run: Path,
    *,
    data: schema.Data,
    planned_runs: Sequence[EvalModel] = (),
) -> tuple[EvalTarget, ...]:
    """Resolve every model of an evaluation, the base first.

    Args:
        base: the section `model`.
        named: those that `eval.models` names.
        run: the config's own run, which is one of the models where it is trained.
        data: the section `data`, whose template all are asked in.
        planned_runs: runs of this config's own base that are not trained yet; nothing can be asked of them.

    Raises:
        UserError: a model is not there, a run is not trained or belongs to another base, two models share a name, or
            one cannot stand beside the base.
    """
    sources: dict[tuple[str, str | None], Source] = {}

    def source(name: str, revision: str | None) -> Source:
        if (name, revision) not in sources:
            sources[name, revision] = _read_source(name, revision, base.trust_remote_code, data)
        return sources[name, revision]

    own = source(base.name, base.revision)
    results: list[EvalTarget] = []
    for requested in _wanted(base, named, run):
        train = train_folder(requested.path)
        if train is None:
            results.append(_whole(requested, own, source))
        else:
            is_own = train.resolve() == (run / "train").resolve()
            results.append(_run(requested, train, own, source, is_own))
    dtype = choose_dtype(base.dtype)
    results += [
        EvalTarget(one.title, one.role, one.path, own, dtype=dtype, alpha=one.known_alpha, keep=one.keep)
        for one in planned_runs
    ]
    _check_names(results)
    results.sort(key=lambda model: model.role != "base")
    _check_side_by_side(results)
    _check_dtypes(results, dtype)
    return tuple(results)


def _wanted(base: schema.Model, given: Sequence[EvalModel], run: Path) -> list[EvalModel]:
    """The base, this config's own run where it is trained, and what `eval.models` names."""
    named = {Path(m.path).resolve() for m in given if m.alpha == 1 and m.keep is None}
    requested = []
    if all(m.role != "base" for m in given):
        requested.append(EvalModel(path=base.name, role="base", revision=base.revision))
    if train_folder(str(run)) and not {run.resolve(), (run / "train").resolve()} & named:
        requested.append(EvalModel(path=str(run), name="run"))
    return [*requested, *given]


def _whole(requested: EvalModel, own: Source, source: GetSource) -> EvalTarget:
    path = Path(requested.path)
    if requested.alpha != 1:
        raise no_run(requested)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"eval.models: {requested.path} is neither a run whose training has finished (train/manifest.json) nor a "
            "model folder (config.json)"
        )
    if is_missing_folder(requested.path):
        raise UserError(f"eval.models: {requested.path} is not there (seen from {Path.cwd()})")
    same = (requested.path, requested.revision) == own.place
    whole = own if same else source(requested.path, requested.revision)
    return EvalTarget(requested.title, requested.role, requested.path, whole, dtype=whole.dtype)


def _run(requested: EvalModel, train: Path, own: Source, source: GetSource, is_own: bool) -> EvalTarget:
    """A trained run; `is_own`: the config's own, which stands on the config's base."""
    manifest = read_manifest(train)
    base = own
    if manifest.get("base_fingerprint") != own.fingerprint and not is_own and not is_missing_folder(manifest["base"]):
        base = source(manifest["base"], manifest.get("revision"))
    if manifest.get("base_fingerprint") != base.fingerprint:
        raise ArtifactError(
            f"{train}: this delta was trained from another model ({manifest.get('base')}, fingerprint "
            f"{str(manifest.get('base_fingerprint'))[:12]}; {base.name} has {base.fingerprint[:12]})"
        )
    if manifest.get("template", base.asked["template"]) != base.asked["template"]:
        raise UserError(
            f"{train}: was trained under the template '{manifest['template']}' and would be asked in "
            f"'{base.asked['template']}'; set data.template: {manifest['template']}"
        )
    about = manifest.get("chat_template")  # of a run by an older version None
    if about and about["sha256"] != template_sha256(base.tokenizer):
        raise UserError(
            f"{train}: was trained under another text or other settings of its chat template (chat_template_kwargs "
            f"{about['kwargs']}, system: {about['system']}) than it would be asked in; set data.template, "
            "data.chat_template_kwargs and data.system as its config.yaml has them"
        )
    delta = train / "delta.safetensors"
    if delta.is_file() and remembered_sha256(delta) != manifest["delta_sha256"]:
        raise ArtifactError(f"{delta}: its bytes are not those that the manifest names; train again")
    training, seed = _training(train, manifest)
    alpha = requested.known_alpha
    if training is not None and (alpha != 1 or requested.keep):
        training = f"{training} keeping {requested.keep:g}" if requested.keep else f"{training} at {alpha:g}"
    return EvalTarget(
        name=requested.title,
        role=requested.role,
        path=requested.path,
        source=base,
        train=train,
        delta_sha256=manifest["delta_sha256"],
        dtype=DTYPES[manifest["dtype"]],
        seed=seed,
        training=training,
        alpha=alpha,
        keep=requested.keep,
    )


def _training(train: Path, manifest: Mapping[str, Any]) -> tuple[str | None, int | None]:
    """What a training stood on besides its seed, and the seed; None where the run does not say."""
    config = None
    with suppress(ConfigError):  # of another version of ours, or gone
        config = load_resolved(train / "config.yaml")
    if config is None:
        return None, None
    stood_on = {
        "base": manifest.get("base_fingerprint"),
        "data": [d["sha256"] for d in manifest.get("data", ())],
        "weights": [source.weight for source in config.data.train],
        "used": {what: entry["sha256"] for what, entry in manifest.get("used", {}).items()},
        **{part: manifest.get(part) for part in PARTS},
        "train": config.train.model_dump(mode="json", exclude={"seed"}),
        "encoding": config.data.model_dump(mode="json", exclude={"train", "date"}),
    }
    return json.dumps(stood_on, sort_keys=True), config.train.seed


def _read_source(name: str, revision: str | None, trust: bool, data: schema.Data) -> Source:
    model_config = read_model_config(name, revision, trust)
    dtype = stored_dtype(weight_files(name, revision))
    tokenizer = load_tokenizer(name, revision, trust)
    template = set_template(tokenizer, chat_template(data))
    generation = read_generation_config(name, revision, model_config)
    ends = generation.eos_token_id
    asked = {
        "template": template,
        "template_sha256": _sha256(str(tokenizer.chat_template)),
        "tokenizer_sha256": _sha256(_tokenizer_text(tokenizer)),
        "end_tokens": sorted(ends if isinstance(ends, list) else [ends]) if ends is not None else [],
    }
    return Source(name, revision, fingerprint(name, revision), tokenizer, asked, dtype, max_positions(model_config))


def _tokenizer_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """How text is cut, without the padding and truncation that the last caller had set."""
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({k: v for k, v in whole.items() if k not in ("padding", "truncation")}, sort_keys=True)


def _check_names(models: list[EvalTarget]) -> None:
    seen: dict[str, EvalTarget] = {}
    for model in models:
        if not is_title(model.name):
            raise UserError(
                f"eval.models: '{model.name}' cannot be a name (letters, digits, spaces and . _ + -: it also names a "
                "file); give one: name: …, or --model NAME=PATH"
            )
        other = seen.setdefault(model.name.lower(), model)
        if other is not model:
            raise UserError(
                f"eval.models: two models are called '{model.name}' ({other.path} and {model.path}); give each a name: "
                "of its own, or --model NAME=PATH"
            )


def _check_side_by_side(models: list[EvalTarget]) -> None:
    """Raise a UserError where the models would not be asked the same prompts, tokens and ends."""
    base, *others = models
    problems = [
        f"'{model.name}' ({model.path}): {key} is {_short(value)} and {_short(base.source.asked[key])} for "
        f"'{base.name}': {WHY[key]}"
        for model in others
        for key, value in model.source.asked.items()
        if value != base.source.asked[key]
    ]
    if problems:
        raise UserError("these models cannot be put side by side: " + "; ".join(problems))


def _check_dtypes(models: list[EvalTarget], dtype: torch.dtype) -> None:
    """Raise a UserError where a model's weights were rounded more than the base's are when they are scored in `dtype`.

    What rounding alone changes would stand in the table as learnt or forgotten.
    """

    def scored(model: EvalTarget) -> torch.dtype:
        return coarser((model.dtype or dtype, dtype))

    base, *others = models
    for model in others:
        if coarser((scored(base), scored(model))) != scored(base):
            own, theirs = (str(scored(m)).removeprefix("torch.") for m in (model, base))
            raise UserError(
                f"these models cannot be put side by side: the weights of '{model.name}' ({model.path}) are in {own}, "
                f"those of '{base.name}' would be scored in {theirs}; model.dtype=bfloat16 rounds all alike"
            )


def _short(value: Any) -> str:
    return str(value)[:12] if isinstance(value, str) else str(value)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
