"""The files of a model: which hold its weights, their dtype, and the fingerprint of their content."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections import Counter
from collections.abc import Container, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cofitune.errors import RepairWarning, UserError, WriteError
from cofitune.files import cache_folder, sha256_file, sha256_json, write_json
from cofitune.model.anatomy import Anatomy
from cofitune.model.folder import first_line, read_object, refuse_adapter

# as safetensors' headers call them
STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def check_files(files: list[Path], anatomy: Anatomy) -> None:
    """Compare the weight files' headers with the model's names and shapes, before anything is loaded.

    What the files hold in parts is left to transformers. Under ZeRO-3 a mismatch would raise on rank 0 alone and hang
    the others; and a tensor that the files name otherwise would find no place in them when the model is exported.

    Raises:
        UserError: a file is no safetensors file, a tensor has another shape, or one of the model's is missing.
    """
    missing = dict.fromkeys(name for name in anatomy.shapes if name not in anatomy.converted)
    for file in files:
        try:
            with safe_open(file, framework="pt") as header:
                for key in header.keys():  # noqa: SIM118 -- not a dict
                    name = parameter_name(key, anatomy.shapes, anatomy.prefix, anatomy.aliases)
                    shape = tuple(header.get_slice(key).get_shape())
                    if name is not None and shape != anatomy.shapes[name]:
                        raise UserError(
                            f"{file}: {key} has shape {list(shape)}, config.json says {list(anatomy.shapes[name])}"
                        )
                    missing.pop(name or "", None)
        except (OSError, SafetensorError) as error:
            raise _unreadable(file, error) from error
    if missing:
        raise _lacking(str(files[0].parent), list(missing))


def parameter_name(key: str, known: Container[str], prefix: str, aliases: Mapping[str, str]) -> str | None:
    """The parameter that a weight file's key means: of that name, of that name behind the base model's prefix (GPT-2's
    files leave out `transformer.`), or the one that such a name is an alias of; None where `known` has none of them."""
    names = (key, prefix + key)
    return next((n for name in names for n in (name, aliases.get(name, "")) if n in known), None)


def weight_files(name: str, revision: str | None = None, download: bool = True) -> list[Path]:
    """The safetensors files of a model folder, or of a hub model, in order.

    Args:
        download: fetch a hub model that is not in the hub's cache yet; a dry run does not.

    Raises:
        UserError: there are none, the index is damaged, or an adapter lies beside them.
    """
    folder = Path(name)
    if not folder.is_dir():
        patterns = ["*.json", "*.jinja", "*.model", "*.txt", "model.safetensors"]
        folder = _hub_folder(name, revision, patterns, download)
    refuse_adapter(folder, name)
    names = _chosen_files(folder)
    if not Path(name).is_dir():  # only what the index names: some hub models carry a second copy of their weights
        folder = _hub_folder(name, revision, names, download)
    files = [folder / n for n in names]
    missing = [str(f) for f in files if not f.is_file()]
    if missing and any(folder.glob("*.gguf")):
        raise UserError(
            f"model.name: {name} has its weights in GGUF, which every rank would have to dequantise whole; convert it "
            "to safetensors once, as scripts/small_model.py does"
        )
    if missing:
        raise UserError(f"model.name: {name} has no safetensors weights (missing: {', '.join(missing)})")
    return files


def _chosen_files(folder: Path) -> list[str]:
    """The files that transformers loads: model.safetensors where there is one, whatever an index beside it says."""
    other = read_object(folder / "config.json", "model config").get("transformers_weights")
    if other is not None:
        raise UserError(
            f"{folder / 'config.json'}: transformers_weights names {other!r}, which only transformers would read; "
            "rename that file to model.safetensors and delete the entry"
        )
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return ["model.safetensors"]
    shards = read_object(index, "weight index").get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise UserError(f"{index}: this weight index is damaged: weight_map must say which file holds which tensor")
    names = sorted(set(shards.values()))
    outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise UserError(f"{index}: names a file outside the model's folder: {outside[0]}")
    return names


def stored_dtype(files: list[Path]) -> torch.dtype | None:
    """The floating-point dtype that most of the weights are stored in, by the files' headers; None where there is none.

    Raises:
        UserError: a file is no safetensors file.
    """
    counts: Counter[torch.dtype] = Counter()
    for file in files:
        try:
            with safe_open(file, framework="pt") as header:
                for name in header.keys():  # noqa: SIM118 -- not a dict
                    part = header.get_slice(name)
                    if (dtype := STORED_DTYPES.get(part.get_dtype())) is not None:
                        counts[dtype] += math.prod(part.get_shape())
        except (OSError, SafetensorError) as error:
            raise _unreadable(file, error) from error
    return max(counts, key=lambda dtype: counts[dtype], default=None)


def fingerprint(name: str, revision: str | None = None, download: bool = True) -> str:
    """One hash for the base model: over its config.json and the sha256 of each weight file.

    Hashing 26 GB takes a while, so each file's hash is remembered (`remembered_sha256`).

    Raises:
        UserError: the model has no weights here.
    """
    files = weight_files(name, revision, download)
    digest = hashlib.sha256()
    config = read_object(files[0].parent / "config.json", "model config")
    for key in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):  # written by whoever saved it last
        config.pop(key, None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    for file in files:
        digest.update(remembered_sha256(file).encode())
    return digest.hexdigest()


def remembered_sha256(file: Path) -> str:
    """A large file's sha256, remembered in the user's cache for as long as its path, size and times stay the same.

    The time of the inode's last change is among them: unlike the time of the last write, no program can set it back.
    """
    file = file.resolve()
    memory = cache_folder() / "file_hashes.json"
    status = file.stat()
    key = f"{file}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError, TypeError, RecursionError):  # no memory yet, or a damaged one: hash again
        known = dict(json.loads(memory.read_text(encoding="utf-8")))
    entry = known.get(key)
    if isinstance(entry, list) and len(entry) == 2 and entry[1] == sha256_json([key, entry[0]]):
        return str(entry[0])
    if entry is not None:
        warnings.warn(f"hashed again: {memory} is damaged where it speaks of {file}", RepairWarning, stacklevel=1)
    result = sha256_file(file)
    known[key] = [result, sha256_json([key, result])]
    with suppress(WriteError):  # a cache that cannot be written costs time, not correctness
        write_json(memory, known)
    return result


def _hub_folder(name: str, revision: str | None, patterns: list[str], download: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=not download))
    except (OSError, ValueError) as error:
        raise UserError(f"model.name: {name} cannot be had: {first_line(error)}") from error


def _lacking(name: str, missing: list[str]) -> UserError:
    return UserError(
        f"model.name: the weight files of {name} lack {len(missing)} of the model's tensors ({missing[0]}, …); "
        "are they an adapter's, or saved under other names? (transformers' save_pretrained writes the model's own)"
    )


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(f"{file}: cannot be read as safetensors ({first_line(error)}); is the download complete?")
