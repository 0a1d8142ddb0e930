"""Prompts for a rehearsal: read from general data, encoded, and told apart from each other and from the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from transformers import PreTrainedTokenizerBase

from cofitune.config import schema
from cofitune.data.asking import make_prompt_tokens
from cofitune.data.encoded import shares
from cofitune.data.formats import BadItemError
from cofitune.data.read import ItemCounts, bad_item, make_prompt
from cofitune.data.sources import OpenSource
from cofitune.evaluation.overlap import TestItems
from cofitune.files import sha256_json
from cofitune.recipes.from_config import eval_tasks

DUPLICATE, IN_A_TEST = "same prompt as another", "also asked in a test"


@dataclass(frozen=True)
class Prompt:
    """A prompt to be answered: its turns, its tokens in the template, and where it comes from."""

    messages: tuple[dict[str, str], ...]
    ids: tuple[int, ...]
    where: str


def read_tests(sections: Iterable[schema.Eval | None]) -> TestItems:
    """The items of all tasks of these sections (`eval`, `search.eval`).

    Raises:
        DataError: a task's file is missing or cannot be read.
    """
    return TestItems(task for section in sections if section for task in eval_tasks(section))


class PromptReader:
    """From the rows of the data to prompts, with the account of what was left out.

    Args:
        tokenizer: None where a dry run has none.
        positions: those of the model; None: unlimited.
        room: tokens that an answer may have.
        on_bad_item: error | drop.
        tests: the items of all tasks, which no prompt may be.
        opened: whether answers begin with what the template opens every response with; else the base may think first.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        positions: int | None,
        *,
        room: int,
        on_bad_item: str,
        tests: TestItems,
        opened: bool = True,
    ) -> None:
        self._tokenizer, self._positions, self._room = tokenizer, positions, room
        self._on_bad_item, self._tests, self._opened = on_bad_item, tests, opened
        self.account, self.examples = ItemCounts(), dict[str, list[str]]()

    def prompts(self, opened: Sequence[OpenSource], max_items: int | None) -> Iterator[Prompt]:
        """The usable prompts of these sources, in their order; `max_items` of all together, None: all."""
        limits = [None] * len(opened) if max_items is None or not opened else shares(max_items, opened)
        seen: set[tuple[int, ...]] = set()
        for one, limit in zip(opened, limits, strict=True):
            for where, row in islice(one.rows(), limit):
                self.account.read += 1
                try:
                    messages = make_prompt(where, row, one.source.format).messages()
                    prompt = Prompt(tuple(messages), self._encode(messages, where), where)
                except BadItemError as error:
                    self._drop_bad(error)
                    continue
                if keep_prompt(prompt, seen, self._tests, self.drop):
                    self.account.kept += 1
                    self.account.tokens += len(prompt.ids) if self._tokenizer else 0
                    yield prompt

    def drop(self, reason: str, message: str) -> None:
        """Count a prompt that is left out, and keep the first ones as examples."""
        note(self.account, self.examples, reason, message)

    def _drop_bad(self, error: BadItemError) -> None:
        bad_item(error, self._on_bad_item, self.account)
        keep_example(self.examples, error.reason, str(error))

    def _encode(self, messages: list[dict[str, str]], where: str) -> tuple[int, ...]:
        """The prompt's tokens; without a tokenizer its text stands in for them."""
        if self._tokenizer is None:
            return tuple(sha256_json(messages).encode())
        return encode_prompt(self._tokenizer, messages, where, self._room, self._positions, self._opened)


def text_of(messages: Sequence[dict[str, str]]) -> str:
    """What the user says last."""
    return messages[-1]["content"]


def keep_prompt(prompt: Prompt, seen: set[tuple[int, ...]], tests: TestItems, drop: Callable[[str, str], None]) -> bool:
    """Whether a prompt is new and no test's; else `drop(reason, message)` is told.

    Args:
        seen: tokens of the prompts before it; it is added to them.
    """
    if prompt.ids in seen:
        drop(DUPLICATE, f"{prompt.where}: {shortened(text_of(prompt.messages))}")
        return False
    if task := tests.task_of(text_of(prompt.messages)):
        drop(IN_A_TEST, f"{prompt.where}: task '{task}' asks it, too: {shortened(text_of(prompt.messages))}")
        return False
    seen.add(prompt.ids)
    return True


def shortened(text: str, most: int = 60) -> str:
    """A text in one line, its end left out where it is long."""
    line = " ".join(text.split())
    return repr(line if len(line) <= most else line[: most - 1] + "…")


def note(account: ItemCounts, examples: dict[str, list[str]], reason: str, message: str) -> None:
    """Count what is left out, and keep the first messages of each reason."""
    account.drop(reason, message)
    keep_example(examples, reason, message)


def keep_example(examples: dict[str, list[str]], reason: str, message: str, most: int = 3) -> None:
    """Keep the first messages of each reason."""
    examples.setdefault(reason, [])
    if len(examples[reason]) < most:
        examples[reason].append(message)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    where: str,
    room: int,
    positions: int | None,
    opened: bool = True,
) -> tuple[int, ...]:
    """A prompt's tokens in the template, up to where the answer begins.

    Args:
        room: tokens that the answer may have.
        positions: those of the model; None: unlimited.
        opened: as `make_prompt_tokens` takes it.

    Raises:
        BadItemError: the template refuses it or drops a part of it, or it leaves too little room for the answer.
    """
    ids = make_prompt_tokens(tokenizer, messages, where, opened).ids
    if positions is not None and len(ids) + room > positions:
        raise BadItemError(
            "prompt too long",
            f"{where}: the prompt has {len(ids)} tokens and its answer may have {room} (rehearsal.max_new_tokens), "
            f"but the model has {positions} positions",
        )
    return ids
