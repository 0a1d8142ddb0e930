"""Published templates × a single turn, several, a system turn, reasoning: what is learned, and what is asked."""

from __future__ import annotations

import random
from typing import Any

import pytest

from cofitune.data.asking import answer_tokens, make_prompt_tokens
from cofitune.data.chat import IGNORED, EncodedItem, Example, encode_item, end_ids, render
from cofitune.data.formats import BadItemError
from cofitune.data.read import Item
from tests.data.published import DAY, TABLE, THOUGHT, Published

WORDS = [
    "the court", "void.", "Paris", " two", "4", "ü", "漢字", "🙂", "\n\n", "\n", "  ", "(A)", "[B]", "{c}", "<b>",
    "0123", "think", "end", "s>", "'s", "—", "\t", "user", "assistant", "e\u0301", "\u200b", "123456", "....", "`x`",
]  # fmt: skip


@pytest.fixture(params=TABLE, ids=lambda one: one.title)
def published(request: pytest.FixtureRequest) -> Published:
    one: Published = request.param
    return one


def item(*contents: str, system: str | None = None) -> Item:
    """Turns of user and assistant in alternation."""
    start = (("system", system),) if system is not None else ()
    return Item((*start, *((("user", "assistant")[i % 2], c) for i, c in enumerate(contents))), "f.jsonl:1")


def learned(example: Example, tokenizer: Any) -> list[str]:
    """The text of each unbroken run of tokens that carry the loss."""
    runs: list[list[int]] = []
    before = IGNORED
    for label in example.labels:
        if label != IGNORED:
            if before == IGNORED:
                runs.append([])
            runs[-1].append(label)
        before = label
    return [tokenizer.decode(run) for run in runs]


def all_learned(encoded: EncodedItem, tokenizer: Any) -> list[str]:
    return [text for example in encoded.examples for text in learned(example, tokenizer)]


def squeezed(text: str) -> str:
    return "".join(text.split())


def whole(published: Published, response: str) -> str:
    return published.opening + response + published.end


def test_a_response_and_its_end_are_learned(published: Published) -> None:
    tokenizer = published.tokenizer()
    encoded = encode_item(item("Q?", "Paris"), tokenizer)
    assert all_learned(encoded, tokenizer) == [whole(published, "Paris")]
    assert encoded.ends_with_token


def test_each_response_of_several_is_learned(published: Published) -> None:
    tokenizer = published.tokenizer()
    encoded = encode_item(item("Q?", "Paris", "And then?", "(A)"), tokenizer)
    assert all_learned(encoded, tokenizer) == [whole(published, "Paris"), whole(published, "(A)")]
    assert len(encoded.examples) == published.examples
    for example in encoded.examples[1:]:
        assert "Paris" in tokenizer.decode(example.input_ids), "an earlier response is seen"


def test_a_system_turn_is_seen(published: Published) -> None:
    tokenizer = published.tokenizer()
    (example,) = encode_item(item("Q?", "Paris", system="Be kind."), tokenizer).examples
    assert learned(example, tokenizer) == [whole(published, "Paris")]
    assert tokenizer.decode(example.input_ids).count("Be kind.") == 1


def test_reasoning_is_learned_or_its_loss_is_named(published: Published) -> None:
    tokenizer = published.tokenizer()
    if published.refuses_thought:
        with pytest.raises(BadItemError, match=published.refuses_thought):
            encode_item(item("Q?", THOUGHT), tokenizer)
        return
    encoded = encode_item(item("Q?", THOUGHT), tokenizer)
    expected = published.thought + published.end if published.thought else whole(published, THOUGHT)
    assert all_learned(encoded, tokenizer) == [expected] and encoded.reasons


@pytest.mark.parametrize("answer", ["Paris", "(A)", "B", "4", "two words", "漢字", "Yes.", "'s", "  padded "])
def test_asked_are_the_tokens_that_are_learned(published: Published, answer: str) -> None:
    """The prompt's tokens, then those of the answer: each where training has it, and no other."""
    tokenizer = published.tokenizer()
    (example,) = encode_item(item("Q?", answer), tokenizer).examples
    messages = [{"role": "user", "content": "Q?"}]
    given = answer_tokens(tokenizer, messages, answer, "f.jsonl:1")
    length = len(given.context) + len(given.ids)
    assert [*given.context, *given.ids] == example.input_ids[:length]
    assert list(given.ids) == example.labels[len(given.context) : length]
    assert squeezed(tokenizer.decode(given.ids)) == squeezed(answer)
    bare = tokenizer(render(tokenizer, messages, True), add_special_tokens=False)["input_ids"]
    assert example.input_ids[: len(bare)] == bare and set(example.labels[: len(bare)]) == {IGNORED}
    assert IGNORED not in example.labels[len(bare) : length]
    prompt = make_prompt_tokens(tokenizer, messages, "f.jsonl:1")
    assert list(prompt.ids) == example.input_ids[: len(prompt.ids)], "a generation begins where training has it"
    assert squeezed(tokenizer.decode(example.input_ids[len(prompt.ids) : length])) == squeezed(answer)
    assert prompt.text == tokenizer.decode(prompt.ids)


def test_the_learned_end_ends_a_generation(published: Published) -> None:
    tokenizer = published.tokenizer()
    ((*_, last),) = [e.labels for e in encode_item(item("Q?", "Paris"), tokenizer).examples]
    ends = end_ids(tokenizer, None)
    labels = [i for i in encode_item(item("Q?", "Paris"), tokenizer).examples[0].labels if i in ends]
    assert labels, f"what is learned ends with none of {tokenizer.convert_ids_to_tokens(sorted(ends))} ({last})"


def test_a_control_token_in_a_text_is_named(published: Published) -> None:
    tokenizer = published.tokenizer()
    with pytest.raises(BadItemError, match=r"f\.jsonl:1: the assistant's turn 1 holds .*control token"):
        encode_item(item("Q?", f"It is {tokenizer.eos_token} so."), tokenizer)


def random_item(chance: random.Random, has_system: bool) -> Item:
    def text() -> str:
        if chance.random() < 0.2:
            return "".join(map(any_character, [chance] * chance.choice([1, 2, 8, 30])))
        count = chance.choice([1, 2, 3, 6, 6, 40]) if chance.random() < 0.99 else 400
        return "".join(chance.choices(WORDS, k=count)) if count < 40 else " ".join(chance.choices(WORDS, k=count))

    def said() -> str:
        return next(t for t in iter(text, None) if t.strip())

    turns = [said() for _ in range(2 * chance.choice([1, 1, 2, 3]))]
    return item(*turns, system=chance.choice([None, said(), ""]) if has_system else None)


def any_character(chance: random.Random) -> str:
    """White space, a bracket, or any character of Unicode but what a tokenizer writes for a space."""
    kind = chance.random()
    if kind < 0.2:
        return chance.choice(" \t\n\r\v\f\x1c\x85\u00a0\u2003\u2028\u3000")
    if kind < 0.3:
        return chance.choice("()[]{}<>|/\\%#&\"'")
    code = chance.choice([0x80, 0x800, 0x3000, 0xD800, 0x20000]) - 1 - int(127 * chance.random())
    return chr(code) if chr(code) != "\u2581" else "x"


def test_what_is_learned_of_any_conversation_equals_its_responses(published: Published) -> None:
    tokenizer = published.tokenizer()
    chance = random.Random(published.title)
    for number in range(1000):
        one = random_item(chance, has_system=True)
        responses = [content for role, content in one.turns if role == "assistant"]
        encoded = encode_item(one, tokenizer)
        texts = all_learned(encoded, tokenizer)
        expected = [squeezed(whole(published, response)) for response in responses]
        assert [squeezed(text) for text in texts] == expected, (number, one.turns)
        for text, response in zip(texts, responses, strict=True):
            assert response.strip() in text, (number, response)
        for example in encoded.examples:
            assert all(label in (IGNORED, i) for label, i in zip(example.labels, example.input_ids, strict=True))
        first = encoded.examples[0]
        start = next(n for n, label in enumerate(first.labels) if label != IGNORED)
        prompt = render(tokenizer, one.messages()[: 1 + (one.turns[0][0] == "system")], True)
        assert first.input_ids[:start] == tokenizer(prompt, add_special_tokens=False)["input_ids"], (number, one.turns)


def test_dated_templates_write_the_given_day() -> None:
    dated = [one for one in TABLE if "strftime_now" in one.text and one.name != "granite"]
    assert len(dated) >= 3
    for one in dated:
        text = render(one.tokenizer(), [{"role": "user", "content": "Q?"}], True)
        assert any(form in text for form in ("07 Jan 2026", "07 January 2026", DAY)), text


def test_a_refused_system_turn_says_so() -> None:
    gemma = next(one for one in TABLE if one.name == "gemma2")
    tokenizer = gemma.tokenizer()
    tokenizer.chat_template = gemma.text
    with pytest.raises(BadItemError, match="System role not supported"):
        encode_item(item("Q?", "Paris", system="Be kind."), tokenizer)
    tokenizer.chat_template = gemma.text.replace("{{ raise_exception('System role not supported') }}", "").replace(
        "{% for turn in messages %}", "{% for turn in messages if turn['role'] != 'system' %}"
    )
    with pytest.raises(BadItemError, match=r"drops the system's turn 0: 'Be kind\.'; data\.system: merge"):
        encode_item(item("Q?", "Paris", system="Be kind."), tokenizer)


def test_a_template_that_moves_the_system_turn_gives_two_examples() -> None:
    mistral = next(one for one in TABLE if one.name == "mistral")
    tokenizer = mistral.tokenizer()
    first, second = encode_item(item("Q?", "Paris", "And then?", "(A)", system="Be kind."), tokenizer).examples
    assert "[INST] Be kind.\n\nQ?[/INST]" in tokenizer.decode(first.input_ids)
    assert "[INST] Be kind.\n\nAnd then?[/INST]" in tokenizer.decode(second.input_ids)
    assert "Be kind.\n\nQ?" not in tokenizer.decode(second.input_ids)
