"""Read a config: YAML 1.2 scalars, overrides, and every mistake at once with its place and the nearest name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from cofitune.config.compare import OWN_SECTIONS
from cofitune.config.schema import Config
from cofitune.config.suite import Place, add_suites, is_of_suite, start_from_data
from cofitune.errors import ConfigError, did_you_mean

WHOLE = ("region", "adapter")  # sections that another one replaces, never completes


class _Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` with YAML 1.2's booleans and floats: `4e-5` is a number, `off` and `no` are strings."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in pairs if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read back as a string, such as a revision named 12e5."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a config file, apply overrides such as `train.learning_rate=1e-4`, and check everything.

    Args:
        path: the YAML file.
        overrides: `dotted.path=value`; the value is read as YAML.

    Returns:
        The resolved config: frozen, every default filled in.

    Raises:
        ConfigError: all mistakes together, each with its YAML path, its line in the file, what is accepted, and the
            nearest known name.
    """
    path = Path(path)
    data, sources = _read(path)
    overridden: set[Place] = set()
    # which suite it is comes first, so that every other override finds the suite's tasks in place
    first = [text for text in overrides or [] if is_of_suite(text)]
    problems = [p for text in first if (p := _override(data, overridden, text))]
    problems += add_suites(data, sources, _read)
    rest = [text for text in overrides or [] if text not in first]
    problems += [p for text in rest if (p := _override(data, overridden, text))]
    start_from_data(data)
    sources = {place: source for place, source in sources.items() if place not in overridden}
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        problems += [_explain(item, data, sources, path, overridden) for item in error.errors() if _worth_saying(item)]
    if problems:
        raise ConfigError(problems)
    return config


def overlay(config: Config, raw: str | dict[str, Any], where: str, changes: dict[str, Any]) -> Config:
    """Lay some sections over a config, key by key; `region` and `adapter`, which say what trains, each as a whole.

    Args:
        raw: the sections, or the YAML file that holds them.
        where: names the place in messages, where no file does.
        changes: sections that are laid over all that.

    Raises:
        ConfigError: all mistakes together, as `load_config` explains them.
    """
    path, sources = Path(where), dict[Place, str]()
    if isinstance(raw, str):
        path = Path(raw)
        raw, sources = _read(path)
    own = [key for key in raw if key in OWN_SECTIONS]
    if own:
        raise ConfigError([f"{path}: {', '.join(own)}: is the comparison's own, the same for all methods"])
    data = _laid_over(_laid_over(config.model_dump(mode="json"), raw), changes)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(
            [_explain(item, data, sources, path, set()) for item in error.errors() if _worth_saying(item)]
        ) from None


def _laid_over(below: dict[str, Any], above: dict[str, Any], top: bool = True) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict) and not (top and key in WHOLE)
        merged[key] = _laid_over(below[key], value, top=False) if both else value
    return merged


def parse_value(text: str) -> Any:
    """Read one scalar or flow collection as YAML 1.2 would."""
    return yaml.load(text, Loader=_Loader)


def dump_config(config: Config) -> str:
    """Return the resolved config as YAML that `load_config` reads back to an equal config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _read(path: Path) -> tuple[dict[str, Any], dict[Place, str]]:
    """A YAML file's mapping, and file:line of every place in it."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise ConfigError([f"{path}: no such config file{near}"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read: {error}"]) from None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError([f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}"]) from None
    lines: dict[Place, int] = {}
    problems: list[str] = []
    _note_lines(node, (), lines, problems, path)
    if problems:
        raise ConfigError(problems)
    data = loader.construct_document(node) if node is not None else None
    if not isinstance(data, dict):
        raise ConfigError([f"{path}: a config is a mapping of sections (model, data, output_dir, …)"])
    return data, {place: f"{path}:{line}" for place, line in lines.items()}


def _note_lines(node: Any, place: Place, lines: dict[Place, int], problems: list[str], path: Path) -> None:
    """Remember the line of every key, and find keys that are written twice (PyYAML keeps the last silently)."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*place, key.value)
            line = key.start_mark.line + 1
            if here in lines:
                problems.append(f"{path}:{line}: {_dotted(here)} is written twice (first in line {lines[here]})")
            lines[here] = line
            _note_lines(value, here, lines, problems, path)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*place, index)] = item.start_mark.line + 1
            _note_lines(item, (*place, index), lines, problems, path)


def _override(data: dict[str, Any], overridden: set[Place], text: str) -> str | None:
    """Write one `a.b=value` into `data`; return what is wrong with it, if anything."""
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        return f"override '{text}': write it as section.key=value, for example train.learning_rate=1e-4"
    try:
        parsed = parse_value(value)
    except yaml.YAMLError:
        return f"override '{text}': the value is not valid YAML"
    *parents, last = name.strip().split(".")
    target: Any = data
    for depth, key in enumerate(parents):
        if isinstance(target, list) and key.isdigit() and int(key) < len(target):
            target = target[int(key)]
        elif isinstance(target, dict):
            # `region: search` or a missing section gives way to the mapping that the override asks for
            if not isinstance(target.get(key), dict | list):
                target[key] = {}
            target = target[key]
        else:
            return f"override '{text}': {'.'.join(parents[: depth + 1])} is no section"
    if isinstance(target, list) and last.isdigit() and int(last) < len(target):
        target[int(last)] = parsed
    elif isinstance(target, dict):
        target[last] = parsed
    else:
        return f"override '{text}': {'.'.join(parents)} is a list of {len(target)}; name an index below that"
    overridden.add(tuple(int(k) if k.isdigit() else k for k in (*parents, last)))
    return None


def _worth_saying(item: Any) -> bool:
    """Of a union's branches ('paper' or a list, 'search' or a mapping), keep the one that the given value aims at."""
    word_given = isinstance(item["input"], str)
    word_branch = any(str(part).startswith("literal[") for part in item["loc"])
    if word_branch:
        return word_given
    structure_wanted = item["type"] in ("model_type", "tuple_type", "model_attributes_type")
    in_union = any(isinstance(p, str) and ("Region" in p or p.startswith("tuple[")) for p in item["loc"])
    return not (structure_wanted and word_given and in_union)


def _explain(item: Any, data: dict[str, Any], sources: dict[Place, str], path: Path, overridden: set[Place]) -> str:
    """One sentence for one pydantic error: where, what was given, what is accepted."""
    place = _real_place(item["loc"], data)
    source = sources.get(place) or ("override" if place in overridden else str(path))
    where = f"{source}: {_dotted(place)}"
    kind, context = item["type"], item.get("ctx") or {}
    if kind == "extra_forbidden":
        known = _fields_at(place[:-1])
        return f"{where}: unknown key{did_you_mean(str(place[-1]), known)} (accepted: {', '.join(known)})"
    given = f" (given: {item['input']!r})" if kind != "missing" else ""
    if kind == "missing":
        return f"{where}: is required: {_description_at(place)}"
    if kind == "literal_error":
        near = did_you_mean(str(item["input"]), re.findall(r"'([^']+)'", str(context.get("expected"))))
        return f"{where}: must be {context.get('expected')}{given}{near}"
    if kind == "value_error":
        return f"{where}: {context.get('error')}"
    message = item["msg"][0].lower() + item["msg"][1:]
    about = _description_at(place)
    return f"{where}: {message}{given}" + (f" -- {about}" if about else "")


def _real_place(location: tuple[Any, ...], data: Any) -> Place:
    """Drop the parts of a pydantic location that name a branch of a union and not a key of the file."""
    place: list[str | int] = []
    here = data
    for index, part in enumerate(location):
        if isinstance(here, dict) and (part in here or index == len(location) - 1):
            place.append(part)
            here = here.get(part)
        elif isinstance(here, list | tuple) and isinstance(part, int) and part < len(here):
            place.append(part)
            here = here[part]
    return tuple(place)


def _models_at(place: Place) -> list[type[BaseModel]]:
    """The schema classes that the mapping at `place` may be."""
    results: list[type[BaseModel]] = [Config]
    for part in place:
        if isinstance(part, int):
            continue
        results = [m for parent in results if (f := parent.model_fields.get(part)) for m in _models_in(f.annotation)]
    return results


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    arguments = getattr(annotation, "__args__", ()) if not isinstance(annotation, str) else ()
    return [m for a in arguments for m in _models_in(a)]


def _fields_at(place: Place) -> list[str]:
    return [name for m in _models_at(place) for name in m.model_fields]


def _description_at(place: Place) -> str:
    for m in _models_at(place[:-1]):
        if (field := m.model_fields.get(str(place[-1]))) and field.description:
            return field.description
    return ""


def _dotted(place: Place) -> str:
    return ".".join(str(p) for p in place) or "the config"
