"""What alpha is chosen by: development scores or a development loss; and how far a model has moved from the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cofitune.data.chat import Example
from cofitune.data.encoded import Encoding
from cofitune.data.sources import OpenSource
from cofitune.errors import UserError
from cofitune.evaluation.data_parallel import BatchSharding
from cofitune.evaluation.drift import score_drift
from cofitune.evaluation.items import LoadedTask
from cofitune.evaluation.score import ScoreRequest, score_model, versions
from cofitune.evaluation.statistics.scores import TaskScore, summarise
from cofitune.recipes.from_config import NOT_ASKED
from cofitune.training.validation import validation_loss


class Measure(Protocol):
    """How much a model has learnt, by development items.

    Attributes:
        figure: what one measurement is: score or loss.
        batch_size: items that the model is given at once.
        batch_key: of the run's config, that says so.
    """

    @property
    def figure(self) -> str: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def batch_key(self) -> str: ...

    def take(self, model: PreTrainedModel) -> float:
        """Measure a model in memory."""

    def gain(self, base: float, figure: float) -> float:
        """How far a figure is better than the base's."""

    def about(self) -> dict[str, object]:
        """What alpha.json tells of it: its name, and the data by path and contents."""

    def settings(self) -> dict[str, Any]:
        """All that a figure depends on besides the weights and what all measurements share, by content."""


@dataclass(frozen=True)
class TaskMeasure:
    """The mean score of speciality tasks, in points (0 is guessing, 100 is all right)."""

    tasks: tuple[LoadedTask, ...]
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    figure = "score"
    batch_key = "search.eval.batch_size"

    def take(self, model: PreTrainedModel) -> float:
        """Ask all items of all tasks.

        Raises:
            UserError: the model's log-likelihoods are no numbers.
        """
        results = score_model(model, ScoreRequest(self.tokenizer, self.tasks, self.batch_size))
        for result in results.values():
            if not result.are_numbers:
                raise UserError(f"task '{result.title}': log-likelihoods are no numbers: the run's weights are damaged")
        counted = {t: TaskScore(r.category, r.raw, r.chance, r.metric.unit) for t, r in results.items()}
        score = summarise(counted).speciality
        if score is None:
            raise RuntimeError("a measure has a task that counts")
        return score

    def gain(self, base: float, figure: float) -> float:
        """Points more than the base's."""
        return figure - base

    def about(self) -> dict[str, object]:
        """The tasks."""
        tasks = [
            {
                "name": t.task.title,
                "path": t.task.path,
                "metric": t.metric.name,
                "items": len(t.items),
                "sha256": t.sha256,
            }
            for t in self.tasks
        ]
        return {"name": "mean score of search.eval.speciality, points", "tasks": tasks}

    def settings(self) -> dict[str, Any]:
        """The tasks by content, and the code that asks and grades."""
        tasks = [
            {k: v for k, v in asdict(t.task).items() if k not in NOT_ASKED} | {"sha256": t.sha256} for t in self.tasks
        ]
        return {"tasks": tasks, "batch_size": self.batch_size, "versions": versions()}


@dataclass(frozen=True)
class LossMeasure:
    """The loss on validation items, in nats a supervised token (training/validation.py)."""

    examples: Sequence[Example]
    sources: tuple[OpenSource, ...]
    encoding: Encoding
    batch_size: int
    pad_token_id: int
    figure = "loss"
    batch_key = "train.per_device_train_batch_size"

    def take(self, model: PreTrainedModel) -> float:
        """The mean over all items' supervised tokens.

        Raises:
            UserError: it is no finite number.
        """
        loss = validation_loss(model, self.examples, self.batch_size, self.pad_token_id)
        if loss is None:
            raise UserError("data.validation: the loss is no finite number: the run's weights are damaged")
        return loss

    def gain(self, base: float, figure: float) -> float:
        """Nats a token less than the base's."""
        return base - figure

    def about(self) -> dict[str, object]:
        """The data."""
        name = "loss on data.validation, nats a supervised token"
        return {"name": name, "items": len(self.examples), "data": [source.identity() for source in self.sources]}

    def settings(self) -> dict[str, Any]:
        """The data by content, and how it becomes tokens."""
        data = [[source.sha256, source.source.format] for source in self.sources]
        return {"data": data, "encoding": asdict(self.encoding), "batch_size": self.batch_size}


@dataclass(frozen=True)
class DriftMeasure:
    """How far a model has moved from the base, in nats a token of the base's own held-out answers."""

    loaded: LoadedTask
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    batch_key = "eval.batch_size"

    def take(self, model: PreTrainedModel) -> float:
        """The mean over the answers' tokens; about 0 for the base."""
        return score_drift(model.eval(), self.tokenizer, self.loaded, self.batch_size, BatchSharding()).raw
