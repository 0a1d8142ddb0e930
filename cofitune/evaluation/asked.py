"""What the model sees of an item of a file: its prompt and given answers, as text and as the tokens of training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from cofitune.data.asking import GivenAnswer, answer_tokens, make_prompt_tokens
from cofitune.data.control import check_contents
from cofitune.data.tokens import token_ids, tokenize
from cofitune.evaluation.items import EvalItem, EvalTask


@dataclass(frozen=True)
class Asked:
    """One item as the model sees it.

    Attributes:
        prompt: the text up to where an answer begins.
        ids: its tokens.
        texts: the given answers, as they follow the prompt: of a multiple choice each, of a loss item the one.
        answers: their tokens, each with those before it.
    """

    prompt: str
    ids: tuple[int, ...]
    texts: tuple[str, ...] = ()
    answers: tuple[GivenAnswer, ...] = ()


class AskedTokens:
    """The tokens of all that will be asked, by the texts that the harness hands on."""

    def __init__(self, asked: Iterable[Asked]) -> None:
        items = list(asked)
        self._prompts = {one.prompt: one.ids for one in items}
        self._answers = {(a.prompt, text): given for a in items for text, given in zip(a.texts, a.answers, strict=True)}

    def of_prompt(self, text: str) -> list[int]:
        """A prompt's."""
        return list(self._prompts[text])

    def of_answer(self, prompt: str, text: str) -> tuple[list[int], list[int]]:
        """A given answer's, behind those before it."""
        given = self._answers[prompt, text]
        return list(given.context), list(given.ids)


def ask_item(tokenizer: PreTrainedTokenizerBase, item: EvalItem, task: EvalTask) -> Asked:
    """Render and tokenize an item as its task asks it.

    Raises:
        BadItemError: the chat template refuses the item or drops a part of it, or a text holds a control token
            (file:line).
    """
    given = item.choices or (item.references[:1] if task.kind == "loss" else ())
    where = f"{task.path}:{item.line}"
    if task.prompt == "chat":
        messages = [{"role": "user", "content": item.prompt}]
        prompt = make_prompt_tokens(tokenizer, messages, where, opened=task.think_end_token is None)
        answers = tuple(answer_tokens(tokenizer, messages, text, where) for text in given)
        return Asked(prompt.text, prompt.ids, tuple(given), answers)
    check_contents(tokenizer, [{"role": "user", "content": text} for text in (item.prompt, *given)], where)
    text = _continued(tokenizer, item)
    texts = tuple(_apart(item, answer) for answer in given)
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return Asked(text, ids, texts, tuple(split_tokens(tokenizer, text, answer) for answer in texts))


def split_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, continuation: str) -> GivenAnswer:
    """Tokens of `prompt + continuation` in two parts; a token astride belongs to the prompt.

    Tokens without characters of their own belong where they stand: to the prompt as far as it has them alone.
    """
    ids, offsets = tokenize(tokenizer, prompt + continuation)
    cut = next((i for i, (first, last) in enumerate(offsets) if len(prompt) <= first < last), len(ids))
    whole = max((i + 1 for i in range(cut) if offsets[i][0] < offsets[i][1]), default=0)  # behind it white space alone
    if whole < cut:
        alone = token_ids(tokenizer, prompt)
        astride = whole > 0 and offsets[whole - 1][1] > len(prompt)
        fits = whole <= len(alone) <= cut and ids[: len(alone)] == alone
        cut = whole if astride else len(alone) if fits else cut
    cut = min(cut, len(ids) - 1)  # a choice that is all in the token astride is judged by that token
    return GivenAnswer(tuple(ids[:cut]), tuple(ids[cut:]))


def _continued(tokenizer: PreTrainedTokenizerBase, item: EvalItem) -> str:
    first = tokenizer("a")["input_ids"][0]
    begins = tokenizer.bos_token is not None and first == tokenizer.bos_token_id
    return f"{tokenizer.bos_token}{item.prompt}" if begins else item.prompt


def _apart(item: EvalItem, answer: str) -> str:
    """An answer as it follows a text: behind a space, unless there is white space already."""
    return answer if item.prompt[-1:].isspace() or answer[:1].isspace() else f" {answer}"
