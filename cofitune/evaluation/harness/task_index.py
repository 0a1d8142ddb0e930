"""What lm-evaluation-harness brings: its tasks, groups and tags by name."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lm_eval.tasks._index import Entry


@cache
def task_index() -> dict[str, Entry]:
    """Every name with its kind and file. Read once a process: it parses 14,000 files, for many seconds."""
    from lm_eval.tasks import TaskManager

    return dict(TaskManager(verbosity="ERROR").task_index)
