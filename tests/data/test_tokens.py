"""Which tokens are a response's: by their place, whatever their offsets say."""

from __future__ import annotations

from typing import Any

import pytest

from cofitune.data.asking import GivenAnswer
from cofitune.data.responses import Response
from cofitune.data.tokens import Bounds, bounds, encode_response, tokenize
from cofitune.evaluation.asked import split_tokens


class Offsetless:
    """A tokenizer that gives white space no characters, as some do; all else is another's."""

    def __init__(self, tokenizer: Any, at_zero: bool) -> None:
        self._tokenizer, self._at_zero = tokenizer, at_zero

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __call__(self, text: str, **options: Any) -> Any:
        result = self._tokenizer(text, **options)
        if "offset_mapping" in result:
            result["offset_mapping"] = [
                ((0, 0) if self._at_zero else (a, a)) if text[a:b].isspace() else (a, b)
                for a, b in result["offset_mapping"]
            ]
        return result


def response(prompt: str, text: str, end: str) -> Response:
    start = len(prompt)
    whole = prompt + text + end
    return Response(whole, start, start, start + len(text), len(whole), True)


@pytest.mark.parametrize("at_zero", [False, True])
@pytest.mark.parametrize("text", ["a\n\n b", "\n\na", "Paris", "  a  \n"])
def test_tokens_without_characters_belong_where_they_stand(tiny_tokenizer: Any, at_zero: bool, text: str) -> None:
    one = response("<|im_start|>assistant\n", text, "<|im_end|>")
    expected = encode_response(tiny_tokenizer, one, "f:1")
    ids, found = encode_response(Offsetless(tiny_tokenizer, at_zero), one, "f:1")
    assert ids == expected[0]
    assert (found.start, found.end) == (expected[1].start, expected[1].end)
    assert tiny_tokenizer.decode(ids[found.start : found.end]) == text + "<|im_end|>"


@pytest.mark.parametrize("at_zero", [False, True])
@pytest.mark.parametrize("prompt", ["The answer:", "The answer: ", "The\n\n answer:\n\n"])
@pytest.mark.parametrize("answer", ["a\n\n b", "\n\na", "  a  \n", " Paris", "Paris", "\n"])
def test_an_answer_behind_a_text_has_its_white_space(
    tiny_tokenizer: Any, at_zero: bool, prompt: str, answer: str
) -> None:
    ids, offsets = tokenize(tiny_tokenizer, prompt + answer)
    cut = min(sum(first < len(prompt) for first, _ in offsets), len(ids) - 1)
    expected = GivenAnswer(tuple(ids[:cut]), tuple(ids[cut:]))
    assert split_tokens(tiny_tokenizer, prompt, answer) == expected
    assert split_tokens(Offsetless(tiny_tokenizer, at_zero), prompt, answer) == expected


def test_a_prompt_that_is_tokenized_otherwise_alone_is_told(tiny_tokenizer: Any) -> None:
    one = response("assistant: ", "two", "<|im_end|>")
    encoded = tiny_tokenizer(one.text, add_special_tokens=False, return_offsets_mapping=True)
    assert bounds(tiny_tokenizer, one, encoded["input_ids"], encoded["offset_mapping"]) is None
    ids, found = encode_response(tiny_tokenizer, one, "f:1")
    prompt = tiny_tokenizer("assistant: ", add_special_tokens=False)["input_ids"]
    assert ids[: found.start] == prompt and found == Bounds(len(prompt), len(prompt), len(ids) - 1, len(ids))
    assert tiny_tokenizer.decode(ids) == one.text
