"""Tasks and groups of lm-evaluation-harness by their names, from the hub or from a local copy of their data."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from cofitune.errors import DataError, UserError, did_you_mean
from cofitune.evaluation.harness.quiet import quiet_harness
from cofitune.evaluation.harness.task_index import task_index
from cofitune.evaluation.ifeval import NO_PUNKT, import_verifiers, needs_punkt, punkt_is_there, require_harness
from cofitune.evaluation.items import EvalItem, EvalTask
from cofitune.evaluation.metrics import Metric

if TYPE_CHECKING:
    from lm_eval.api.task import Task

FEWSHOT_SEED = 1234  # the harness's command line's
# of what the harness's tasks report, what is a share of something: the rest is shown on its own scale, in no mean
BINARY = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "prompt_level_strict_acc", "pass@1")
SHARES = (*BINARY, "em", "f1", "inst_level_strict_acc", "prompt_level_loose_acc", "inst_level_loose_acc")
ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of a function without source text, another one in every process
Leaf = tuple[Path, dict[str, Any]]  # the file that describes a task, and what a group changes in it


@dataclass(frozen=True)
class Harness:
    """A task of the harness, or all of a group's, with the items that they ask.

    Attributes:
        tasks: the harness's task objects.
        items: an entry a question, numbered through over all tasks.
        sha256: hash of the settings and the questions.
    """

    tasks: tuple[Task, ...]
    items: tuple[EvalItem, ...]
    metric: Metric
    sha256: str


def load_harness(task: EvalTask) -> Harness:
    """Find a task by its name, and read its data.

    Raises:
        UserError: there is no task of this name, a package that it imports is missing, its data cannot be had, or the
            metric is not one of its metrics.
        DataError: `path` is no folder that holds this task's data.
    """
    require_harness()
    where = f"eval.{task.category}: harness task '{task.harness}'"
    with quiet_harness(), tempfile.TemporaryDirectory() as folder:
        try:
            names = write_task_files(task, Path(folder))
            if "ifeval" in str(task.harness):
                import_verifiers()  # before the harness does, which would try to download NLTK's table
            built = _build(names, Path(folder))
        except ImportError as error:
            raise UserError(f"{where} needs a package that is missing: {error}") from None
        except (OSError, ValueError, LookupError, TypeError, TemplateError) as error:
            hint = "" if task.path else " (dataset_path: names a local copy)"
            raise UserError(f"{where} cannot be loaded: {_one_line(error)}{hint}") from None
        for one in built:
            one.set_config("num_fewshot", _num_fewshot(one.get_config("num_fewshot"), task.num_fewshot))
        for one in built:
            _check_punkt(one, task.limit, where)
        metric, *others = (_metric(task, one, where) for one in built)
        if set(others) - {metric}:
            raise UserError(f"{where}: its tasks have no common metric first; name one (metric:), or its tasks")
        items = tuple(_items(built, task.limit, metric))
        return Harness(tuple(built), items, metric, _sha256(task, built))


def write_task_files(task: EvalTask, folder: Path) -> list[str]:
    """Write, for each task of the name, a file that includes the harness's own and says where the data lies.

    `lm_eval run --include_path FOLDER --tasks NAME` reads the same files.

    Returns:
        The tasks' names.

    Raises:
        UserError, DataError: as `load_harness`.
    """
    import yaml

    names = []
    for number, (path, changes) in enumerate(_leaves(task)):
        described = _describe(path) | changes
        if described.get("unsafe_code"):
            raise UserError(f"harness task '{described['task']}' runs code that the model writes: not supported")
        here: dict[str, object] = {"include": str(path), "task": described["task"], **changes}
        if task.path:
            if "class" in described:
                raise UserError(f"harness task '{described['task']}' is code that names its own data: no dataset_path")
            here |= _local_data(
                Path(task.path), described, _num_fewshot(described.get("num_fewshot"), task.num_fewshot)
            )
        text = yaml.safe_dump(here, sort_keys=False, allow_unicode=True)
        (folder / f"{number}.yaml").write_text(text, encoding="utf-8")
        names.append(str(described["task"]))
    return names


def _build(names: list[str], folder: Path) -> list[Task]:
    from lm_eval.tasks import TaskManager

    result = TaskManager(include_path=str(folder), include_defaults=False).load(names)["tasks"]
    return [result[name] for name in names]


def _leaves(task: EvalTask) -> list[Leaf]:
    """A task's file by a quick look at all of them; for a group, the harness's full index (it takes many seconds)."""
    import lm_eval.tasks

    name = str(task.harness)
    says = re.compile(rf"^task:\s*['\"]?{re.escape(name)}['\"]?\s*$", re.MULTILINE)
    for path in sorted(Path(lm_eval.tasks.__file__).parent.glob("**/*.yaml"), key=Path.as_posix):
        if says.search(path.read_text(encoding="utf-8")):
            return [(path, {})]
    index = task_index()
    if name not in index:
        near = did_you_mean(name, index)
        raise UserError(
            f"eval.{task.category}: lm-evaluation-harness has no task '{name}'{near} (all: lm_eval ls tasks)"
        )
    return list(_members(name, index, {}))


def _members(name: str, index: dict[str, Any], changes: dict[str, Any]) -> Iterator[Leaf]:
    """The tasks of a task, tag or group, each with what the groups around it change in it."""
    entry = index[name]
    members = sorted(entry.tags) if entry.kind.name == "TAG" else (entry.cfg or {}).get("task")
    if entry.kind.name not in ("TAG", "GROUP"):
        yield entry.yaml_path, changes
        return
    for member in members or ():
        if isinstance(member, str):
            yield from _members(member, index, changes)
        elif member.get("task") in index or member.get("group") in index:
            own = {k: v for k, v in member.items() if k not in ("task", "group", "task_alias")}
            yield from _members(member.get("task") or member["group"], index, changes | own)
        else:
            raise ValueError(f"group '{name}' defines a task of its own, which is not supported; name its tasks")


def _describe(path: Path) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml  # what follows `include`, and knows `!function`

    return dict(load_yaml(path, resolve_func=False))


def _local_data(folder: Path, described: dict[str, Any], num_fewshot: int) -> dict[str, object]:
    """Where a task's splits lie in a folder: in its subfolder named as the hub's subset, or in itself.

    The harness reads every split that a task names; those that are not needed may be missing here.
    """
    subset = described.get("dataset_name")
    place = folder / str(subset) if subset and (folder / str(subset)).is_dir() else folder
    if not place.is_dir():
        raise DataError(f"{folder}: no such folder (dataset_path of harness task '{described['task']}')")
    files: dict[str, list[str]] = {}
    for path in sorted(place.iterdir()):
        if path.suffix in (".json", ".jsonl", ".parquet"):  # test.jsonl, or the hub's test-00000-of-00001.parquet
            files.setdefault(path.name.split(".")[0].split("-")[0], []).append(str(path.resolve()))
    asked = "test_split" if described.get("test_split") else "validation_split"
    examples = next((s for s in ("fewshot_split", "training_split", "validation_split") if described.get(s)), asked)
    named = {key: described[key] for key in described if key.endswith("_split") and described[key]}
    for key in (asked, examples) if num_fewshot else (asked,):
        if (split := named[key]) not in files:
            result = f"it has {', '.join(files)}" if files else "it has none"
            raise DataError(
                f"{place}: harness task '{described['task']}' reads the split '{split}', as {split}.jsonl, .json or "
                f".parquet; {result}{did_you_mean(split, files)}"
            )
    parquet = all(path.endswith(".parquet") for paths in files.values() for path in paths)
    return {
        "dataset_path": "parquet" if parquet else "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        **{key: None for key, split in named.items() if split not in files},
    }


def _num_fewshot(own: int | None, asked: int | None) -> int:
    """As the harness's command line counts: a task that sets 0 keeps it, one that sets nothing has 0 by default."""
    return 0 if own == 0 else asked if asked is not None else own or 0


def _check_punkt(one: Task, limit: int | None, where: str) -> None:
    """IFEval's verifiers in the harness would miss the table only after the last answer."""
    needing = sum(needs_punkt(doc) for _, doc in one.doc_iterator(limit=limit))
    if needing and not punkt_is_there():
        raise UserError(f"{where}: {needing} of its items {NO_PUNKT}")


def _metric(task: EvalTask, one: Task, where: str) -> Metric:
    """The metric, with the filter whose answers it judges; its figure must be the mean of what each item got."""
    from lm_eval.api.registry import get_aggregation

    filters = [f.name for f in one._filters]
    names = [name for name, function in one.aggregation().items() if function is get_aggregation("mean")]
    accepted = [f"{name},{filter_}" for filter_ in filters for name in names]
    if not accepted:
        raise UserError(f"{where} has no metric that is a mean over its items, so that nothing could be compared")
    name, _, chosen = task.metric.partition(",")
    result = f"{name or names[0]},{chosen or filters[0]}"
    if result not in accepted:
        short = [a.removesuffix(",none") for a in accepted]
        raise UserError(f"{where} has no metric '{task.metric}'{did_you_mean(task.metric, short)} (has: {short})")
    name = result.partition(",")[0]
    shown = result.removesuffix(",none")
    return Metric(shown, "share" if name in SHARES else "own", bool(one.higher_is_better()[name]), name in BINARY)


def _items(built: list[Task], limit: int | None, metric: Metric) -> Iterator[EvalItem]:
    """A question each, of a group's tasks one after the other; the choices are kept, which chance depends on."""
    number = 0
    picked = metric.name.startswith("acc")
    for one in built:
        for _, doc in one.doc_iterator(limit=limit):
            number += 1
            choices = one.doc_to_choice(doc) if picked and one.OUTPUT_TYPE == "multiple_choice" else ()
            yield EvalItem(number, "", tuple(map(str, choices)))


def _sha256(task: EvalTask, built: list[Task]) -> str:
    content = [[one.config.to_dict(), [doc for _, doc in one.doc_iterator(limit=task.limit)]] for one in built]
    for settings, _ in content:
        for place in ("dataset_path", "dataset_kwargs", "metadata"):
            settings.pop(place, None)  # where the data lies is not what it says
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(ADDRESS.sub("", text).encode("utf-8")).hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
