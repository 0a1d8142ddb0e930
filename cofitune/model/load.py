"""Load the base model and its tokenizer, and name its weights by a fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from cofitune.errors import UserError
from cofitune.files import sha256_file, write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_dtype(dtype: str) -> torch.dtype:
    """Resolve `auto`: bfloat16 on a GPU, float32 on a CPU (where bfloat16 was measured 2.4 times slower)."""
    if dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return DTYPES[dtype]


def load_model(
    name: str,
    dtype: torch.dtype,
    attn_implementation: str = "sdpa",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model's weights from safetensors, in one precision.

    Raises:
        UserError: there is no such model, or it has no safetensors weights (pickles are never read).
    """
    logging.disable_progress_bar()  # each command has a bar of its own
    try:
        return AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            attn_implementation=attn_implementation,
            revision=revision,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"model.name: {name} cannot be loaded: {str(error).strip().splitlines()[0]}") from error


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer; one without a padding token pads with its end-of-sequence token (labels never look at pads).

    Raises:
        UserError: there is none, or it is not a fast one (labels need character offsets).
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"model.name: {name} has no tokenizer: {str(error).strip().splitlines()[0]}") from error
    if not tokenizer.is_fast:
        raise UserError(f"model.name: {name} has only a slow tokenizer; a tokenizer.json is needed")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def weight_files(name: str, revision: str | None = None) -> list[Path]:
    """The safetensors files of a model folder, or of a hub model (downloaded if need be), in order.

    Raises:
        UserError: there are none.
    """
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(
                snapshot_download(name, revision=revision, allow_patterns=["*.safetensors", "*.json", "*.jinja"])
            )
        except (OSError, ValueError) as error:
            raise UserError(f"model.name: {name} cannot be had: {str(error).strip().splitlines()[0]}") from error
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / n for n in names]
    else:
        files = [folder / "model.safetensors"]
    missing = [str(f) for f in files if not f.is_file()]
    if missing:
        raise UserError(f"model.name: {name} has no safetensors weights (missing: {', '.join(missing)})")
    return files


def fingerprint(name: str, revision: str | None = None) -> str:
    """One hash for the base model: over its config.json and the sha256 of each weight file.

    Hashing 26 GB takes a while, so each file's hash is remembered in the user's cache by path, size and time.
    """
    files = weight_files(name, revision)
    digest = hashlib.sha256()
    config = json.loads((files[0].parent / "config.json").read_text(encoding="utf-8"))
    for key in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):  # written by whoever saved it last
        config.pop(key, None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    for file in files:
        digest.update(_remembered_sha256(file.resolve()).encode())
    return digest.hexdigest()


def cache_folder() -> Path:
    """`$COFITUNE_CACHE`, or `cofitune` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("COFITUNE_CACHE") or Path(home) / "cofitune")


def _remembered_sha256(file: Path) -> str:
    memory = cache_folder() / "fingerprints.json"
    status = file.stat()
    key = f"{file}:{status.st_size}:{status.st_mtime_ns}"
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError):  # no memory yet, or a damaged one: hash again
        known = json.loads(memory.read_text(encoding="utf-8"))
    if key not in known:
        known[key] = sha256_file(file)
        with suppress(OSError):  # a cache that cannot be written costs time, not correctness
            write_json(memory, known)
    return str(known[key])
