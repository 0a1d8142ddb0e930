"""`cofitune export`: the base model with the run's tensors in their places, as a complete Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from safetensors import safe_open
from torch import Tensor

from cofitune.config.eval import KEEP
from cofitune.config.load import load_config
from cofitune.data.template import ChatTemplate, set_template, without_day
from cofitune.errors import ArtifactError, UserError
from cofitune.files import exclusive, read_json, write_checked_json, write_json, write_tensors, write_text
from cofitune.model.anatomy import build_empty, is_missing_folder, read_model_config
from cofitune.model.folder import read_generation_config
from cofitune.model.load import DTYPES, load_tokenizer
from cofitune.model.recognise import as_in_files
from cofitune.model.weight_files import fingerprint, parameter_name, weight_files
from cofitune.recipes.alpha.recipe import check_keep, choose_alpha
from cofitune.recipes.exported_tokenizer import write_generation, write_tokenizer
from cofitune.recipes.folders import check_trusted
from cofitune.recipes.model_card import FILE as CARD
from cofitune.recipes.model_card import model_card
from cofitune.reports.console import say
from cofitune.training.delta import Delta, interpolate, read_delta, read_manifest
from cofitune.training.finite import check_finite

MARK = "cofitune_export.json"  # in an exported folder: the files that we wrote into it
PAIRS = torch.float4_e2m1fn_x2  # two values an element, which torch cannot cast
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


def export(
    run: Path,
    to: Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    alpha: float | Literal["auto"] = 1.0,
    keep: float = KEEP,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> Path:
    """Write a folder for `AutoModelForCausalLM.from_pretrained`, one of the base's weight files at a time.

    Every floating-point tensor is written in the training dtype, so that the folder's logits equal the trained
    engine's; another `dtype` casts, and equality is not promised.

    Args:
        run: the run's output_dir (or its `train` folder, or its config).
        to: the new folder.
        base: where the base model is now, if it has moved since the training.
        dtype: float32 or bfloat16; None keeps the training's.
        alpha: how much of the training to keep: the trained tensors are base + alpha·(trained − base). auto: as
            `cofitune.recipes.alpha.recipe` chooses it. config.json names one other than 1.
        keep: under auto, the share of the run's gain on its development items that is enough.
        trust_remote_code: whether code of the base's folder may run; the run's manifest may name any folder as its
            base, so its own word is not enough.

    Raises:
        UserError: alpha lies outside [0, 1] or cannot be chosen, the run is not trained, its base is gone or another
            one, or `to` holds something already.
    """
    console = console or Console()
    _check_alpha(alpha, keep)
    if run.suffix in (".yaml", ".yml") and run.is_file():
        run = load_config(run).run
    folder = run if run.name == "train" else run / "train"
    manifest = read_manifest(folder)
    check_trusted(manifest, trust_remote_code)
    name = base or manifest["base"]
    revision = None if base else manifest["revision"]
    if is_missing_folder(name):
        raise UserError(f"the base model {name} is not here (seen from {Path.cwd()}); say where it is with --base")
    files = weight_files(name, revision)
    to = _check_target(to, [run, files[0].parent], overwrite)
    if alpha == "auto":
        alpha = choose_alpha(run, keep, base=(name, revision), trust_remote_code=trust_remote_code, console=console)
    delta = read_delta(folder, fingerprint(name, revision))
    parts = ExportParts(
        files=files,
        delta=delta,
        place=(name, revision),
        dtype=DTYPES[dtype or manifest["dtype"]],
        alpha=alpha,
        trust_remote_code=trust_remote_code,
        run=folder.parent,
    )
    with exclusive(to, "export"):
        _write_folder(to, parts)
    how = f" at alpha {alpha:g}" if alpha != 1 else ""
    say(console, f"wrote {to}: {name} with {len(delta.tensors)} trained tensors{how}, {parts.dtype_name}")
    return to


def _check_alpha(alpha: float | Literal["auto"], keep: float) -> None:
    if alpha == "auto":
        check_keep(keep)
    elif not 0 <= alpha <= 1:
        raise UserError(f"--alpha {alpha:g}: from 0, the base, to 1, the run; or auto")


@dataclass(frozen=True)
class ExportParts:
    """What an export is made of.

    Attributes:
        files: the base's weight files.
        delta: the run's, with its manifest.
        place: the base's name and revision, for its tokenizer.
        dtype: what every floating-point tensor is written in.
        alpha: how much of the training stays.
        trust_remote_code: whether the base's tokenizer may run code of its folder.
        run: the config's output_dir, whose scores the model card tells.
    """

    files: list[Path]
    delta: Delta
    place: tuple[str, str | None]
    dtype: torch.dtype
    alpha: float
    trust_remote_code: bool
    run: Path

    @property
    def dtype_name(self) -> str:
        """As config.json spells it."""
        return str(self.dtype).removeprefix("torch.")


def _write_folder(to: Path, parts: ExportParts) -> None:
    """Write all of it beside `to`, then put it there in one move: half a folder must not be taken for a model."""
    building = to.with_name(f".{to.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    manifest = parts.delta.manifest
    try:
        _write_weights(parts, building)
        tokenizer = load_tokenizer(*parts.place, parts.trust_remote_code)
        set_template(tokenizer, ChatTemplate.from_manifest(manifest))
        without_day(tokenizer)
        base = parts.files[0].parent
        generation = read_generation_config(*parts.place, read_model_config(*parts.place, parts.trust_remote_code))
        write_tokenizer(building, base, tokenizer)
        write_generation(building, base, tokenizer, generation)
        card = model_card(manifest, base, parts.run, parts.alpha, parts.dtype_name, to.name)
        write_text(building / CARD, card)  # before the rest: the base's own card is another model's
        _write_rest(base, building, parts.dtype_name, parts.alpha)
        written = sorted(path.relative_to(building).as_posix() for path in building.rglob("*") if path.is_file())
        write_checked_json(building / MARK, {"files": written})
        if to.exists():  # empty, or an export of which all files are known
            shutil.rmtree(to)
        building.rename(to)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_weights(parts: ExportParts, folder: Path) -> None:
    """The base's weight files one at a time, each trained tensor in its place."""
    files, dtype, alpha = parts.files, parts.dtype, parts.alpha
    names = parts.delta.manifest.get("names", {})
    trained = _tensors_in_files(parts)
    placed: set[str] = set()
    weight_map: dict[str, str] = {}
    size = 0
    for file in files:
        tensors: dict[str, Tensor] = {}
        with safe_open(file, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118 -- not a dict
                name = parameter_name(key, trained, names.get("prefix", ""), names.get("aliases", {}))
                placed.update([name] if name else [])
                if name is None:
                    tensor = shard.get_tensor(key)
                elif alpha == 1:
                    tensor = trained[name]
                else:
                    tensor = interpolate(shard.get_tensor(key), trained[name], alpha)
                tensors[key] = tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != PAIRS else tensor
                if name is not None:  # what the base's own tensors hold is the base's business
                    check_finite(name, tensors[key])
        write_tensors(folder / file.name, tensors)
        weight_map.update(dict.fromkeys(tensors, file.name))
        size += sum(t.numel() * t.element_size() for t in tensors.values())
    lost = sorted(trained.keys() - placed)
    if lost:
        raise ArtifactError(
            f"the base's weight files have no place for {', '.join(lost[:3])}: they name tensors otherwise"
        )
    if len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def _tensors_in_files(parts: ExportParts) -> dict[str, Tensor]:
    """The trained tensors by their names in the model; those that weight files hold otherwise, as these hold them."""
    tensors, names = parts.delta.tensors, parts.delta.manifest.get("names", {})
    keys: set[str] = set()
    for file in parts.files:
        with safe_open(file, framework="pt") as shard:
            keys.update(shard.keys())
    as_they_are = {parameter_name(k, tensors, names.get("prefix", ""), names.get("aliases", {})) for k in keys}
    otherwise = {name: tensor for name, tensor in tensors.items() if name not in as_they_are}
    if not otherwise:
        return tensors
    model = build_empty(read_model_config(*parts.place, parts.trust_remote_code), parts.trust_remote_code)
    return {n: t for n, t in tensors.items() if n not in otherwise} | as_in_files(model, otherwise)


def _write_rest(source: Path, folder: Path, dtype: str, alpha: float) -> None:
    """The config with its true dtype and an alpha other than 1, and what else is small and not written yet."""
    for file in source.iterdir():
        is_weights = file.suffix in WEIGHTS or file.name.endswith(".index.json")
        if file.is_file() and not is_weights and file.name != MARK and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    config: dict[str, object] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for key in ("torch_dtype", "cofitune_alpha"):  # of a base that was exported itself, another run's
        config.pop(key, None)
    note = {"cofitune_alpha": alpha} if alpha != 1 else {}
    write_json(folder / "config.json", {**config, "dtype": dtype, **note})


def _check_target(to: Path, kept: list[Path], overwrite: bool) -> Path:
    """The folder to write, absolute.

    Raises:
        UserError: it is a file, is or holds the run or the base model, or holds something that may not be replaced.
    """
    target = to.resolve()
    for folder in (k.resolve() for k in kept):
        if target == folder or target in folder.parents:
            raise UserError(f"--to {to}: would replace {folder}, which the export reads; choose another folder")
    if target.exists() and not target.is_dir():
        raise UserError(f"--to {to}: is a file; name a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UserError(f"--to {to}: exists already and is not empty; choose another folder, or --overwrite it")
    if target.is_dir() and any(target.iterdir()):
        _check_replaceable(target, to)
    return target


def _check_replaceable(target: Path, to: Path) -> None:
    """Raise a UserError where a folder is no export, or holds files that no export wrote."""
    if not (target / MARK).is_file():
        raise UserError(f"--to {to}: is no folder that an export wrote (it has no {MARK}), so it is not replaced")
    listed = read_json(target / MARK, "list of an export's files").get("files")
    known = {MARK, *(name for name in (listed if isinstance(listed, list) else ()) if isinstance(name, str))}
    found = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir())
    foreign = [name for name in found if name not in known]
    if foreign:
        raise UserError(f"--to {to}: holds {foreign[0]}, which no export wrote; move it away, or choose another folder")
