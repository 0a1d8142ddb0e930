"""Suites: files with a section `eval` whose tasks stand in for those that a config does not name itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cofitune.config.shipped import find_shipped

Place = tuple[str | int, ...]
Read = Callable[[Path], tuple[dict[str, Any], dict[Place, str]]]
SECTIONS: tuple[Place, ...] = (("eval",), ("search", "eval"))
TASK_PATHS = ("path", "dataset_path")


def is_of_suite(override: str) -> bool:
    """Whether an override says which suite to take, or replaces all that a suite would add to."""
    name = override.partition("=")[0].strip()
    sections = [".".join(map(str, section)) for section in SECTIONS]
    return name == "search" or any(name in {s, f"{s}.suite"} for s in sections)


def add_suites(data: dict[str, Any], sources: dict[Place, str], read: Read) -> list[str]:
    """Put the tasks of `eval.suite` (and `search.eval.suite`) where the config names none; `suite` is gone afterwards.

    Args:
        data: the config as read; changed in place.
        sources: file:line of each place in it; the suite's are added.
        read: reads a YAML file into its content and the source of each place.

    Returns:
        What is wrong with a suite, if anything.
    """
    problems = []
    for place in SECTIONS:
        section = _at(data, place)
        if section is None or not isinstance(section.get("suite"), str):
            continue
        try:
            path = find_shipped("suite", section.pop("suite"))
        except ValueError as error:
            problems.append(f"{'.'.join(map(str, place))}.suite: {error}")
            continue
        suite, where = read(path)
        tasks = suite.pop("eval", None)
        problems += [f"{where[(key,)]}: {key}: a suite holds one section, eval" for key in suite]
        if not isinstance(tasks, dict):
            problems.append(f"{path}: a suite holds a section eval with speciality and versatility")
        else:
            problems += [f"{where[('eval', key)]}: a suite names no other suite" for key in tasks if key == "suite"]
            for part in _missing_parts(section, tasks):
                _put(section, part, _at_any(tasks, part))
                sources |= {(*place, *p[1:]): source for p, source in where.items() if p[1 : 1 + len(part)] == part}
    return problems


def start_from_data(data: dict[str, Any]) -> None:
    """Let the relative paths of a section's tasks start from its `data`; `data` is gone afterwards."""
    for place in SECTIONS:
        section = _at(data, place)
        if section is None or not isinstance(section.get("data"), str):
            continue
        folder = Path(section.pop("data"))
        for task in _tasks(section):
            for key in TASK_PATHS:
                if isinstance(task.get(key), str) and not task[key].startswith(("~", "${")):
                    task[key] = str(folder / task[key])


def _missing_parts(section: dict[str, Any], suite: dict[str, Any]) -> Iterator[Place]:
    """What of the suite the section lacks: whole keys, or of `versatility` its categories."""
    for key, value in suite.items():
        if key == "suite":
            continue
        if key not in section:
            yield (key,)
        elif isinstance(value, dict) and isinstance(section[key], dict):
            yield from ((key, name) for name in value if name not in section[key])


def _tasks(section: dict[str, Any]) -> Iterator[dict[str, Any]]:
    general = section.get("versatility")
    groups = [section.get("speciality"), *(general.values() if isinstance(general, dict) else ())]
    for group in groups:
        yield from (t for t in (group if isinstance(group, list) else [group]) if isinstance(t, dict))


def _at(data: dict[str, Any], place: Place) -> dict[str, Any] | None:
    here: Any = _at_any(data, place)
    return here if isinstance(here, dict) else None


def _at_any(data: Any, place: Place) -> Any:
    for part in place:
        data = data.get(part) if isinstance(data, dict) else None
    return data


def _put(section: dict[str, Any], place: Place, value: Any) -> None:
    for part in place[:-1]:
        section = section[str(part)]
    section[str(place[-1])] = value
