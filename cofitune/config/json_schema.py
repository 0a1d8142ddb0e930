"""The JSON Schema of a config, a method and a suite: what editors check and complete while one types."""

from __future__ import annotations

from typing import Literal

from cofitune.config.compare import OWN_SECTIONS
from cofitune.config.schema import Config

Of = Literal["config", "method", "suite"]
DIALECT = "https://json-schema.org/draft/2020-12/schema"
ABOUT = {
    "config": "A config of cofitune, which all commands share.",
    "method": "A method of `cofitune compare`: sections that are laid over a config.",
    "suite": "A suite: the tasks of a config's section eval.",
}


def json_schema(of: Of = "config") -> dict[str, object]:
    """What a YAML file may hold, shorthands such as a path in place of a list of sources among it.

    Args:
        of: config: the whole file; method: the sections that `compare.methods` may change; suite: the section eval.
    """
    whole = Config.model_json_schema()
    kept = {
        "config": tuple(whole["properties"]),
        "method": tuple(key for key in whole["properties"] if key not in OWN_SECTIONS),
        "suite": ("eval",),
    }[of]
    properties = {key: whole["properties"][key] for key in kept}
    result: dict[str, object] = {
        "$schema": DIALECT,
        "title": f"cofitune {of}",
        "description": ABOUT[of],
        "type": "object",
    }
    result |= {"properties": properties, "additionalProperties": False}
    if of != "method":
        result["required"] = [key for key in whole["required"] if key in kept] if of == "config" else ["eval"]
    return result | {"$defs": _used(properties, whole["$defs"])}


def _used(schema: object, definitions: dict[str, object]) -> dict[str, object]:
    """The definitions that a schema refers to, also through one another, in order of their names."""
    found: set[str] = set()
    waiting = _references(schema)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += _references(definitions[name])
    return {name: definitions[name] for name in sorted(found)}


def _references(schema: object) -> list[str]:
    if isinstance(schema, dict):
        own = [schema["$ref"].rsplit("/", 1)[-1]] if isinstance(schema.get("$ref"), str) else []
        return own + [name for part in schema.values() for name in _references(part)]
    return [name for part in schema for name in _references(part)] if isinstance(schema, list) else []
