"""Control tokens: which strings a tokenizer turns into them, and the check that no given text holds one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from cofitune.data.formats import BadItemError

# reasoning and tool calls are written with them in people's data, and they end nothing
IN_TEXT = re.compile(r"</?\|?(think|thinking|thought|tool_call|tool_response|tools?)\|?>|\[/?(THINK|TOOL_CALLS)\]")

_PATTERNS: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, re.Pattern[str] | None]] = WeakKeyDictionary()


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Every special token, by its text: those that the tokenizer names, and all others that were added as special."""
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    added = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {**added, **named}


def check_contents(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, object]], where: str) -> None:
    """Refuse texts that would become control tokens: an end of turn in the middle of a response, for one.

    Raises:
        BadItemError: a turn holds the text of a control token.
    """
    pattern = _pattern(tokenizer)
    if pattern is None:
        return
    for index, message in enumerate(messages):
        for text in _texts(message):
            if found := pattern.search(text):
                raise BadItemError(
                    "control token in a text",
                    f"{where}: the {message['role']}'s turn {index} holds {found[0]!r}, which this tokenizer reads as "
                    "a control token and not as text; write it otherwise, or leave the item out",
                )


def _pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    known = _PATTERNS.get(tokenizer)
    size = hash((len(tokenizer), str(tokenizer.special_tokens_map)))
    if known is None or known[0] != size:
        texts = sorted((t for t in control_tokens(tokenizer) if t and not IN_TEXT.fullmatch(t)), key=len, reverse=True)
        known = (size, re.compile("|".join(map(re.escape, texts))) if texts else None)
        _PATTERNS[tokenizer] = known
    return known[1]


def _texts(message: Mapping[str, object]) -> Iterable[str]:
    for key, value in message.items():
        if key != "role" and value:
            yield value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
