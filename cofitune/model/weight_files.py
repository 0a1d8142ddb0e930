"""The files of a model: which hold its weights, their dtype, and the fingerprint of their content."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from cofitune.errors import RepairWarning, UserError, WriteError
from cofitune.files import cache_folder, sha256_file, sha256_json, write_json
from cofitune.model.folder import first_line, read_object, refuse_adapter
from cofitune.model.other_folders import PULL, is_lfs_pointer
from cofitune.tensor_bytes import DTYPES

# as safetensors' headers call them
STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WIDTHS = {name: dtype.itemsize for dtype, name in DTYPES.items()}
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.pt", "model.ckpt.index")


def parameter_name(key: str, known: Container[str], prefix: str, aliases: Mapping[str, str]) -> str | None:
    """The parameter that a weight file's key means: of that name, of that name behind the base model's prefix (GPT-2's
    files leave out `transformer.`), or the one that such a name is an alias of; None where `known` has none of them."""
    names = (key, prefix + key)
    return next((n for name in names for n in (name, aliases.get(name, "")) if n in known), None)


def weight_files(
    name: str, revision: str | None = None, download: bool = True, *, beside_adapter: bool = False, code: bool = False
) -> list[Path]:
    """The safetensors files of a model folder, or of a hub model, in order.

    Args:
        download: fetch a hub model that is not in the hub's cache yet; a dry run does not.
        beside_adapter: whether an adapter may lie beside them.
        code: as of `local_folder`.

    Raises:
        UserError: there are none, the index is damaged, or an adapter lies beside them.
    """
    folder = local_folder(name, revision, download, code=code)
    if not beside_adapter:
        refuse_adapter(folder, name)
    names = _chosen_files(folder)
    if not Path(name).is_dir():  # only what the index names: some hub models carry a second copy of their weights
        folder = _hub_folder(name, revision, names, download)
    files = [folder / n for n in names]
    missing = [f for f in files if not f.is_file()]
    if missing:
        raise _without_weights(name, folder, missing)
    return files


def local_folder(name: str, revision: str | None = None, download: bool = True, *, code: bool = False) -> Path:
    """A model's folder, or where the hub's cache keeps it: all that is small, and weights where they are one file.

    Args:
        code: fetch a hub model's Python files, too: its folder is to run (`trust_remote_code`) or be copied with them.

    Raises:
        UserError: it cannot be had.
    """
    folder = Path(name)
    patterns = ["*.json", "*.jinja", "*.model", "*.txt", "model.safetensors", "adapter_model.safetensors"]
    patterns += ["*.py"] if code else []
    return folder if folder.is_dir() else _hub_folder(name, revision, patterns, download)


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
    content = read_object(index, "weight index")
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise UserError(f"{index}: this weight index is damaged: weight_map must say which file holds which tensor")
    if not isinstance(content.get("metadata"), dict):
        raise UserError(
            f'{index}: this weight index lacks "metadata", which transformers asks for; add "metadata": {{}}'
        )
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
    for stored, numel in _tensors(files):
        if (dtype := STORED_DTYPES.get(stored)) is not None:
            counts[dtype] += numel
    return max(counts, key=lambda dtype: counts[dtype], default=None)


def size_as(files: list[Path], dtype: torch.dtype) -> int:
    """Bytes of the files' weights, were every floating-point tensor in a dtype.

    Raises:
        UserError: a file is no safetensors file.
    """
    widths = {**WIDTHS, **dict.fromkeys(STORED_DTYPES, dtype.itemsize)}
    return sum(widths.get(stored, 1) * numel for stored, numel in _tensors(files))


def _tensors(files: list[Path]) -> Iterator[tuple[str, int]]:
    """Each tensor's dtype, as the files' headers call it, and how many elements it has."""
    for file in files:
        try:
            with safe_open(file, framework="pt") as header:
                for name in header.keys():  # noqa: SIM118 -- not a dict
                    part = header.get_slice(name)
                    yield part.get_dtype(), math.prod(part.get_shape())
        except (OSError, SafetensorError) as error:
            raise unreadable(file, error) from error


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
    known: dict[str, object] = {}
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
    except Exception as error:
        raise UserError(f"model.name: {name} cannot be had: {first_line(error)}") from error


def unreadable(file: Path, error: Exception) -> UserError:
    """What is wrong with a weight file that cannot be read."""
    why = PULL if is_lfs_pointer(file) else f"{first_line(error)}; is the download complete?"
    return UserError(f"{file}: cannot be read as safetensors: {why}")


def _without_weights(name: str, folder: Path, missing: list[Path]) -> UserError:
    """What is wrong with a model that lacks weight files, and what it has instead."""
    if any(folder.glob("*.gguf")):
        return UserError(
            f"model.name: {name} has its weights in GGUF, which every rank would have to dequantise whole; convert it "
            "to safetensors once, as scripts/small_model.py does"
        )
    lack = f"has no safetensors weights (missing: {', '.join(map(str, missing))})"
    if any(file.is_symlink() for file in missing):
        lack += "; the link leads nowhere"
    elif any((folder / pattern).is_file() for pattern in PICKLES):
        lack += (
            "; it has them as pickles, which can hold any code and are never read: take a revision with safetensors, "
            "or load and save it once with transformers' save_pretrained"
        )
    elif len(missing) > 1 or missing[0].name != "model.safetensors":
        lack += "; the index names them: is the download complete?"
    return UserError(f"model.name: {name} {lack}")
