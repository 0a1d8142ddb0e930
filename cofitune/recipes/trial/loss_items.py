"""What a trial is measured on without generating: development answers, the base's own held-out ones, and choices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cofitune.config import schema
from cofitune.data.batches import Batch, Plan, rank_micro_batches
from cofitune.data.chat import IGNORED, Example
from cofitune.data.encoded import Examples
from cofitune.data.shared_beginning import SharedBeginning, collate_shared, divide
from cofitune.evaluation.asked import ask_item
from cofitune.evaluation.items import EvalItem, LoadedTask
from cofitune.evaluation.tasks import load_tasks
from cofitune.files import sha256_json
from cofitune.model.varlen import attending_by_conversation
from cofitune.recipes.from_config import eval_tasks
from cofitune.recipes.train.data import TrainData
from cofitune.training.loss import supervised_logits, works_without_mask
from cofitune.training.prefix_cache import Around, nothing_around
from cofitune.training.validation import validation_loss

if TYPE_CHECKING:
    from cofitune.zero import Engine


@dataclass(frozen=True)
class Choices:
    """The multiple-choice items of one category.

    Attributes:
        examples: every choice of every item behind its prompt, the choices carrying the labels.
        items: for each item the places of its choices in `examples`, and which of them is right.
    """

    category: str
    examples: Sequence[Example]
    items: Sequence[tuple[range, int]]

    def shared(self, at_most: int) -> list[SharedBeginning]:
        """Each item's choices behind a question that they share, `at_most` choices behind one; long ones first."""
        parts = [places[n : n + at_most] for places, _ in self.items for n in range(0, len(places), at_most)]
        shared = [SharedBeginning.of(self.examples[part.start : part.stop], part) for part in parts]
        return sorted(shared, key=lambda one: -one.num_tokens)


@dataclass(frozen=True)
class LossItems:
    """All that a trial's losses are taken on, besides the held-out answers.

    Attributes:
        development: answers of the speciality's development items; their loss is the speciality loss.
        choices: one for each category that has some.
        left_out: items that do not fit into data.max_length.
        batch_size: examples a forward on one rank.
    """

    development: Sequence[Example]
    choices: tuple[Choices, ...]
    left_out: int
    batch_size: int
    pad_token_id: int

    @property
    def tokens(self) -> int:
        """Tokens of all of them, each choice with its question, padding not counted."""
        examples = [*self.development, *(example for one in self.choices for example in one.examples)]
        return sum(len(example.input_ids) for example in examples)

    def sha256(self) -> str:
        """A hash over all tokens, labels and right answers."""
        development = [[e.input_ids, e.labels] for e in self.development]
        choices = [
            [c.category, [[e.input_ids, e.labels] for e in c.examples], [[p.start, p.stop, a] for p, a in c.items]]
            for c in self.choices
        ]
        return sha256_json([development, choices, self.batch_size, self.pad_token_id])


def read_loss_items(given: schema.Eval, max_length: int, data: TrainData, limit: int | None) -> LossItems:
    """Read a trial's development items and choices.

    Args:
        given: the trial's tasks. Its speciality is taken on data.validation instead where there is some.
        max_length: tokens that an item may have; longer ones are left out.
        limit: items of data.validation that are taken, spread evenly over it; None: all.

    Raises:
        UserError: a file or an item cannot be used.
    """
    if data.tokenizer is None:
        raise RuntimeError("a dry run without a tokenizer measures nothing")
    tokenizer = data.tokenizer
    tasks = load_tasks(eval_tasks(given))
    development = _spread(data.validation, limit) or [
        _example(tokenizer, task, item, item.references[0] if item.references else item.choices[item.answer])
        for task in tasks
        if task.task.category == "speciality"
        for item in task.items
    ]
    fitting = [example for example in development if len(example.input_ids) <= max_length]
    fitting.sort(key=lambda example: -len(example.input_ids))  # batches of like lengths: little is padded
    categories = sorted({task.task.category for task in tasks} - {"speciality"})
    read = [_choices(name, [t for t in tasks if t.task.category == name], tokenizer, max_length) for name in categories]
    left_out = len(development) - len(fitting) + sum(count for _, count in read)
    choices = tuple(one for one, _ in read if one.items)
    return LossItems(fitting, choices, left_out, given.known_batch_size, tokenizer.pad_token_id)


def choice_margins(
    engine: Engine, items: LossItems, around: Around = nothing_around, *, any_attention: bool
) -> dict[str, float]:
    """By category, the mean margin of the right choice over the likeliest wrong one. Every rank must call, and gets it.

    Args:
        any_attention: whether the user leaves open how attention is computed (`model.attn_implementation: auto`), so
            that a question may be read once for all choices behind it.
        around: what each batch's forward pass runs in.

    Returns:
        Nats, summed over a choice's tokens; higher is better, below 0 the model prefers wrong ones.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    engine.eval()
    result = {}
    with reading_questions_once(engine.module, any_attention) as once:
        for choices in items.choices:
            batches = _batches(choices, items, once, rank, world_size)
            sums = _log_probs(engine, engine.device, len(choices.examples), batches, around)
            torch.distributed.all_reduce(sums)
            result[choices.category] = mean_margin(choices, sums.tolist())
    engine.train()
    return result


def measure_base(
    model: PreTrainedModel, items: LossItems, *, any_attention: bool
) -> tuple[float | None, dict[str, float]]:
    """The base's speciality loss in nats a token (None: not finite) and its margins; each rank measures all of it.

    Args:
        any_attention: as for `choice_margins`.
    """
    loss = validation_loss(model, items.development, items.batch_size, items.pad_token_id)
    margins = {}
    with reading_questions_once(model, any_attention) as once:
        for choices in items.choices:
            batches = _batches(choices, items, once, rank=0, world_size=1)
            sums = _log_probs(model, model.device, len(choices.examples), batches)
            margins[choices.category] = mean_margin(choices, sums.tolist())
    return loss, margins


@contextmanager
def reading_questions_once(model: PreTrainedModel, any_attention: bool) -> Iterator[bool]:
    """Inside, whether a question can be read once for all choices behind it. It takes attention by conversation."""
    if not any_attention or not works_without_mask(model):
        yield False
        return
    with attending_by_conversation(model) as once:
        yield once


def mean_margin(choices: Choices, log_probs: Sequence[float]) -> float:
    """The mean over the items of log p(right) − max log p(wrong).

    Args:
        log_probs: of each choice, in nats, in the order of `choices.examples`.
    """
    values = []
    for places, answer in choices.items:
        own = [log_probs[place] for place in places]
        values.append(own.pop(answer) - max(own))
    return math.fsum(values) / len(values)


def _log_probs(
    model: PreTrainedModel | Engine,
    device: torch.device,
    count: int,
    batches: Iterable[Batch],
    around: Around = nothing_around,
) -> Tensor:
    """The log-probability of each example's labelled tokens, float64 [count]; 0 of one that is in no batch.

    Args:
        batches: with the example of each token in `names`, int64 [B, T].
    """
    sums = torch.zeros(count, dtype=torch.float64, device=device)
    with torch.no_grad():
        for on_host in batches:
            batch = {key: value.to(device) for key, value in on_host.items()}
            names = batch.pop("names")
            with around(batch):
                logits, targets, (rows, columns) = supervised_logits(model, batch)
            nats = cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none").double()
            sums.index_add_(0, names[rows, columns + 1], -nats)  # a silent row's one target is ignored: it adds 0
    return sums


def _batches(choices: Choices, items: LossItems, once: bool, rank: int, world_size: int) -> Iterator[Batch]:
    """A rank's share of the choices, in as many batches as every other rank has; long ones first: little is padded.

    Args:
        once: each question is read once for all choices behind it.
    """
    examples = choices.examples
    if not once:
        plan = Plan(items.batch_size, 1, world_size, len(examples), num_steps=1)
        order = sorted(range(len(examples)), key=lambda index: -len(examples[index].input_ids))
        for start in range(0, len(examples), plan.per_step):
            indices = order[start : start + plan.per_step]
            (batch,) = rank_micro_batches(examples, indices, plan, rank, items.pad_token_id)
            yield batch | {"names": batch["indices"][:, None].expand_as(batch["input_ids"])}
        return
    # a batch of the other kind may take as much, which the batch size was chosen for
    tokens = items.batch_size * max(len(example.input_ids) for example in examples)
    labels = items.batch_size * max(example.num_supervised for example in examples)
    batches = divide(choices.shared(items.batch_size), tokens, labels)
    for start in range(0, len(batches), world_size):
        at_once = batches[start : start + world_size]
        own = at_once[rank] if rank < len(at_once) else [at_once[-1][-1].silent()]
        yield collate_shared(own)


def _spread(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """The examples of `limit` items, spread evenly over all of them."""
    if limit is None or not isinstance(examples, Examples):
        return list(examples)
    begins = [*np.flatnonzero(examples.begins_item).tolist(), len(examples)]
    count = len(begins) - 1
    chosen = np.unique(np.linspace(0, count - 1, min(limit, count)).round().astype(int)).tolist()
    return [examples[index] for item in chosen for index in range(begins[item], begins[item + 1])]


def _choices(
    category: str, tasks: Sequence[LoadedTask], tokenizer: PreTrainedTokenizerBase, most: int
) -> tuple[Choices, int]:
    """A category's items that fit, and how many do not."""
    examples: list[Example] = []
    kept: list[tuple[range, int]] = []
    left_out = 0
    for task in tasks:
        for item in task.items:
            own = [_example(tokenizer, task, item, choice) for choice in item.choices]
            if max(len(example.input_ids) for example in own) > most:
                left_out += 1
                continue
            kept.append((range(len(examples), len(examples) + len(own)), item.answer))
            examples += own
    return Choices(category, examples, kept), left_out


def _example(tokenizer: PreTrainedTokenizerBase, task: LoadedTask, item: EvalItem, answer: str) -> Example:
    """An answer behind its prompt, as the task asks it; the answer's tokens carry the labels."""
    asked = ask_item(tokenizer, replace(item, choices=(), references=(answer,)), replace(task.task, kind="loss"))
    (given,) = asked.answers
    return Example([*given.context, *given.ids], [IGNORED] * len(given.context) + list(given.ids))
