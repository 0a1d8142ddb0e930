"""What transformers 5 says in words of its own, said in transformers 4's too: servers and tools still build on it.

A base that was saved by transformers 5 has such files. Version 4 refuses its tokenizer by the class's name, and reads
its positions wrongly without a word: it looks for `rope_theta`, finds none, and takes a default.
"""

from __future__ import annotations

import json
from pathlib import Path

from cofitune.files import write_json

ROPE = ("rope_theta", "partial_rotary_factor")
NAMES = {"gpt_neox": ("rotary_emb_base", "rotary_pct")}  # a model type that has others in 4
CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}  # as 5 calls it and as 4 does; 5 reads both


def make_readable(folder: Path) -> None:
    """Add to a model folder's JSON files what transformers 4 looks for; files that lack nothing stay as they are."""
    for name, change in (("config.json", _config), ("tokenizer_config.json", _tokenizer)):
        if not (folder / name).is_file():
            continue
        given = json.loads((folder / name).read_text(encoding="utf-8"))
        changed = change(given)
        if changed != given:
            write_json(folder / name, changed)


def _config(given: dict[str, object]) -> dict[str, object]:
    """RoPE's settings beside `rope_parameters`, which holds them all; not where layers of one model have several."""
    result = {key: _config(value) if isinstance(value, dict) else value for key, value in given.items()}
    rope = given.get("rope_parameters")
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        return result
    names = NAMES.get(str(given.get("model_type")), ROPE)
    beside = {name: rope[key] for name, key in zip(names, ROPE, strict=True) if key in rope}
    if rope.get("rope_type", "default") != "default":
        beside["rope_scaling"] = {key: value for key, value in rope.items() if key not in ROPE}
    return {**beside, **result}


def _tokenizer(given: dict[str, object]) -> dict[str, object]:
    result = dict(given)
    named = given.get("tokenizer_class")
    if isinstance(named, str) and named in CLASSES:
        result["tokenizer_class"] = CLASSES[named]
    if isinstance(given.get("extra_special_tokens"), list):  # a dictionary in 4, which calls the list otherwise
        result.setdefault("additional_special_tokens", result.pop("extra_special_tokens"))
    return result
