"""The references, written from the code when the site is built: the config's keys and the commands' options.

A page says where its reference goes by a comment, `<!-- reference: config -->` or `<!-- reference: cli -->`. Links to
files of the repository, such as a bench's results, become downloads, since they are no pages of the site.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import typer.main
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from cofitune.cli import app
from cofitune.config.schema import Config

Schema = dict[str, Any]
MARK = re.compile(r"<!-- reference: (config|cli) -->")
FILE_LINK = re.compile(r"\]\((\.\./[^)#]+\.md)\)")
BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}


class _Resolved(GenerateJsonSchema):
    """What a key holds in the end; the shorthands that editors accept, too, would make the tables hard to read."""

    def function_before_schema(self, schema: core_schema.BeforeValidatorFunctionSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])


def fill_in(page: str) -> str:
    """A page's Markdown as the site reads it: the references in their places, its links to files marked as such."""
    writers = {"config": config_reference, "cli": cli_reference}
    page = page.replace("](../CONTRIBUTING.md", "](contributing.md")
    page = FILE_LINK.sub(r"](path:\1)", page)
    return MARK.sub(lambda found: writers[found[1]](), page)


def config_reference() -> str:
    """Markdown: a table a section, a row a key, from the pydantic schema."""
    schema = Config.model_json_schema(schema_generator=_Resolved)
    sections = dict(_sections(schema["properties"], "", schema["$defs"]))
    entries = {name: place for place, name in _list_entries(schema["properties"], "", schema["$defs"])}
    lines = []
    scalars = [key for key, value in schema["properties"].items() if not _refs(value)]
    for place, definition in sections.items():
        lines += [f"{'#' * (2 + place.count('.'))} `{place}`", "", *_table(place, definition), ""]
    for key in scalars:
        lines += [f"## `{key}`", "", f"{schema['properties'][key]['description']}. Required.", ""]
    for name, place in entries.items():
        lines += [f"## Entries of `{place}` and the like", "", *_table("", schema["$defs"][name]), ""]
    return "\n".join(lines)


def _refs(schema: Schema) -> list[str]:
    """The sections that a key's own value may be; entries of a list are not among them."""
    branches = [schema, *schema.get("anyOf", ()), *schema.get("oneOf", ())]
    return [str(b["$ref"]).rsplit("/", 1)[-1] for b in branches if "$ref" in b]


def _sections(properties: Schema, above: str, definitions: Schema) -> Iterator[tuple[str, Schema]]:
    for key, value in properties.items():
        for name in _refs(value):
            place = f"{above}.{key}".strip(".")
            yield place, definitions[name]
            if place != "search.eval":  # the same keys as the section eval
                yield from _sections(definitions[name]["properties"], place, definitions)


def _list_entries(properties: Schema, above: str, definitions: Schema) -> Iterator[tuple[str, str]]:
    """Place and name of each section that stands in lists, the first place last, so that it wins."""
    results = []
    for key, value in properties.items():
        place = f"{above}.{key}".strip(".")
        lists = [b.get("items", {}) for b in (value, *value.get("anyOf", ()))]
        results += [(place, str(item["$ref"]).rsplit("/", 1)[-1]) for item in lists if "$ref" in item]
        for name in _refs(value):
            results += list(_list_entries(definitions[name]["properties"], place, definitions))
    first: dict[str, str] = {}
    for place, name in results:
        first.setdefault(name, place)
    yield from ((place, name) for name, place in first.items())


def _table(place: str, definition: Schema) -> Iterator[str]:
    if place == "search.eval":
        yield "The keys of [`eval`](#eval), for the trials' development items."
        return
    yield "| key | value | default | meaning |"
    yield "|---|---|---|---|"
    required = definition.get("required", ())
    for key, value in definition["properties"].items():
        default = "required" if key in required else _default(value)
        cells = (f"`{key}`", _kind(value), default, value.get("description", ""))
        yield "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _default(schema: Schema) -> str:
    if "default" not in schema:
        return ""
    value = schema["default"]
    if value == []:
        return "none"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value, ensure_ascii=False)}`"


def _kind(schema: Schema) -> str:
    """What a key accepts, in words."""
    if "$ref" in schema:
        return "section"
    words = [schema["const"]] if "const" in schema else schema.get("enum")
    if words:
        return ", ".join(f"`{word}`" for word in words)
    branches = schema.get("anyOf") or schema.get("oneOf")
    if branches:
        return " or ".join(dict.fromkeys(_kind(branch) for branch in branches))
    kind = str(schema.get("type", "any"))
    if kind == "array":
        items = [*schema.get("prefixItems", ()), *([schema["items"]] if "items" in schema else [])]
        return f"list of {_plural(items[0])}" if items else "list"
    if kind == "object":
        return "mapping"
    bounds = " and ".join(f"{sign} {schema[key]:g}" for key, sign in BOUNDS.items() if key in schema)
    named = {"null": "`null`", "boolean": "`true`, `false`", "string": "text"}.get(kind, kind)
    return f"{named} {bounds}".strip()


def _plural(item: Schema) -> str:
    if "$ref" in item:
        return "entries"
    kind = _kind(item)
    first, _, rest = kind.partition(" ")
    return f"{first}s {rest}".strip() if first in ("integer", "number") else {"text": "names"}.get(kind, kind)


def cli_commands() -> Iterator[tuple[str, Any]]:
    """Every command of the app with its name; `config show` and the like with both words."""
    root: Any = typer.main.get_command(app)
    for name, command in root.commands.items():
        below = getattr(command, "commands", None)
        if not command.hidden:
            yield from ((f"{name} {part}", one) for part, one in below.items()) if below else [(name, command)]


def cli_reference() -> str:
    """Markdown: usage, help and options of each command of the real app."""
    lines = []
    for name, command in cli_commands():
        context = command.make_context(f"cofitune {name}", [], resilient_parsing=True)
        usage = command.get_usage(context).removeprefix("Usage: ")
        lines += [f"## `cofitune {name}`", "", "```text", " ".join(usage.split()), "```", "", command.help or "", ""]
        lines += ["| argument or option | meaning |", "|---|---|"]
        for parameter in command.get_params(context):
            what, meaning = parameter.get_help_record(context)
            # typer adds the type to a name; the usage above and the meaning say it
            cells = (f"`{re.sub(r' <[^>]*>', '', what)}`", " ".join(meaning.split()))
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)
