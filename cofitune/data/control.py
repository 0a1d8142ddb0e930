"""Control tokens: which strings a tokenizer turns into them, and the check that no given text holds one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from cofitune.data.formats import BadItemError

# reasoning and tool calls are written with them in people's data, and they end nothing
IN_TEXT = re.compile(r"</?\|?(think|thinking|thought|tool_call|tool_response|tools?)\|?>|\[/?(THINK|TOOL_CALLS)\]")


@dataclass(frozen=True)
class _Known:
    """What is known of a tokenizer, as long as it has the tokens of `state`."""

    state: object
    ids: Mapping[str, int]
    pattern: re.Pattern[str] | None


_KNOWN: WeakKeyDictionary[PreTrainedTokenizerBase, _Known] = WeakKeyDictionary()


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> Mapping[str, int]:
    """Every special token, by its text: those that the tokenizer names, and all others that were added as special."""
    return _known(tokenizer).ids


def check_contents(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, object]], where: str) -> None:
    """Refuse texts that would become control tokens: an end of turn in the middle of a response, for one.

    Raises:
        BadItemError: a turn holds the text of a control token.
    """
    pattern = _known(tokenizer).pattern
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


def _known(tokenizer: PreTrainedTokenizerBase) -> _Known:
    """Each response asks, and some tokenizers have hundreds of special tokens, which take longer than all else."""
    known = _KNOWN.get(tokenizer)
    state = len(tokenizer), tokenizer.all_special_tokens
    if known is None or known.state != state:
        named = dict(zip(state[1], tokenizer.all_special_ids, strict=True))
        added = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        known = _KNOWN[tokenizer] = _Known(state, MappingProxyType({**added, **named}), _pattern({**added, **named}))
    return known


def _pattern(controls: Iterable[str]) -> re.Pattern[str] | None:
    texts = sorted((t for t in controls if t and not IN_TEXT.fullmatch(t)), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts))) if texts else None


def _texts(message: Mapping[str, object]) -> Iterable[str]:
    for key, value in message.items():
        if key != "role" and value:
            yield value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
