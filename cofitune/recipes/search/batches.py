"""How many items the trials of a search are asked at once, where the config leaves it open: one number for all."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from cofitune.data.chat import IGNORED
from cofitune.errors import ArtifactError
from cofitune.evaluation.batch_size import MOST_ON_HOST, AskingMemory, device_memory, item_bytes
from cofitune.files import read_json
from cofitune.model.load import choose_dtype
from cofitune.recipes.evaluate.batches import AUTO
from cofitune.recipes.evaluate.plan import EvalPlan
from cofitune.recipes.search.measure import Measure
from cofitune.recipes.train.plan import TrainPlan
from cofitune.recipes.trial.loss_items import read_loss_items


def with_batch_size(measure: Measure, training: TrainPlan, asked: EvalPlan | None, begun: Path | None) -> Measure:
    """The measure with a number in the place of `batch_size: auto`.

    A search that has begun goes on with its own number. Nodes of a cluster differ, and a dry run may know no lengths:
    there it is what fits a CPU.

    Args:
        training: a trial's, resolved.
        asked: a trial's evaluation, resolved; None where there is none, or a dry run cannot plan it.
        begun: the folder of a search that has begun; None where no earlier call counts.
    """
    if measure.tasks.batch_size != AUTO:
        return measure
    size = _begun_with(begun) if begun else None
    if size is None and training.config.search.executor != "ray":
        size = min(asked.batch_sizes.values()) if asked else _for_losses(measure, training)
    chosen = measure.tasks.model_copy(update={"batch_size": size or MOST_ON_HOST})
    return replace(measure, tasks=chosen)


def _begun_with(folder: Path) -> int | None:
    """What an earlier call of the search chose; None where it left none that can be read."""
    with suppress(ArtifactError, OSError, KeyError, TypeError):
        size = read_json(folder / "store.json", "search store")["identity"]["eval"]["batch_size"]
        return size if isinstance(size, int) else None
    return None


def _for_losses(measure: Measure, training: TrainPlan) -> int | None:
    """As many examples as fit beside a training's weights and states; None where a dry run knows no lengths."""
    if training.data.tokenizer is None or measure.kind != "loss":
        return None
    one = measure.tasks.model_copy(update={"batch_size": 1})
    items = read_loss_items(one, training.config.data.max_length, training.data, measure.limit)
    examples = [*items.development, *(e for choices in items.choices for e in choices.examples)]
    whole = max((len(e.input_ids) for e in examples), default=0)
    read = max((sum(label != IGNORED for label in e.labels) for e in examples), default=0)
    memory = replace(training.footprint, shared_base=True).memory  # it may lie there for the other trials
    width = choose_dtype(training.config.model.dtype).itemsize
    row = item_bytes(training.anatomy, whole, read, width)
    return AskingMemory(memory.device - memory.activations, {"": max(1, row)}).batch("", device_memory())
