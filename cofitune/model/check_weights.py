"""Weight files compared with the model that config.json describes, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cofitune.errors import UserError
from cofitune.model.anatomy import Anatomy
from cofitune.model.weight_files import parameter_name, unreadable


def check_files(files: list[Path], anatomy: Anatomy) -> None:
    """Compare the weight files' headers with the model's names and shapes; of contents, only what two keys hold of one.

    What the files hold in parts is left to transformers. Under ZeRO-3 a mismatch would raise on rank 0 alone and hang
    the others; and a tensor that the files name otherwise would find no place in them when the model is exported.

    Raises:
        UserError: a file is no safetensors file, a tensor has another shape, is missing, or is there twice with
            different values.
    """
    missing = dict.fromkeys(name for name in anatomy.shapes if name not in anatomy.converted)
    places: dict[str, list[tuple[Path, str]]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as header:
                for key in header.keys():  # noqa: SIM118 -- not a dict
                    name = parameter_name(key, anatomy.shapes, anatomy.prefix, anatomy.aliases)
                    if name is None:
                        continue
                    shape = tuple(header.get_slice(key).get_shape())
                    if shape != anatomy.shapes[name]:
                        raise UserError(
                            f"{file}: {key} has shape {list(shape)}, config.json says {list(anatomy.shapes[name])}"
                        )
                    missing.pop(name, None)
                    places.setdefault(name, []).append((file, key))
        except (OSError, SafetensorError) as error:
            raise unreadable(file, error) from error
    if missing:
        raise lacking(str(files[0].parent), list(missing))
    for name, held in places.items():
        _check_same(name, held)


def lacking(name: str, missing: list[str]) -> UserError:
    """What is wrong with a model's files that lack some of its tensors."""
    how = "are they an adapter's, or saved under other names? (transformers' save_pretrained writes the model's own)"
    if len(missing) == 1 and "head" in missing[0]:
        how = "if its head is the embedding, tie_word_embeddings must be true in its config.json"
    return UserError(
        f"model.name: the weight files of {name} lack {len(missing)} of the model's tensors ({missing[0]}, …); {how}"
    )


def _check_same(name: str, places: list[tuple[Path, str]]) -> None:
    """Raise a UserError where a parameter stands in the files twice and not alike.

    transformers would take the last of two equal keys, and untie what config.json ties.
    """
    for file, key in places[1:]:
        if torch.equal(_read(*places[0]), _read(file, key)):
            continue
        first_file, first_key = places[0]
        if key == first_key:
            raise UserError(
                f"model.name: {key} stands in {first_file} and, with other values, in {file}; which of them is meant? "
                "Delete the file that is not, and what its index says of it"
            )
        raise UserError(
            f"model.name: {first_key} and {key} are one tensor by {first_file.parent / 'config.json'}, and the weight "
            "files hold two different ones; set tie_word_embeddings to false there if both are meant, or delete one"
        )


def _read(file: Path, key: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(key)
    return tensor
