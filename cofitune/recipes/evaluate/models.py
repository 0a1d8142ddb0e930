"""The models of an evaluation: which there are, and what their answers depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from cofitune.config import schema
from cofitune.config.load import load_resolved
from cofitune.config.schema import EvalModel
from cofitune.data.chat import set_template
from cofitune.data.template import is_dated, template_sha256
from cofitune.errors import ArtifactError, ConfigError, UserError
from cofitune.evaluation.lengths import max_positions
from cofitune.model.anatomy import read_model_config
from cofitune.model.folder import read_generation_config
from cofitune.model.load import DTYPES, choose_dtype, load_tokenizer
from cofitune.model.other_folders import is_missing_folder
from cofitune.model.weight_files import fingerprint, stored_dtype, weight_files
from cofitune.recipes.evaluate.targets import EvalTarget, Source, check_dtypes, check_names, check_side_by_side
from cofitune.recipes.folders import no_run, train_folder
from cofitune.recipes.from_config import chat_template
from cofitune.training.delta import check_delta, read_manifest

PARTS = ("dtype", "template", "region", "adapter", "softmask", "steps", "ranks")  # of a manifest, what was trained
GetSource = Callable[[str, str | None], Source]  # by name and revision


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
    check_names(results)
    results.sort(key=lambda model: model.role != "base")
    check_side_by_side(results)
    check_dtypes(results, dtype)
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
    check_delta(train, manifest)
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
        day=about.get("day") if about and is_dated(base.tokenizer) else None,
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
    asked: dict[str, object] = {
        "template": template,
        "template_sha256": _sha256(str(tokenizer.chat_template)),
        "tokenizer_sha256": _sha256(_tokenizer_text(tokenizer)),
        "end_tokens": sorted(ends if isinstance(ends, list) else [ends]) if ends is not None else [],
    }
    positions, kind = max_positions(model_config), model_config.model_type
    return Source(name, revision, fingerprint(name, revision), tokenizer, asked, dtype, positions, kind)


def _tokenizer_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """How text is cut, without the padding and truncation that the last caller had set."""
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({k: v for k, v in whole.items() if k not in ("padding", "truncation")}, sort_keys=True)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
