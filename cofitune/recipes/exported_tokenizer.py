"""What an exported folder says of its text: the base's own tokenizer files, the run's template, every end token."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase

from cofitune.data.chat import end_ids
from cofitune.files import read_json, write_json, write_text

SETTINGS, TEMPLATE, GENERATION = "tokenizer_config.json", "chat_template.jinja", "generation_config.json"


def write_tokenizer(folder: Path, base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write what differs from the base's tokenizer files, which is the template alone; the others are to be copied.

    transformers 5 would write them anew, with a class that transformers 4 and servers built on it do not know.

    Args:
        tokenizer: the base's, with the template that the run was trained under.
    """
    if not (base / SETTINGS).is_file():  # a bare tokenizer.json says nothing of special tokens
        tokenizer.save_pretrained(folder)
        return
    text = str(tokenizer.chat_template or "")
    settings: dict[str, object] = read_json(base / SETTINGS, "tokenizer's config", ours=False)
    own = settings.get("chat_template")
    if own is not None and own != text:
        write_json(folder / SETTINGS, {**settings, "chat_template": text})
    if own is None or (base / TEMPLATE).is_file():  # which goes before the other's
        write_text(folder / TEMPLATE, text)


def write_generation(
    folder: Path, base: Path, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig
) -> None:
    """Write a generation_config.json that names every token which ends an answer, where the base's does not.

    Args:
        tokenizer: with the template that the run was trained under; what it writes after a response is an end, too.
        generation: the base's, or what its config.json says where it has none.
    """
    ends = sorted(end_ids(tokenizer, generation))
    own = generation.eos_token_id
    if set(ends) == set(own if isinstance(own, list) else [own]) or not ends:
        return
    if (base / GENERATION).is_file():
        given: dict[str, object] = read_json(base / GENERATION, "generation config", ours=False)
    else:
        given = {n: v for n in ("bos_token_id", "pad_token_id") if (v := getattr(generation, n, None)) is not None}
    write_json(folder / GENERATION, {**given, "eos_token_id": ends if len(ends) > 1 else ends[0]})
