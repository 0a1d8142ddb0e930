"""What the model sees of an item, and whether it fits into the model's positions. Known before weights load."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from cofitune.data.formats import BadItemError
from cofitune.errors import DataError
from cofitune.evaluation.asked import ask_item
from cofitune.evaluation.items import EvalItem, EvalTask, LoadedTask


def max_positions(config: object) -> int | None:
    """Tokens that a model can attend to, by its configuration; None where it does not say."""
    positions = getattr(config, "max_position_embeddings", None)
    return int(positions) if positions else None


def fit_lengths(
    tasks: Sequence[LoadedTask], tokenizer: PreTrainedTokenizerBase, positions: int | None
) -> tuple[LoadedTask, ...]:
    """Leave out the items that the model cannot hold, and count them; asked again, nothing more is left out.

    The harness would cut such a prompt from the left, template and instruction first. Of the harness's own tasks the
    items that it will cut are counted, and stay; so do items whose answer is longer than `max_new_tokens`.

    Args:
        positions: tokens that the model can attend to; None: without limit.

    Raises:
        DataError: no item of a task fits with its answer, or no right answer fits into `max_new_tokens`.
    """
    return tuple(_fitted(loaded, tokenizer, positions) for loaded in tasks)


def _fitted(loaded: LoadedTask, tokenizer: PreTrainedTokenizerBase, positions: int | None) -> LoadedTask:
    if loaded.rehearsal is not None:  # tokens that the base has read and written itself
        items = [loaded.rehearsal.items[item.line - 1] for item in loaded.items]
        longest = max(len(item.prompt_ids) for item in items)
        whole = max(len(item.prompt_ids) + len(item.answer_ids) for item in items)
        return replace(loaded, longest=longest, longest_whole=whole, asked_sha256=loaded.sha256)
    return (_cut if loaded.harness else _fit)(loaded, tokenizer, positions)


def _fit(loaded: LoadedTask, tokenizer: PreTrainedTokenizerBase, positions: int | None) -> LoadedTask:
    task = loaded.task
    fitting, left_out, unusable, shortest, hashed = [], [], [], None, hashlib.sha256()
    longest = longest_whole = logits = 0
    for item in loaded.items:
        try:
            asked = ask_item(tokenizer, item, task)
        except BadItemError as error:
            if task.on_bad_item == "error":
                raise DataError(f"{error} (task '{task.title}'; on_bad_item: drop leaves such items out)") from None
            unusable.append(item.line)
            continue
        length = len(asked.ids)
        whole = max((len(a.context) + len(a.ids) for a in asked.answers), default=length + task.max_new_tokens)
        if positions is not None and whole > positions:
            left_out.append(item.line)
            shortest = min(shortest or (length, whole - length), (length, whole - length))
            continue
        fitting.append(item)
        hashed.update(json.dumps([asked.prompt, asked.texts]).encode())
        longest = max(longest, length)
        longest_whole = max(longest_whole, whole)
        logits = max(logits, *(len(a.ids) for a in asked.answers), 1)
    if not fitting:
        _refuse_empty(task, shortest, positions)
    return replace(
        loaded,
        items=tuple(fitting),
        left_out=(*loaded.left_out, *left_out),
        unusable=tuple(sorted({*loaded.unusable, *unusable})),
        too_long=_too_long(task, fitting, tokenizer),
        longest=longest,
        longest_whole=longest_whole,
        logits_at_once=logits,
        asked_sha256=hashed.hexdigest(),
    )


def _refuse_empty(task: EvalTask, shortest: tuple[int, int] | None, positions: int | None) -> None:
    if shortest is None:
        raise DataError(f"{task.path}: no item of task '{task.title}' can be asked in this chat template")
    raise DataError(
        f"{task.path}: no item of task '{task.title}' fits: the shortest prompt has {shortest[0]} tokens and its "
        f"answer may have {shortest[1]}, but the model has {positions} positions"
    )


def _too_long(task: EvalTask, items: Sequence[EvalItem], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Lines of the items of which even the shortest right answer has more tokens than an answer may have.

    The last number of a text may come without the text; every other metric compares whole references.

    Raises:
        DataError: they are all so.
    """
    if task.kind != "generate" or task.metric == "number":
        return ()
    lengths = {item.line: min(_num_tokens(tokenizer, text.strip()) for text in item.references) for item in items}
    result = tuple(line for line, length in lengths.items() if length > task.max_new_tokens)
    if len(result) == len(lengths):
        raise DataError(
            f"{task.path}: no answer of task '{task.title}' can be all right: each right one has "
            f"{min(lengths.values())} tokens or more, and max_new_tokens is {task.max_new_tokens}"
        )
    return result


def _cut(loaded: LoadedTask, tokenizer: PreTrainedTokenizerBase, positions: int | None) -> LoadedTask:
    """The harness cuts prompts itself, and its own figures contain that: such items stay in, and are counted."""
    from cofitune.evaluation.harness.native import build_requests

    cut, asked = set(), hashlib.sha256()
    longest = longest_whole = logits = 0
    for number, context, answer in build_requests(loaded, tokenizer):
        asked.update(json.dumps([number, context, answer]).encode())
        length = _num_tokens(tokenizer, context)
        longest = max(longest, length)
        whole = length + (answer if isinstance(answer, int) else _num_tokens(tokenizer, answer))
        if positions is not None and whole > positions:
            cut.add(number)
            whole = positions
        longest_whole = max(longest_whole, whole)
        logits = max(logits, 1 if isinstance(answer, int) else whole)  # the harness makes those of the prompt, too
    if len(cut) == len(loaded.items):
        raise DataError(
            f"harness task '{loaded.task.title}': no item fits into the model's {positions} positions (the longest "
            f"prompt has {longest} tokens; num_fewshot makes it shorter)"
        )
    return replace(
        loaded,
        cut=tuple(sorted(cut)),
        longest=longest,
        longest_whole=longest_whole,
        logits_at_once=logits,
        asked_sha256=asked.hexdigest(),
    )


def _num_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])
