"""Suites: files with a section `eval` whose tasks stand in for those that a config does not name itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from cofitune.config.shipped import find_shipped

Place = tuple[str | int, ...]
Read = Callable[[Path], tuple[dict[str, object], dict[Place, str]]]
SECTIONS: tuple[Place, ...] = (("eval",), ("search", "eval"))
TASK_PATHS = ("path", "dataset_path")


def is_of_suite(override: str) -> bool:
    """Whether an override says which suite to take, or replaces all that a suite would add to."""
    name = override.partition("=")[0].strip()
    sections = [".".join(map(str, section)) for section in SECTIONS]
    return name == "search" or any(name in {s, f"{s}.suite"} for s in sections)


def add_suites(data: dict[str, object], sources: dict[Place, str], read: Read) -> list[str]:
    """Put the tasks of `eval.suite` (and `search.eval.suite`) where the config names none; `suite` is gone afterwards.

    Args:
        data: the config as read; changed in place.
        sources: file:line of each place in it; the suite's are added.
        read: reads a YAML file into its content and the source of each place.

    Returns:
        What is wrong with a suite, if anything.
    """
    problems = []
    for place, section, name in _taken_out(data, "suite"):
        try:
            path = find_shipped("suite", name)
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
            for part, above in _missing_parts(section, tasks):
                above[str(part[-1])] = _at_any(tasks, part)
                sources |= {(*place, *p[1:]): source for p, source in where.items() if p[1 : 1 + len(part)] == part}
    return problems


def start_from_data(data: dict[str, object]) -> None:
    """Let the relative paths of a section's tasks start from its `data`; `data` is gone afterwards."""
    for _, section, folder in _taken_out(data, "data"):
        for task in _tasks(section):
            for key in TASK_PATHS:
                path = task.get(key)
                if isinstance(path, str) and not path.startswith(("~", "${")):
                    task[key] = str(Path(folder) / path)


def _taken_out(data: dict[str, object], key: str) -> Iterator[tuple[Place, dict[str, object], str]]:
    """The sections of tasks that say a text under this key, which is gone from them; each with its place and text."""
    for place in SECTIONS:
        section = _at(data, place)
        if section is not None and isinstance(text := section.get(key), str):
            del section[key]
            yield place, section, text


def _missing_parts(section: dict[str, object], suite: dict[str, object]) -> Iterator[tuple[Place, dict[str, object]]]:
    """What of the suite the section lacks: whole keys, or of `versatility` its categories; each with where it goes."""
    for key, value in suite.items():
        if key == "suite":
            continue
        own = section.get(key)
        if key not in section:
            yield (key,), section
        elif isinstance(value, dict) and isinstance(own, dict):
            yield from (((key, name), own) for name in value if name not in own)


def _tasks(section: dict[str, object]) -> Iterator[dict[str, object]]:
    general = section.get("versatility")
    groups = [section.get("speciality"), *(general.values() if isinstance(general, dict) else ())]
    for group in groups:
        yield from (t for t in (group if isinstance(group, list) else [group]) if isinstance(t, dict))


def _at(data: dict[str, object], place: Place) -> dict[str, object] | None:
    here = _at_any(data, place)
    return here if isinstance(here, dict) else None


def _at_any(data: object, place: Place) -> object:
    for part in place:
        data = data.get(part) if isinstance(data, dict) else None
    return data
