"""Contents that carry their own checksum, so that one flipped bit in a file of ours is found, and that have a shape."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cofitune.errors import ArtifactError
from cofitune.files import CHECKSUM, sha256_json, write_tensors

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from torch import Tensor

T = TypeVar("T")
V = TypeVar("V")
_ADAPTERS: dict[type, TypeAdapter[Any]] = {}


def without_checksum(content: Mapping[str, V]) -> dict[str, V]:
    """The content, compared with its checksum; what an older version wrote has none.

    Raises:
        ValueError: it is not what was written.
    """
    plain = dict(content)
    expected = plain.pop(CHECKSUM, None)
    if expected is not None and expected != sha256_json(plain):
        raise ValueError("it is not what was written (its checksum differs)")
    return plain


def shaped(kind: type[T], content: Mapping[str, object]) -> T:
    """Make a dataclass of JSON's values; keys that it does not have are left aside.

    Raises:
        ValueError: a value lacks or is of another type; the message names its place.
    """
    from pydantic import ValidationError

    try:
        result: T = _adapter(kind).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        lacks = first["type"] in ("missing", "missing_argument")
        raise ValueError(f"{place} is missing" if lacks else f"{place}: {first['msg']}") from None
    return result


def _adapter(kind: type[T]) -> TypeAdapter[Any]:
    """A class's own, made once: that takes longer than reading with it."""
    from pydantic import TypeAdapter

    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


def write_checked_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose metadata hold the sha256 of its tensors and of the other metadata."""
    write_tensors(path, tensors, {**metadata, CHECKSUM: _sha256(tensors, metadata)})


def read_checked_tensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `write_checked_tensors` wrote: the tensors, and the metadata.

    Raises:
        ArtifactError: it is missing, or not what was written; `what` names it in the message.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dict
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no {what} here") from None
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: this {what} is damaged: {error}") from None
    metadata.pop("format", None)
    if metadata.pop(CHECKSUM, None) != _sha256(tensors, metadata):
        raise ArtifactError(f"{path}: this {what} is damaged: its bytes are not those that were written")
    return tensors, metadata


def _sha256(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    import torch

    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
