"""Answers that were given before, each kept under everything that it depends on."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cofitune.errors import ArtifactError, RepairWarning
from cofitune.evaluation.items import LoadedTask
from cofitune.evaluation.samples import TaskResult, load_result, save_result
from cofitune.files import read_json, write_json

KEY_LENGTH = 20


@dataclass(frozen=True)
class AnswerCache:
    """One folder below `folder` for each (model, task, settings): the key in full, the answers, the figures.

    The key names contents and not places: fingerprints of weights and data, the task's definition, the prompt's
    template, the tokenizer, dtype, batch size, device and library versions. It is compared in full when it is looked
    up, so that one model's answers are never served for another's.
    """

    folder: Path

    def holds(self, key: Mapping[str, object]) -> bool:
        """Whether there is a result under this key."""
        return (self._place(key) / "answers.json").is_file()

    def get(self, key: Mapping[str, object], loaded: LoadedTask) -> TaskResult | None:
        """The result under this key; None where there is none, or where its files are damaged, which is said."""
        place = self._place(key)
        if not self.holds(key):
            return None
        try:
            if read_json(place / "key.json", "key") != _plain(key):
                raise ArtifactError(f"{place}: its key is not the one that it lies under")
            result = load_result(place / "answers.jsonl")
        except ArtifactError as error:
            warnings.warn(f"'{loaded.task.title}' is asked again: {error}", RepairWarning, stacklevel=1)
            return None
        if result is None:
            return None
        # a title and a category are the reader's, not the answers'
        return replace(result, title=loaded.task.title, category=loaded.task.category)

    def put(self, key: Mapping[str, object], result: TaskResult) -> None:
        """Keep a result; its figures are written last and mark it as whole."""
        place = self._place(key)
        write_json(place / "key.json", _plain(key))
        save_result(result, place / "answers.jsonl")

    def _place(self, key: Mapping[str, object]) -> Path:
        text = json.dumps(key, sort_keys=True, ensure_ascii=False)
        return self.folder / hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def _plain(key: Mapping[str, object]) -> object:
    """The key as JSON gives it back: tuples are lists there."""
    return json.loads(json.dumps(key))
