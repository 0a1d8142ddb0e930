"""Read a config: YAML 1.2 scalars, overrides, and every mistake at once with its place and the nearest name."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from cofitune.config.compare import OWN_SECTIONS
from cofitune.config.explain import KEY_PLACES, explain, tell_unusable, unusable_values
from cofitune.config.foreign import recognise
from cofitune.config.override import override
from cofitune.config.renamed import RenamedKeyWarning, rename_keys
from cofitune.config.schema import Config
from cofitune.config.shipped import find_shipped
from cofitune.config.suite import Place, add_suites, is_of_suite, start_from_data
from cofitune.config.yaml12 import Dumper, read_yaml
from cofitune.errors import ConfigError

WHOLE = ("region", "adapter")  # sections that another one replaces, never completes


@dataclass(frozen=True)
class LoadedConfig:
    """A config and where it comes from.

    Attributes:
        config: the resolved config.
        data: what was written: the file, its suite and the overrides, without defaults.
        sources: place in `data` → file:line, or the override that wrote it.
    """

    config: Config
    data: dict[str, object]
    sources: dict[Place, str]


def load_config(path: str | Path | Mapping[str, object], overrides: list[str] | None = None) -> Config:
    """Read a config file, apply overrides such as `train.learning_rate=1e-4`, and check everything.

    Args:
        path: the YAML file; or its content, where a program makes it.
        overrides: `dotted.path=value`; the value is read as YAML.

    Returns:
        The resolved config: frozen, every default filled in.

    Raises:
        ConfigError: all mistakes together, each with its YAML path, its line in the file, what is accepted, and the
            nearest known name.
    """
    return read_config(path, overrides).config


def read_config(path: str | Path | Mapping[str, object], overrides: list[str] | None = None) -> LoadedConfig:
    """As `load_config`, together with where each value was written.

    Raises:
        ConfigError: as `load_config`.
    """
    data, sources = _read(path)
    named = "config" if isinstance(path, Mapping) else str(Path(path))
    overridden: dict[Place, str] = {}
    # which suite it is comes first, so that every other override finds the suite's tasks in place
    first = [text for text in overrides or [] if is_of_suite(text)]
    problems = [p for text in first if (p := override(data, overridden, text))]
    problems += add_suites(data, sources, read_yaml)
    rest = [text for text in overrides or [] if text not in first]
    problems += [p for text in rest if (p := override(data, overridden, text))]
    problems += rename_keys(data, sources, overridden, named)
    start_from_data(data)
    sources = {p: s for p, s in sources.items() if not any(p[: len(o)] == o for o in overridden)} | overridden
    config, more = _validated(data, sources, named)
    if config is None and (answer := recognise(data, named, KEY_PLACES)):
        raise ConfigError([answer])
    if config is None or problems:
        raise ConfigError(problems + more)
    return LoadedConfig(config, data, sources)


def _read(path: str | Path | Mapping[str, object]) -> tuple[dict[str, object], dict[Place, str]]:
    """The content and the places of its keys; of a program's own values as YAML would have them."""
    if isinstance(path, Mapping):
        return {str(key): _plain(value) for key, value in path.items()}, {}
    return read_yaml(Path(path))


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def load_resolved(path: Path) -> Config:
    """Read the config that a run keeps of itself, also one that an earlier version wrote: no key is warned of.

    Raises:
        ConfigError: as `load_config`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RenamedKeyWarning)
        return load_config(path)


def overlay(config: Config, raw: str | Mapping[str, object], where: str, changes: Mapping[str, object]) -> Config:
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
            path = find_shipped("method", raw)
        except ValueError as error:
            raise ConfigError([f"{where}: {error}"]) from None
        raw, sources = read_yaml(path)
    own = [key for key in raw if key in OWN_SECTIONS]
    if own:
        raise ConfigError([f"{path}: {', '.join(own)}: is the comparison's own, the same for all methods"])
    sections = deepcopy(dict(raw))  # which a config that is frozen may hold
    problems = rename_keys(sections, sources, {}, str(path))
    if problems:
        raise ConfigError(problems)
    data = _laid_over(_laid_over(config.model_dump(mode="json"), sections), changes)
    result, problems = _validated(data, sources, str(path))
    if result is None:
        raise ConfigError(problems)
    return result


def _validated(data: dict[str, object], sources: dict[Place, str], elsewhere: str) -> tuple[Config | None, list[str]]:
    """The config, or what is wrong with it."""
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        return None, explain(error, data, sources, elsewhere)
    except UnicodeEncodeError:  # pydantic lets no half characters in, and says so in its own way
        return None, tell_unusable(list(unusable_values(data)), sources, elsewhere)
    unusable = list(unusable_values(data)) or list(unusable_values(config.model_dump()))
    return (None if unusable else config), tell_unusable(unusable, sources, elsewhere)


def _laid_over(below: Mapping[str, object], above: Mapping[str, object], top: bool = True) -> dict[str, object]:
    merged = dict(below)
    for key, value in above.items():
        lower = None if top and key in WHOLE else below.get(key)
        if isinstance(lower, dict) and isinstance(value, dict):
            merged[key] = _laid_over(lower, value, top=False)
        else:
            merged[key] = value
    return merged


def dump_value(value: object) -> str:
    """Write a value as an override takes it behind the `=`: JSON is YAML, too."""
    return json.dumps(_plain(value), ensure_ascii=False)


def dump_config(config: Config) -> str:
    """Return the resolved config as YAML that `load_config` reads back to an equal config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
