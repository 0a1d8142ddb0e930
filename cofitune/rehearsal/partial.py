"""What the ranks have answered so far: a file a batch, so that an interrupted rehearsal continues with the next one."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cofitune.checked import read_checked_tensors, write_checked_tensors
from cofitune.data.top_k import TopK
from cofitune.errors import ArtifactError, RepairWarning
from cofitune.files import read_json, remove_files, write_json
from cofitune.rehearsal.generate import Answer
from cofitune.temporary import TEMPORARY

IDENTITY = "identity.json"
OWN = re.compile(r"identity\.json|[a-z]+-\d{6}\.safetensors")


@dataclass(frozen=True)
class AnsweredBatch:
    """A batch's answers, and what is stored of them: a row for each token of all answers.

    Attributes:
        token_log_probs: the base's log-probability of each token, float32; empty where only the text counts.
    """

    answers: tuple[Answer, ...]
    top_k: TopK
    token_log_probs: Tensor


class Partial:
    """The folder of a rehearsal that is not finished. What it holds counts for one identity only."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def is_of(self, identity: dict[str, object]) -> bool:
        """Whether what is there was made by the same."""
        try:
            return bool(read_json(self._folder / IDENTITY, "identity") == identity)
        except ArtifactError:
            return False

    def start(self, identity: dict[str, object]) -> None:
        """Keep what is there of the same identity; otherwise begin with an empty folder."""
        if not self.is_of(identity):
            self.remove()
            write_json(self._folder / IDENTITY, identity)

    def remove(self) -> None:
        """Take away what we wrote into it, and the folder where nothing else lies in it."""
        remove_files(self._folder, OWN, TEMPORARY)

    def has(self, stage: str, number: int) -> bool:
        """Whether a batch was answered; of one whose file is damaged that is said, and it is answered again."""
        if not self._path(stage, number).is_file():
            return False
        try:
            self.get(stage, number)
        except ArtifactError as error:
            warnings.warn(f"answered again: {error}", RepairWarning, stacklevel=1)
            return False
        return True

    def put(self, stage: str, number: int, batch: AnsweredBatch) -> None:
        """Keep a batch; its file appears whole or not at all."""
        ids = torch.tensor([i for a in batch.answers for i in a.ids], dtype=torch.int32)
        tensors = {
            "ids": ids,
            "lengths": torch.tensor([len(a.ids) for a in batch.answers], dtype=torch.int32),
            "ended": torch.tensor([a.ended for a in batch.answers], dtype=torch.uint8),
            "indices": batch.top_k.indices,
            "log_probs": batch.top_k.log_probs,
            "rest": batch.top_k.rest,
            "token_log_probs": batch.token_log_probs,
        }
        write_checked_tensors(self._path(stage, number), tensors, {})

    def get(self, stage: str, number: int) -> AnsweredBatch:
        """Read a batch.

        Raises:
            ArtifactError: its file is damaged.
        """
        result, _ = read_checked_tensors(self._path(stage, number), "batch of answers")
        answers, start = [], 0
        for length, ended in zip(result["lengths"].tolist(), result["ended"].tolist(), strict=True):
            answers.append(Answer(tuple(result["ids"][start : start + length].tolist()), bool(ended)))
            start += length
        top_k = TopK(result["indices"], result["log_probs"], result["rest"])
        return AnsweredBatch(tuple(answers), top_k, result["token_log_probs"])

    def done(self, stage: str, numbers: Sequence[int]) -> int:
        """How many of these batches were answered."""
        return sum(self.has(stage, number) for number in numbers)

    def _path(self, stage: str, number: int) -> Path:
        return self._folder / f"{stage}-{number:06d}.safetensors"
