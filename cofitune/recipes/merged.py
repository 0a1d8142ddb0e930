"""A run merged into its base: the base's weight files with the trained tensors in their places, and all beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from cofitune.data.template import ChatTemplate, set_template, without_day
from cofitune.errors import ArtifactError
from cofitune.files import write_json, write_tensors, write_text
from cofitune.model.anatomy import build_empty, read_model_config
from cofitune.model.folder import read_generation_config
from cofitune.model.load import dtype_name, load_tokenizer
from cofitune.model.recognise import as_in_files
from cofitune.model.weight_files import fingerprint, parameter_name, size_as
from cofitune.recipes.exported_tokenizer import write_generation, write_tokenizer
from cofitune.recipes.folders import Place, free_bytes
from cofitune.recipes.model_card import FILE as CARD
from cofitune.recipes.model_card import model_card
from cofitune.recipes.model_folder import check_room, copy_rest
from cofitune.temporary import temporary_folder
from cofitune.training.delta import Delta, interpolate, read_delta
from cofitune.training.finite import check_finite

PAIRS = torch.float4_e2m1fn_x2  # two values an element, which torch cannot cast


@dataclass(frozen=True)
class MergeSource:
    """Where a run and its base lie, and the dtype that is written.

    Attributes:
        run: the run as it was named, or the output_dir of its config.
        train: its folder with the delta.
        place: the base's name and revision.
        files: the base's weight files.
        dtype: what every floating-point tensor is written in.
        trust_remote_code: whether code of the base's folder may run.
    """

    run: Path
    train: Path
    place: Place
    files: list[Path]
    dtype: torch.dtype
    trust_remote_code: bool

    @property
    def size(self) -> int:
        """Bytes of the weights to write."""
        return size_as(self.files, self.dtype)

    @property
    def dtype_name(self) -> str:
        """As config.json spells it."""
        return dtype_name(self.dtype)

    def read_delta(self) -> Delta:
        """The run's tensors and manifest.

        Raises:
            ArtifactError: they are of another base.
        """
        return read_delta(self.train, fingerprint(*self.place))


@contextmanager
def merged_for_a_while(source: MergeSource, alpha: float, folder: Path) -> Iterator[Path]:
    """The merged model in a temporary folder inside `folder`; one of a process that was killed goes first.

    Raises:
        UserError: there is no room for it.
    """
    check_room(f"{folder}: the merged model of {source.run}", source.size, free_bytes(folder))
    with temporary_folder("merged-", folder) as target:
        write_merged(target, source, source.read_delta(), alpha, source.run.name)
        yield target


def write_merged(folder: Path, source: MergeSource, delta: Delta, alpha: float, title: str) -> None:
    """Write weights, tokenizer, model card and config into a folder that is there.

    Args:
        delta: of `source.read_delta()`.
        alpha: the trained tensors are base + alpha·(trained − base).
        title: of the model card.
    """
    manifest, place, trusted, base = delta.manifest, source.place, source.trust_remote_code, source.files[0].parent
    _write_weights(folder, source, delta, alpha)
    tokenizer = load_tokenizer(*place, trusted)
    set_template(tokenizer, ChatTemplate.from_manifest(manifest))
    without_day(tokenizer)
    generation = read_generation_config(*place, read_model_config(*place, trusted))
    write_tokenizer(folder, base, tokenizer)
    write_generation(folder, base, tokenizer, generation)
    card = model_card(manifest, base, source.train.parent, alpha, source.dtype_name, title)
    write_text(folder / CARD, card)  # before the rest: the base's own card is another model's
    note = {"cofitune_alpha": alpha} if alpha != 1 else {}
    copy_rest(base, folder, {"dtype": source.dtype_name, **note})


def _write_weights(folder: Path, source: MergeSource, delta: Delta, alpha: float) -> None:
    """The base's weight files one at a time, each trained tensor in its place."""
    files, dtype = source.files, source.dtype
    names = delta.manifest.get("names", {})
    trained = _tensors_in_files(source, delta)
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


def _tensors_in_files(source: MergeSource, delta: Delta) -> dict[str, Tensor]:
    """The trained tensors by their names in the model; those that weight files hold otherwise, as these hold them."""
    tensors, names = delta.tensors, delta.manifest.get("names", {})
    keys: set[str] = set()
    for file in source.files:
        with safe_open(file, framework="pt") as shard:
            keys.update(shard.keys())
    as_they_are = {parameter_name(k, tensors, names.get("prefix", ""), names.get("aliases", {})) for k in keys}
    otherwise = {name: tensor for name, tensor in tensors.items() if name not in as_they_are}
    if not otherwise:
        return tensors
    trusted = source.trust_remote_code
    model = build_empty(read_model_config(*source.place, trusted), trusted)
    return {n: t for n, t in tensors.items() if n not in otherwise} | as_in_files(model, otherwise)
