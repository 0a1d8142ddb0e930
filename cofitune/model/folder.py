"""What a model's folder must be before anything is loaded: plain weights, a tokenizer that fits, files that parse."""

from __future__ import annotations

import math
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from cofitune.errors import ArtifactError, UnusableModelError, UserError
from cofitune.files import read_json
from cofitune.model.other_folders import PULL, is_lfs_pointer, what_else
from cofitune.model.quantised import PLAIN, quantisation

# what transformers raises for files that parse and make no sense; a UserError of ours is none of them
ODD_FILE = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    ImportError,
    RuntimeError,
    StrictDataclassError,
)
ADAPTER = "adapter_config.json"


def read_object(path: Path, what: str) -> dict[str, object]:
    """Read one of a model's JSON files, which holds an object.

    Raises:
        UserError: it is missing, does not parse, or holds something else.
    """
    try:
        return read_json(path, what, ours=False)
    except ArtifactError as error:
        raise UserError(f"{path}: {PULL}" if is_lfs_pointer(path) else str(error)) from None


def check_folder(folder: Path, name: str) -> None:
    """Refuse what is no model's folder, or holds an adapter, or a config.json that makes no sense.

    Raises:
        UserError: it is one of these.
    """
    if not folder.is_dir():
        raise UserError(f"model.name: {name} is a file; name the folder that it lies in")
    refuse_adapter(folder, name)
    config = folder / "config.json"
    if not config.exists():
        raise UserError(f"model.name: {name} has no config.json: {what_else(folder)}")
    _check_numbers(config, read_object(config, "model config"))
    if (folder / "generation_config.json").is_file():  # transformers reads it with the weights, too
        read_object(folder / "generation_config.json", "generation config")


def _check_numbers(file: Path, config: dict[str, object]) -> None:
    """Raise a UserError where a number is NaN, which JSON does not know and Python reads: every logit would become NaN.
    Infinity is a limit that some families have."""
    left: list[tuple[str, object]] = list(config.items())
    while left:
        place, value = left.pop()
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"{file}: {place} is NaN; it must be a number")
        if isinstance(value, dict | list):
            inside = value.items() if isinstance(value, dict) else enumerate(value)
            left += [(f"{place}.{name}", one) for name, one in inside]


def refuse_adapter(folder: Path, name: str) -> None:
    """Refuse a folder with an adapter's files: transformers would put the adapter into the model without a word.

    Raises:
        UserError: it is an adapter's folder, or an adapter lies beside whole weights.
    """
    if not (folder / ADAPTER).is_file():
        return
    base = read_object(folder / ADAPTER, "adapter's config").get("base_model_name_or_path")
    of = f", of {base}" if isinstance(base, str) and base not in (name, str(folder)) else ""
    if (folder / "config.json").is_file():
        raise UserError(
            f"model.name: {name} holds an adapter ({ADAPTER}{of}) beside its weights, which would be put into the "
            f"model as it loads; move the adapter's files away, or merge it once: cofitune convert {name} --to FOLDER"
        )
    raise UserError(
        f"model.name: {name} is an adapter{of}, and no model; name its base, or merge it once: cofitune convert "
        f"{name} --to FOLDER"
    )


def check_trainable(name: str, config: PretrainedConfig, max_length: int | None = None) -> None:
    """Refuse a base that cannot be trained as it is.

    Args:
        max_length: tokens that an item may have; None: nothing is trained on.

    Raises:
        UserError: its weights are quantised, or items may be longer than it has positions.
    """
    if method := quantisation(config):
        way = f"; or write plain ones once: cofitune convert {name} --to FOLDER" if method in PLAIN else ""
        raise UserError(
            f"model.name: {name} has quantised weights ({method}); training would write back wrong ones. Name the "
            f"checkpoint that it was made from, in bfloat16, float16 or float32{way}"
        )
    positions = num_positions(config)
    if max_length is not None and positions is not None and max_length > positions:
        raise UserError(
            f"data.max_length: {max_length} is more than the {positions} positions of {name} "
            f"(max_position_embeddings in its config.json); set data.max_length to {positions} or less"
        )


def num_positions(config: PretrainedConfig) -> int | None:
    """Tokens that a model can tell apart by position, stretched RoPE included; None where it does not say."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if not isinstance(rope, dict):
        return positions
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings", positions)
    if isinstance(factor, int | float) and isinstance(original, int | float) and factor > 1:
        return max(positions, int(factor * original))
    return positions


def check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Compare a tokenizer with the model's embedding.

    A special token that no template writes may lie beyond the embedding (Gemma 3 1B has one, for images): the text of
    an item never becomes one.

    Raises:
        UnusableModelError: it has tokens without a row in the embedding, or neither an end-of-sequence nor a padding
            token.
    """
    if tokenizer.eos_token is None and tokenizer.pad_token is None:
        raise UnusableModelError(
            f"model.name: the tokenizer of {name} names neither an end-of-sequence nor a padding token, so that no "
            "answer could end; set eos_token in its tokenizer_config.json"
        )
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(rows, int) or len(tokenizer) <= rows:
        return
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    template = str(tokenizer.chat_template or "")
    ends = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    needed = [t for t, number in beyond.items() if number not in special or number in ends or t in template]
    if needed:
        raise UnusableModelError(
            f"model.name: the tokenizer of {name} has {len(beyond)} token{'s' if len(beyond) > 1 else ''} more than "
            f"the embedding has rows ({rows}), such as {needed[0]!r}; take the model's own tokenizer, or enlarge the "
            "embedding (resize_token_embeddings) and save the model"
        )


def read_generation_config(name: str, revision: str | None, config: PretrainedConfig) -> GenerationConfig:
    """The model's generation_config.json, or what its config.json says where there is none.

    Raises:
        UserError: the file makes no sense.
    """
    folder = Path(name)
    if folder.is_dir() and (folder / "generation_config.json").is_file():
        read_object(folder / "generation_config.json", "generation config")
    try:
        result = GenerationConfig.from_pretrained(name, revision=revision)
    except OSError:  # a folder without generation_config.json
        result = GenerationConfig.from_model_config(config)
    except ODD_FILE as error:
        raise UserError(f"model.name: {name}: generation_config.json makes no sense: {first_line(error)}") from error
    ends = result.eos_token_id
    if not all(isinstance(end, int) for end in (ends if isinstance(ends, list) else [ends]) if ends is not None):
        raise UserError(f"model.name: {name}: eos_token_id must be one token's number, or a list of them, not {ends!r}")
    return result


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with the one that it announces; or the error's class."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return f"{lines[0]} {lines[1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
