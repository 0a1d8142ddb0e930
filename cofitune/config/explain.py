"""What is wrong with a config, in words: the place, what was given, what is accepted, the nearest name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cofitune.config.hints import key_hint, section_hint
from cofitune.config.schema import Config
from cofitune.config.suite import Place
from cofitune.errors import did_you_mean

LARGEST = 2**63  # whole numbers stay below it: torch, numpy and Arrow know no larger ones
WORDS = {  # kinds of pydantic's errors → our words; {gt} and the like are the limit
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number below 2^63",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be a text",
    "string_too_short": "must not be empty",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a mapping of names",
    "model_type": "must be a section with keys",
    "model_attributes_type": "must be a section with keys",
    "too_short": "must have {min_length} or more entries",
    "too_long": "must have at most {max_length} entries",
}
_BRANCH = re.compile(r"(?:literal|tuple|dict|list|function-\w+)\[")
SHOWN = 80  # characters of what was given


def explain(error: ValidationError, data: dict[str, object], sources: dict[Place, str], elsewhere: str) -> list[str]:
    """A sentence for each mistake.

    Args:
        data: what was validated.
        sources: where each place of it was written: file:line.
        elsewhere: where a place was written that `sources` lacks.
    """
    items = error.errors()
    unusable = list(unusable_values(data))
    bad = {place for place, _ in unusable}
    worth = [item for item in items if _worth_saying(item, data)] or items
    told = [item for item in worth if _real_place(item["loc"], data) not in bad and item["type"] != "string_unicode"]
    return tell_unusable(unusable, sources, elsewhere) + [_sentence(item, data, sources, elsewhere) for item in told]


def unusable_values(value: object, place: Place = ()) -> Iterator[tuple[Place, str]]:
    """Values that no setting can have, whatever the schema says: nan, numbers without end, half characters."""
    if isinstance(value, dict):
        for key, part in value.items():
            if _has_half_character(key):
                yield (*place, key), "is a key that no text can hold"
            yield from unusable_values(part, (*place, key))
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from unusable_values(part, (*place, index))
    elif isinstance(value, float) and not math.isfinite(value):
        yield place, f"must be a finite number (given: {value})"
    elif isinstance(value, int) and not -LARGEST <= value < LARGEST:
        yield place, "must be a whole number below 2^63"
    elif isinstance(value, str) and ("\0" in value or _has_half_character(value)):
        yield place, f"holds a character that no text can hold (given: {_shortened(value)})"


def tell_unusable(unusable: list[tuple[Place, str]], sources: dict[Place, str], elsewhere: str) -> list[str]:
    """A sentence for each of the values that `unusable_values` has found."""
    return [f"{source_of(place, sources) or elsewhere}: {dotted(place)}: {why}" for place, why in unusable]


def source_of(place: Place, sources: dict[Place, str]) -> str | None:
    """Where a place was written: itself, or else the nearest that holds it; None: nowhere."""
    return next((sources[place[:end]] for end in range(len(place), 0, -1) if place[:end] in sources), None)


def dotted(place: Place) -> str:
    """A place as one writes it: section.key, entries of lists by their number."""
    return ".".join(str(part) for part in place) or "the config"


def _has_half_character(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def _worth_saying(item: ErrorDetails, data: dict[str, object]) -> bool:
    """Of a union's branches ('paper' or a list, 'search' or a mapping), keep the one that the given value aims at."""
    for index, part in enumerate(item["loc"]):
        word_branch = isinstance(part, str) and part.startswith("literal[")
        if not (word_branch or _is_branch(part)):
            continue
        place = _real_place(item["loc"][: index + 1], data)
        if place and place[-1] == part:  # a key that the user wrote so
            continue
        word_given = isinstance(_value_at(place, data), str)
        if word_branch:
            return word_given
        if word_given and len(item["loc"]) == index + 1:
            return False
    return True


def _sentence(item: ErrorDetails, data: dict[str, object], sources: dict[Place, str], elsewhere: str) -> str:
    """One sentence for one pydantic error: where, what was given, what is accepted."""
    place = _real_place(item["loc"], data)
    where = f"{source_of(place, sources) or elsewhere}: {dotted(place)}"
    kind, context = item["type"], item.get("ctx") or {}
    if kind == "extra_forbidden":
        known = _fields_at(place[:-1])
        if hint := key_hint(str(place[-1]), place[:-1], KEY_PLACES):
            return f"{where}: unknown key; {hint}"
        return f"{where}: unknown key{did_you_mean(str(place[-1]), known)} (accepted: {', '.join(known)})"
    if kind == "missing":
        return f"{where}: is required: {_description_at(place)}"
    given = f" (given: {_shortened(item['input'])})"
    if kind == "literal_error":
        near = did_you_mean(str(item["input"]), re.findall(r"'([^']+)'", str(context.get("expected"))))
        return f"{where}: must be {context.get('expected')}{given}{near or section_hint(place, item['input'])}"
    if kind == "value_error":
        return f"{where}: {context.get('error')}"
    message = WORDS[kind].format(**context) if kind in WORDS else item["msg"][0].lower() + item["msg"][1:]
    if kind == "string_type" and isinstance(item["input"], bool | int | float):
        given += "; put it in quotes"
    if kind in ("model_type", "model_attributes_type"):
        given += section_hint(place, item["input"]) or f" (accepted: {', '.join(_fields_at(place))})"
    about = _description_at(place)
    return f"{where}: {message}{given}" + (f" -- {about}" if about else "")


def _value_at(place: Place, data: Any) -> object:
    for part in place:
        data = data[part]
    return data


def _real_place(location: Place, data: object) -> Place:
    """Drop the parts of a pydantic location that name a branch of a union and not a key of the file."""
    place: list[str | int] = []
    here = data
    for index, part in enumerate(location):
        last = index == len(location) - 1
        if isinstance(here, dict) and (part in here or (last and not _is_branch(part))):
            place.append(part)
            here = here.get(part)
        elif isinstance(here, list | tuple) and isinstance(part, int) and part < len(here):
            place.append(part)
            here = here[part]
    return tuple(place)


def _is_branch(part: str | int) -> bool:
    """Whether a part of a pydantic location names a branch of a union, other than a single number or text."""
    return isinstance(part, str) and (part in _CLASSES or bool(_BRANCH.match(part)))


def _models_at(place: Place) -> list[type[BaseModel]]:
    """The schema classes that the mapping at `place` may be."""
    results: list[type[BaseModel]] = [Config]
    for part in place:
        if isinstance(part, int):
            continue
        results = [m for parent in results if (f := parent.model_fields.get(part)) for m in _models_in(f.annotation)]
    return results


def _models_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    arguments = getattr(annotation, "__args__", ()) if not isinstance(annotation, str) else ()
    return [m for a in arguments for m in _models_in(a)]


def _fields_at(place: Place) -> list[str]:
    return [name for m in _models_at(place) for name in m.model_fields]


def _description_at(place: Place) -> str:
    for m in _models_at(place[:-1]):
        if place and (field := m.model_fields.get(str(place[-1]))) and field.description:
            return field.description
    return ""


def _classes(model: type[BaseModel]) -> set[str]:
    below = [m for field in model.model_fields.values() for m in _models_in(field.annotation)]
    return {model.__name__}.union(*map(_classes, below))


def _key_places() -> dict[str, list[str]]:
    """Every key of the schema's sections → its dotted places, those of what is trained first; no entries of lists."""
    places: dict[str, list[str]] = {}

    def walk(model: type[BaseModel], above: Place) -> None:
        for name, field in model.model_fields.items():
            if above:
                places.setdefault(name, []).append(dotted((*above, name)))
            if not str(field.annotation).startswith("tuple"):
                for below in _models_in(field.annotation):
                    walk(below, (*above, name))

    walk(Config, ())
    likely = ("model", "data", "train")
    return {name: sorted(found, key=lambda place: place.split(".")[0] not in likely) for name, found in places.items()}


_CLASSES = _classes(Config)
KEY_PLACES = _key_places()
