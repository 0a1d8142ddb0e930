"""Read a config: YAML 1.2 scalars, overrides, and every mistake at once with its place and the nearest name."""

from __future__ import annotations

import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cofitune.config.compare import OWN_SECTIONS
from cofitune.config.explain import explain, tell_unusable, unusable_values
from cofitune.config.renamed import RenamedKeyWarning, rename_keys
from cofitune.config.schema import Config
from cofitune.config.section import expand
from cofitune.config.suite import Place, add_suites, is_of_suite, start_from_data
from cofitune.config.yaml12 import DEEPEST, Dumper, parse, read_yaml
from cofitune.errors import ConfigError

WHOLE = ("region", "adapter")  # sections that another one replaces, never completes


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
    data, sources = read_yaml(path)
    overridden: set[Place] = set()
    # which suite it is comes first, so that every other override finds the suite's tasks in place
    first = [text for text in overrides or [] if is_of_suite(text)]
    problems = [p for text in first if (p := _override(data, overridden, text))]
    problems += add_suites(data, sources, read_yaml)
    rest = [text for text in overrides or [] if text not in first]
    problems += [p for text in rest if (p := _override(data, overridden, text))]
    problems += rename_keys(data, sources, overridden, str(path))
    start_from_data(data)
    sources = {place: source for place, source in sources.items() if place not in overridden}
    sources |= dict.fromkeys(overridden, "override")
    config, more = _validated(data, sources, str(path))
    if config is None or problems:
        raise ConfigError(problems + more)
    return config


def load_resolved(path: Path) -> Config:
    """Read the config that a run keeps of itself, also one that an earlier version wrote: no key is warned of.

    Raises:
        ConfigError: as `load_config`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RenamedKeyWarning)
        return load_config(path)


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
        try:
            path = Path(expand(raw))
        except ValueError as error:
            raise ConfigError([f"{where}: {error}"]) from None
        raw, sources = read_yaml(path)
    own = [key for key in raw if key in OWN_SECTIONS]
    if own:
        raise ConfigError([f"{path}: {', '.join(own)}: is the comparison's own, the same for all methods"])
    raw = deepcopy(raw)  # which a config that is frozen may hold
    problems = rename_keys(raw, sources, set(), str(path))
    if problems:
        raise ConfigError(problems)
    data = _laid_over(_laid_over(config.model_dump(mode="json"), raw), changes)
    result, problems = _validated(data, sources, str(path))
    if result is None:
        raise ConfigError(problems)
    return result


def _validated(data: dict[str, Any], sources: dict[Place, str], elsewhere: str) -> tuple[Config | None, list[str]]:
    """The config, or what is wrong with it."""
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        return None, explain(error, data, sources, elsewhere)
    unusable = list(unusable_values(data)) or list(unusable_values(config.model_dump()))
    return (None if unusable else config), tell_unusable(unusable, sources, elsewhere)


def _laid_over(below: dict[str, Any], above: dict[str, Any], top: bool = True) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict) and not (top and key in WHOLE)
        merged[key] = _laid_over(below[key], value, top=False) if both else value
    return merged


def parse_value(text: str) -> Any:
    """Read one scalar or flow collection as YAML 1.2 would.

    Raises:
        ConfigError: it is no valid YAML.
    """
    return parse(text, "value")[0]


def dump_config(config: Config) -> str:
    """Return the resolved config as YAML that `load_config` reads back to an equal config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def _override(data: dict[str, Any], overridden: set[Place], text: str) -> str | None:
    """Write one `a.b=value` into `data`; return what is wrong with it, if anything."""
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
    overridden.add(tuple(key if _index(key) is None else int(key) for key in (*parents, last)))
    return None


def _index(key: str) -> int | None:
    return int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else None
