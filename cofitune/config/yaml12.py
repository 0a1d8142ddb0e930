"""YAML 1.2's scalars, the line of every key, and what a config's YAML may not hold."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from cofitune.config.suite import Place
from cofitune.errors import ConfigError, did_you_mean

LARGEST = 2**20  # bytes of a config; a real one has a few thousand
MOST_ENTRIES = 50_000  # aliases counted as often as they are used: a few lines of them can stand for billions
DEEPEST = 50
_TAG = "tag:yaml.org,2002:"
_COLLECTIONS = {yaml.MappingNode: "a mapping", yaml.SequenceNode: "a list"}
_OWN = ("bool", "int", "float")
_LEFT_OUT = ("timestamp", "value", "binary", "omap", "pairs", "set")  # of YAML 1.1; a date is a text here
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


class Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` with YAML 1.2's scalars: `4e-5` is a number, `010` is 10, `1:30`, `off` and `no` are texts."""

    def _bool(self, node: yaml.ScalarNode) -> bool:
        return self._matching(node, _BOOL, "true or false").lower() == "true"

    def _int(self, node: yaml.ScalarNode) -> int:
        text = self._matching(node, _INT, "a whole number")
        try:
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        except ValueError:  # Python reads 4,300 digits
            raise self._problem(node, f"a number of {len(text):,} digits is too large") from None

    def _float(self, node: yaml.ScalarNode) -> float:
        text = self._matching(node, re.compile(f"{_FLOAT.pattern}|{_INT.pattern}"), "a number")
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))

    def _matching(self, node: yaml.ScalarNode, pattern: re.Pattern[str], what: str) -> str:
        text = str(self.construct_scalar(node))
        if not pattern.match(text):
            raise self._problem(node, f"'{text}' is not {what}, as its tag says")
        return text

    @staticmethod
    def _problem(node: yaml.Node, text: str) -> yaml.constructor.ConstructorError:
        return yaml.constructor.ConstructorError(None, None, text, node.start_mark)


_not_ours = {f"{_TAG}{name}" for name in (*_OWN, *_LEFT_OUT)}
Loader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in pairs if tag not in _not_ours]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.yaml_constructors = {tag: c for tag, c in yaml.SafeLoader.yaml_constructors.items() if tag not in _not_ours}
for _name, _regex, _first, _make in (
    ("bool", _BOOL, "tTfF", Loader._bool),
    ("float", _FLOAT, "-+0123456789.", Loader._float),
    ("int", _INT, "-+0123456789", Loader._int),
):
    Loader.add_implicit_resolver(f"{_TAG}{_name}", _regex, list(_first))
    Loader.add_constructor(f"{_TAG}{_name}", _make)


class Dumper(yaml.SafeDumper):
    """Quotes what `Loader` would not read back as a string, such as a revision named 12e5; writes no aliases."""

    def ignore_aliases(self, data: object) -> bool:
        """Write equal parts twice, so that each can be changed by itself."""
        return True


Dumper.yaml_implicit_resolvers = Loader.yaml_implicit_resolvers


def read_yaml(path: Path) -> tuple[dict[str, object], dict[Place, str]]:
    """Read a YAML file's mapping, and file:line of every place in it.

    Raises:
        ConfigError: it is missing, no YAML, no mapping, or holds what a config cannot: a key twice, a key that is no
            text, a tag, a loop of aliases.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(LARGEST + 1)  # a device may have no end
    except FileNotFoundError:
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise ConfigError([f"{path}: no such config file{near}"]) from None
    except IsADirectoryError:
        run = next((f for f in (path / "train" / "config.yaml", path / "config.yaml") if f.is_file()), None)
        raise ConfigError([f"{path}: is a folder, no config file" + (f"; a run's is {run}" if run else "")]) from None
    except (OSError, ValueError) as error:
        raise ConfigError([f"{path}: cannot be read: {error}"]) from None
    if len(text) > LARGEST:
        raise ConfigError([f"{path}: has more than {LARGEST:,} characters; is this a config?"])
    data, lines = parse(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError([f"{path}: a config is a mapping of sections (model, data, output_dir, …)"])
    return data, {place: f"{path}:{line}" for place, line in lines.items()}


def parse(text: str, name: str) -> tuple[object, dict[Place, int]]:
    """Read YAML: the value, no two parts of which are one object, and the line of every key and entry.

    Args:
        name: names the text in messages.

    Raises:
        ConfigError: as `read_yaml`.
    """
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        notes = _Notes(name)
        if node is not None:
            notes.take(node, ())
        if notes.problems:
            raise ConfigError(notes.problems)
        return _unshared(loader.construct_document(node)) if node is not None else None, notes.lines
    except yaml.YAMLError as error:
        raise ConfigError([_explain(error, text, name)]) from None
    except RecursionError:
        raise ConfigError([f"{name}: not valid YAML: nested too deeply"]) from None


def _explain(error: yaml.YAMLError, text: str, name: str) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"{name}:{mark.line + 1}" if mark else name
    line = text.split("\n")[mark.line] if mark and mark.line < text.count("\n") + 1 else ""
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    if found := re.match(r"could not determine a constructor for the tag '(.*)'", problem):
        problem = f"a config has no tags, such as {found[1].replace(_TAG, '!!')}; leave it out, or quote the text"
    elif "{{" in line:
        problem += "; {{ … }} is a placeholder that nothing fills in here: write the value, or put the text in quotes"
    elif "${" in line and "expected ',' or '}'" in problem:
        problem += "; within {…} a text with ${…} stands in quotes"
    return f"{where}: not valid YAML: {problem}"


class _Notes:
    """The lines of a YAML tree's keys, and what is wrong with it."""

    def __init__(self, name: str) -> None:
        self.lines: dict[Place, int] = {}
        self.problems: list[str] = []
        self._name, self._count, self._above = name, 0, list[int]()

    def take(self, node: yaml.Node, place: Place) -> None:
        """Note a node and all below it; an alias as often as it is used."""
        self._count += 1
        if id(node) in self._above:
            self._say(node, f"{_dotted(place)} contains itself through an alias")
        elif len(self._above) > DEEPEST:
            self._say(node, f"{_dotted(place[:3])}… is nested more than {DEEPEST} deep")
        elif self._count == MOST_ENTRIES:
            self._say(node, f"the aliases stand for more than {MOST_ENTRIES:,} entries")
        elif self._count < MOST_ENTRIES:
            self._above.append(id(node))
            if isinstance(node, yaml.MappingNode):
                self._take_keys(node, place)
            elif isinstance(node, yaml.SequenceNode):
                for index, item in enumerate(node.value):
                    self.lines.setdefault((*place, index), item.start_mark.line + 1)
                    self.take(item, (*place, index))
            self._above.pop()

    def _take_keys(self, node: yaml.MappingNode, place: Place) -> None:
        own: dict[str, int] = {}
        merged: list[yaml.Node] = []
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag == f"{_TAG}merge":
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
            elif isinstance(key, yaml.MappingNode) and _is_placeholder(node, key):
                self._say(key, "{{ … }} is a placeholder that nothing fills in here: write the value")
            elif not isinstance(key, yaml.ScalarNode) or key.tag != f"{_TAG}str":
                what = f"'{key.value}'" if isinstance(key, yaml.ScalarNode) else _COLLECTIONS[type(key)]
                self._say(key, f"a key of {_dotted(place)} must be a text, not {what}; put it in quotes")
            elif key.value in own:
                name = _dotted((*place, key.value))
                self._say(key, f"{name} is written twice (first in line {own[key.value]})")
            else:
                own[key.value] = line
                self.lines[(*place, key.value)] = line
                self.take(value, (*place, key.value))
        for below in merged:
            if isinstance(below, yaml.MappingNode):
                self.take(below, place)
            else:
                self._say(below, f"<< in {_dotted(place)} takes in a mapping (an alias such as *name), nothing else")
        self.lines |= {(*place, name): line for name, line in own.items()}

    def _say(self, node: yaml.Node, text: str) -> None:
        problem = f"{self._name}:{node.start_mark.line + 1}: {text}"
        if problem not in self.problems:
            self.problems.append(problem)


def _is_placeholder(node: yaml.MappingNode, key: yaml.MappingNode) -> bool:
    """Whether `{{ … }}` was read as a mapping whose key is one."""
    return bool(node.flow_style) and node.start_mark.index + 1 == key.start_mark.index


def _unshared(value: object) -> object:
    """A copy in which no part stands twice: a change of one use of an alias would change the others."""
    if isinstance(value, dict):
        return {key: _unshared(part) for key, part in value.items()}
    return [_unshared(part) for part in value] if isinstance(value, list) else value


def _dotted(place: Place) -> str:
    return ".".join(str(part) for part in place) or "the config"
