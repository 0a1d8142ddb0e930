"""`cofitune config show`: the resolved config as YAML, each value with where it comes from."""

from __future__ import annotations

import math
from collections.abc import Iterator

import yaml

from cofitune.config.explain import source_of
from cofitune.config.load import LoadedConfig
from cofitune.config.suite import Place
from cofitune.config.yaml12 import Dumper

DEFAULT = "default"
WIDEST = 72  # columns before a comment; a longer value pushes its own comment on
Line = tuple[str, str | None]  # YAML, and where its value comes from; None: a key that only holds others


def show_config(loaded: LoadedConfig, given_only: bool = False) -> str:
    """YAML that loads to the same config, with a comment behind each value: file and line, override, or default.

    Args:
        given_only: leave out what is at its default.
    """
    lines = _mapping(loaded.config.model_dump(mode="json"), (), 0, loaded, given_only)
    width = min(WIDEST, max((len(text) for text, origin in lines if origin), default=0))
    return "".join(f"{text:<{width}}  # {_one_line(origin)}\n" if origin else f"{text}\n" for text, origin in lines)


def origins(loaded: LoadedConfig) -> dict[str, str]:
    """Where each value comes from, by its dotted place: file and line, override, or default."""
    return dict(_leaves(loaded.config.model_dump(mode="json"), (), loaded))


def origin_of(place: Place, value: object, loaded: LoadedConfig) -> str:
    """Where a value of the resolved config was written: file:line, an override, or default."""
    here: object = loaded.data
    for part in place:
        if isinstance(here, dict) and part not in here:
            return DEFAULT
        if not isinstance(here, dict | list) or (isinstance(here, list) and not isinstance(part, int)):
            # a shorthand, such as a path for {path: …}, says one thing of several
            if not (isinstance(here, list) or place[-1] == "path" or str(value) in str(here)):
                return DEFAULT
            break
        here = here[part]  # type: ignore[index]
    return source_of(place, loaded.sources) or DEFAULT


def _mapping(values: dict[str, object], place: Place, depth: int, loaded: LoadedConfig, given_only: bool) -> list[Line]:
    pad, result = "  " * depth, list[Line]()
    for key, value in values.items():
        here, name = (*place, key), _flow(key)
        if isinstance(value, dict) and value:
            below = _mapping(value, here, depth + 1, loaded, given_only)
        elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
            below = []
            for index, entry in enumerate(value):
                lines = _mapping(entry, (*here, index), depth + 2, loaded, given_only)
                begins = f"{pad}  - "
                below += [(begins + text[len(begins) :] if n == 0 else text, o) for n, (text, o) in enumerate(lines)]
        else:
            origin = origin_of(here, value, loaded)
            result += [] if given_only and origin == DEFAULT else [(f"{pad}{name}: {_flow(value)}", origin)]
            continue
        result += [(f"{pad}{name}:", None), *below] if below else []
    return result


def _leaves(value: object, place: Place, loaded: LoadedConfig) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        below = [(key, entry) for key, entry in value.items()]
    elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        below = list(enumerate(value))
    else:
        yield ".".join(map(str, place)), origin_of(place, value, loaded)
        return
    for key, entry in below:
        yield from _leaves(entry, (*place, key), loaded)


def _flow(value: object) -> str:
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=math.inf, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _one_line(text: str) -> str:
    return " ".join(text.split())
