"""What a template must write of an item beside its turns' texts: tools, calls, reasoning."""

from __future__ import annotations

import json
from collections.abc import Iterator

from cofitune.data.formats import BadItemError
from cofitune.data.read import Item
from cofitune.data.turns import REASONING


def check_rendered(item: Item, text: str) -> None:
    """Compare the rendered text with the item's tools, calls, tools' answers and last reasoning.

    Templates leave out the reasoning of earlier turns on purpose; the last turn's is what is learned.

    Raises:
        BadItemError: the template has left one of them out.
    """
    for tool in item.tools:
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str):
            raise BadItemError("bad tools", f"{item.where}: a tool needs a function with a name")
        _require(item, text, name, f"the tool '{name}'")
    for index, (role, content) in enumerate(item.turns):
        if role == "tool":
            _require(item, text, content, f"the tool's answer in turn {index}")
        extra = item.extras[index] if item.extras else {}
        for call in extra.get("tool_calls", ()):
            for part in (call["function"]["name"], *_texts(call["function"]["arguments"])):
                _require(item, text, part, f"the tool call in turn {index}")
        for key in REASONING if index == len(item.turns) - 1 else ():
            _require(item, text, extra.get(key, ""), f"{key} of turn {index}")


def _require(item: Item, text: str, part: str, what: str) -> None:
    plain = part.strip()
    if plain not in text and not any(form in text for form in _escaped(plain)):
        raise BadItemError(
            "left out by the template",
            f"{item.where}: the model's chat template leaves out {what}; give the item without it, or choose a model "
            "whose template writes it",
        )


def _escaped(part: str) -> tuple[str, ...]:
    """The text as JSON writes it, and as transformers' `tojson` does for characters that HTML knows."""
    return json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1]


def _texts(value: object) -> Iterator[str]:
    """All texts of the arguments of a call, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
