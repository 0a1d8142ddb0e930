"""Load the base model and its tokenizer, and name its weights by a fingerprint."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from cofitune.errors import UserError
from cofitune.model.anatomy import read_model_config
from cofitune.model.check_weights import lacking
from cofitune.model.folder import check_tokenizer, first_line
from cofitune.model.kind import auto_class
from cofitune.model.other_folders import PULL, is_lfs_pointer
from cofitune.model.quantised import dequantising

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_dtype(dtype: str) -> torch.dtype:
    """Resolve `auto`: bfloat16 on a GPU, float32 on a CPU (where bfloat16 was measured 2.4 times slower)."""
    if dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return DTYPES[dtype]


def dtype_name(dtype: torch.dtype) -> str:
    """As config.json spells it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def load_model(
    name: str,
    dtype: torch.dtype,
    attn_implementation: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    dequantise: str | None = None,
) -> PreTrainedModel:
    """Load a causal language model's weights from safetensors, in one precision.

    Args:
        dequantise: the method by which they are quantised, one of `PLAIN`; None: they are plain.

    Raises:
        UserError: there is no such model, its files are damaged, or they lack weights of it (which transformers would
            draw at random with no more than a warning). Pickles are never read.
    """
    logging.disable_progress_bar()  # each command has a bar of its own
    built_by = auto_class(read_model_config(name, revision, trust_remote_code))
    try:
        model, result = built_by.from_pretrained(
            name,
            dtype=dtype,
            attn_implementation=None if attn_implementation == "auto" else attn_implementation,
            revision=revision,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **({"quantization_config": dequantising(dequantise)} if dequantise else {}),
        )
    except (OSError, ValueError, TypeError, AttributeError, ImportError, SafetensorError) as error:
        raise UserError(f"model.name: {name} cannot be loaded: {first_line(error)}") from error
    missing = sorted(result["missing_keys"])
    if missing:
        raise lacking(name, missing)
    return model


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer; one without a padding token pads with its end-of-sequence token (labels never look at pads).

    Raises:
        UserError: there is none, it is not a fast one (labels need character offsets), or it does not fit the model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # the library of tokenizers raises no other class for a broken tokenizer.json
        folder = Path(name)
        if is_lfs_pointer(folder / "tokenizer.json"):
            why = f"its tokenizer.json: {PULL}"
        elif folder.is_dir() and not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
            why = "there is no tokenizer.json in this folder"
        else:
            why = first_line(error)
        raise UserError(f"model.name: {name} has no tokenizer: {why}") from error
    if not tokenizer.is_fast:
        raise UserError(f"model.name: {name} has only a slow tokenizer; a tokenizer.json is needed")
    check_tokenizer(name, tokenizer, read_model_config(name, revision, trust_remote_code))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def coarser(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype with the widest gap between numbers."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
