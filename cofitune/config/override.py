"""Overrides: `section.key=value` of the command line, written into a config as it was read."""

from __future__ import annotations

from typing import Any

from cofitune.config.suite import Place
from cofitune.config.yaml12 import DEEPEST, parse
from cofitune.errors import ConfigError

SHOWN = 80  # characters of an override that messages repeat


def parse_value(text: str) -> object:
    """Read one scalar or flow collection as YAML 1.2 would.

    Raises:
        ConfigError: it is no valid YAML.
    """
    return parse(text, "value")[0]


def override(data: dict[str, object], overridden: dict[Place, str], text: str) -> str | None:
    """Write one `a.b=value` into a config as read; return what is wrong with it, if anything.

    Args:
        data: changed in place.
        overridden: place → how messages name the override that wrote it; it is added.
    """
    name, sign, value = text.partition("=")
    names = name.strip().split(".")
    if not sign or not all(names):
        return f"override '{text}': write it as section.key=value, for example train.learning_rate=1e-4"
    if len(names) > DEEPEST:
        return f"override '{text[:40]}…': no setting lies {len(names)} deep"
    try:
        parsed = parse_value(value)
    except ConfigError as error:
        why = error.problems[0].partition(": ")[2].removeprefix("not valid YAML: ")
        return f"override '{text}': the value is not valid YAML: {why}"
    *parents, last = names
    target: Any = data
    for depth, key in enumerate(parents):
        if isinstance(target, list) and _index(key) is not None and int(key) < len(target):
            target = target[int(key)]
        elif isinstance(target, dict):
            # `region: search` or a missing section gives way to the mapping that the override asks for
            if not isinstance(target.get(key), dict | list):
                target[key] = {}
            target = target[key]
        else:
            return f"override '{text}': {'.'.join(parents[: depth + 1])} is no section"
    if isinstance(target, list) and _index(last) is not None and int(last) < len(target):
        target[int(last)] = parsed
    elif isinstance(target, dict):
        target[last] = parsed
    else:
        return f"override '{text}': {'.'.join(parents)} is a list of {len(target)}; name an index below that"
    place = tuple(key if _index(key) is None else int(key) for key in (*parents, last))
    overridden[place] = f"override '{text if len(text) <= SHOWN else text[: SHOWN - 1] + '…'}'"
    return None


def _index(key: str) -> int | None:
    return int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else None
