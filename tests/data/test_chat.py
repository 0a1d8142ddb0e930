"""Labels: exactly the responses and their end-of-turn tokens carry the loss."""

from __future__ import annotations

import random
from typing import Any

import pytest

from cofitune.data.chat import (
    CONVERSATION,
    IGNORED,
    PLAIN_TEMPLATE,
    Example,
    encode,
    encode_item,
    encode_rows,
    render,
    set_template,
)
from cofitune.data.formats import BadItemError
from cofitune.data.read import Item, ItemCounts, make_item
from cofitune.data.template import ChatTemplate
from cofitune.errors import DataError, UserError

WORDS = ["the court", "void.", "Paris", " two", "4", "ü", "漢字", "🙂", "a\n\nb", "notice;", "<b>", "0123"]


def item(*contents: str, system: str | None = None) -> Item:
    """Turns of user and assistant in alternation."""
    start = (("system", system),) if system else ()
    return Item((*start, *((("user", "assistant")[i % 2], c) for i, c in enumerate(contents))), "f.jsonl:1")


def supervised(example: Example, tokenizer: Any) -> list[str]:
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


def obvious_labels(texts: list[str], example: Example, tokenizer: Any) -> list[int]:
    """A second implementation: search each response in the decoded text, growing the prefix token by token."""
    ids = example.input_ids
    whole = tokenizer.decode(ids)
    labels = [IGNORED] * len(ids)
    lengths = [len(tokenizer.decode(ids[:n]).encode()) for n in range(len(ids) + 1)]
    at = 0
    for text in texts:
        start = whole.index(text, at)
        at = start + len(text)
        first, last = len(whole[:start].encode()), len(whole[:at].encode())
        for n in range(len(ids)):
            if first <= lengths[n] and lengths[n + 1] <= last and lengths[n + 1] > first:
                labels[n] = ids[n]
    return labels


def random_items(count: int, words: list[str] = WORDS) -> list[Item]:
    chance = random.Random(0)

    def text() -> str:
        return "".join(chance.choices(words, k=chance.randint(1, 6))).strip() or "x"

    return [
        item(*(text() for _ in range(2 * chance.randint(1, 3))), system=text() if chance.random() < 0.5 else None)
        for _ in range(count)
    ]


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_the_supervised_text_is_every_response_and_its_end_of_turn(tiny_tokenizer: Any, template: str) -> None:
    set_template(tiny_tokenizer, template)
    for one in random_items(60):
        responses = [content + "<|im_end|>" for role, content in one.turns if role == "assistant"]
        example = encode(one, tiny_tokenizer)
        assert supervised(example, tiny_tokenizer) == responses
        assert all(label in (IGNORED, token) for label, token in zip(example.labels, example.input_ids, strict=True))
        assert tiny_tokenizer.decode(example.input_ids) == render(tiny_tokenizer, one.messages())


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_labels_equal_an_obvious_implementation(tiny_tokenizer: Any, template: str) -> None:
    set_template(tiny_tokenizer, template)
    marker = {"chat": "<|im_start|>assistant\n", "plain": "### Assistant:\n"}[template]
    for one in random_items(60, [word for word in WORDS if word.isascii()]):
        example = encode(one, tiny_tokenizer)
        with_marker = [marker + c + "<|im_end|>" for role, c in one.turns if role == "assistant"]
        wide = obvious_labels(with_marker, example, tiny_tokenizer)
        narrow = list(wide)
        skip = len(tiny_tokenizer(marker, add_special_tokens=False)["input_ids"])
        for n, label in enumerate(wide):
            if label != IGNORED and (n == 0 or wide[n - 1] == IGNORED):
                narrow[n : n + skip] = [IGNORED] * skip
        assert example.labels == narrow


def test_what_comes_before_the_response_is_what_a_generation_starts_from(tiny_tokenizer: Any) -> None:
    one = item("What is two plus two?", "Four.")
    example = encode(one, tiny_tokenizer)
    start = next(n for n, label in enumerate(example.labels) if label != IGNORED)
    prompt = render(tiny_tokenizer, one.messages()[:-1], add_generation_prompt=True)
    assert example.input_ids[:start] == tiny_tokenizer(prompt, add_special_tokens=False)["input_ids"]


def test_a_response_that_repeats_the_prompt_is_found_in_its_own_place(tiny_tokenizer: Any) -> None:
    one = item("Paris", "Paris", "Paris", "Paris")
    assert supervised(encode(one, tiny_tokenizer), tiny_tokenizer) == ["Paris<|im_end|>"] * 2


@pytest.mark.parametrize("pad", [None, "<|im_end|>"])
def test_a_pad_equal_to_the_end_of_turn_eats_no_token(tiny_tokenizer: Any, pad: str | None) -> None:
    plain = encode(item("a", "b"), tiny_tokenizer)
    tiny_tokenizer.pad_token = pad
    padded = encode(item("a", "b"), tiny_tokenizer)
    assert padded == plain
    assert [t for t in padded.labels if t != IGNORED][-1] == tiny_tokenizer.eos_token_id


def test_the_line_break_after_the_end_of_turn_is_not_learnt(tiny_tokenizer: Any) -> None:
    example = encode(item("a", "b"), tiny_tokenizer)
    assert tiny_tokenizer.decode(example.input_ids).endswith("<|im_end|>\n")
    assert example.labels[-1] == IGNORED and example.labels[-2] == tiny_tokenizer.eos_token_id


def test_training_on_all_supervises_every_token(tiny_tokenizer: Any) -> None:
    one = item("a", "b", system="You are a helpful assistant.")
    example = encode(one, tiny_tokenizer, train_on="all")
    assert example.labels == example.input_ids == encode(one, tiny_tokenizer).input_ids
    assert example.num_supervised == len(example.input_ids) - 1


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
def test_training_on_all_leaves_out_turns_marked_so(tiny_tokenizer: Any, key: str) -> None:
    turns = [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "bad", key: 0 if key == "weight" else False},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "good"},
    ]  # fmt: skip
    one = make_item("f.jsonl:1", {"messages": turns}, "messages")
    example = encode(one, tiny_tokenizer, train_on="all")
    left_out = [t for t, label in zip(example.input_ids, example.labels, strict=True) if label == IGNORED]
    assert tiny_tokenizer.decode(left_out) == "bad<|im_end|>"
    assert encode(one, tiny_tokenizer, train_on=CONVERSATION).labels == example.input_ids, "which nobody reads"


def test_a_rewritten_turn_that_is_not_learned_is_refused_under_all(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = THINKING
    turns = [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>hm</think>a", "weight": 0},
        {"role": "user", "content": "q2"}, {"role": "assistant", "content": "a2"},
    ]  # fmt: skip
    one = make_item("f.jsonl:1", {"messages": turns}, "messages")
    with pytest.raises(BadItemError, match=r"turn 2 .* cannot leave it out; use data.train_on: response"):
        encode(one, tiny_tokenizer, train_on="all")
    assert encode(one, tiny_tokenizer, train_on=CONVERSATION).input_ids


def test_num_supervised_leaves_out_the_first_token() -> None:
    assert Example([1, 2, 3], [1, IGNORED, 3]).num_supervised == 1
    assert Example([1], [1]).num_supervised == 0


def test_which_template_is_spoken(tiny_tokenizer: Any) -> None:
    own = tiny_tokenizer.chat_template
    assert set_template(tiny_tokenizer, "auto") == "chat" and tiny_tokenizer.chat_template == own
    assert set_template(tiny_tokenizer, "chat") == "chat" and tiny_tokenizer.chat_template == own
    assert set_template(tiny_tokenizer, "plain") == "plain" and tiny_tokenizer.chat_template == PLAIN_TEMPLATE
    tiny_tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"data\.template.*no chat template"):
        set_template(tiny_tokenizer, "chat")
    assert set_template(tiny_tokenizer, "auto") == "plain" and tiny_tokenizer.chat_template == PLAIN_TEMPLATE


def test_the_plain_template_as_text(tiny_tokenizer: Any) -> None:
    set_template(tiny_tokenizer, "plain")
    one = item("Hello", "Hi", system="Be kind.")
    assert render(tiny_tokenizer, one.messages()) == (
        "Be kind.\n\n### User:\nHello\n\n### Assistant:\nHi<|im_end|>\n\n"
    )
    tiny_tokenizer.bos_token = "<|im_start|>"
    assert render(tiny_tokenizer, one.messages()[:2], add_generation_prompt=True) == (
        "<|im_start|>Be kind.\n\n### User:\nHello\n\n### Assistant:\n"
    )


def rows(*items: Item) -> list[tuple[str, dict[str, Any]]]:
    return [(one.where, {"messages": one.messages()}) for one in items]


def test_a_long_response_loses_its_end_and_is_counted(tiny_tokenizer: Any) -> None:
    one = item("What is two plus two?", "four " * 30)
    whole = encode(one, tiny_tokenizer)
    account = ItemCounts()
    both = rows(one, item("a", "b"))
    (cut,), (short,) = encode_rows(both, "auto", tiny_tokenizer, 40, "response", "error", account)
    assert cut == Example(whole.input_ids[:40], whole.labels[:40])
    assert cut.num_supervised > 0
    assert short == encode(item("a", "b"), tiny_tokenizer)
    tokens, supervised_tokens = 40 + len(short.input_ids), cut.num_supervised + short.num_supervised
    assert account == ItemCounts(read=2, kept=2, truncated=1, tokens=tokens, supervised=supervised_tokens)


def test_an_item_of_exactly_max_length_is_whole(tiny_tokenizer: Any) -> None:
    one = item("a", "b")
    whole = encode(one, tiny_tokenizer)
    account = ItemCounts()
    length = len(whole.input_ids)
    assert list(encode_rows(rows(one), "auto", tiny_tokenizer, length, "response", "error", account)) == [[whole]]
    assert account.truncated == 0


def test_a_prompt_that_fills_max_length_is_an_error_or_dropped(tiny_tokenizer: Any) -> None:
    long = item("void " * 50, "yes")
    with pytest.raises(DataError, match=r"f\.jsonl:1: the prompt alone exceeds data\.max_length 20 .*has \d+ tokens"):
        list(encode_rows(rows(long), "auto", tiny_tokenizer, 20, "response", "error", ItemCounts()))
    account = ItemCounts()
    kept = list(encode_rows(rows(long, item("a", "b")), "auto", tiny_tokenizer, 20, "response", "drop", account))
    assert len(kept) == account.kept == 1 and account.truncated == 0
    assert account.reasons == {"prompt too long": 1} and account.first_dropped[0].startswith("f.jsonl:1: the prompt")


def test_a_response_in_the_context_is_read_and_not_learned(tiny_tokenizer: Any) -> None:
    turns = (("user", "q"), ("assistant", "a"), ("user", "q2"), ("assistant", "a2"))
    example = encode(Item(turns, "f.jsonl:1", context=3), tiny_tokenizer)
    assert supervised(example, tiny_tokenizer) == ["a2<|im_end|>"]
    assert example.input_ids == encode(Item(turns, "f.jsonl:1"), tiny_tokenizer).input_ids


THINKING = (  # keeps only the last answer's reasoning, as some reasoning models' templates do
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_turns_gives_an_example_each(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = THINKING
    single = item("q", "<think>hm</think>a")
    assert supervised(encode(single, tiny_tokenizer), tiny_tokenizer) == ["<think>hm</think>a<|im_end|>"]
    both = item("q", "<think>hm</think>a", "q2", "a2")
    first, second = encode_item(both, tiny_tokenizer).examples
    assert supervised(first, tiny_tokenizer) == ["<think>hm</think>a<|im_end|>"]
    assert supervised(second, tiny_tokenizer) == ["a2<|im_end|>"]
    assert first == encode(single, tiny_tokenizer)
    text = tiny_tokenizer.decode(second.input_ids)
    assert text == render(tiny_tokenizer, both.messages()) and "hm" not in text, "the earlier turn as the model sees it"
    example = encode(both, tiny_tokenizer, train_on="all")
    assert IGNORED not in example.labels


def test_an_item_of_several_examples_counts_once(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = THINKING
    account = ItemCounts()
    items = rows(item("q", "<think>hm</think>a", "q2", "a2"), item("q", "a"))
    made = list(encode_rows(items, "auto", tiny_tokenizer, 512, "response", "error", account))
    assert [len(examples) for examples in made] == [2, 1]
    assert (account.read, account.kept, account.further_examples, account.reasoning) == (2, 2, 1, 1)
    assert account.tokens == sum(len(example.input_ids) for examples in made for example in examples)


def test_a_turn_too_long_for_max_length_leaves_the_others(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = THINKING
    account = ItemCounts()
    both = rows(item("q", "<think>hm</think>a", "void " * 40, "a2"))
    ((example,),) = encode_rows(both, "auto", tiny_tokenizer, 60, "response", "error", account)
    assert supervised(example, tiny_tokenizer) == ["<think>hm</think>a<|im_end|>"]
    assert (account.kept, account.truncated, account.further_examples) == (1, 1, 0)


def test_a_generation_prompt_that_opens_a_thought_is_named(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = tiny_tokenizer.chat_template.replace(
        "%}<|im_start|>assistant\n{% endif", "%}<|im_start|>assistant\n<think>\n{% endif"
    )
    with pytest.raises(
        DataError, match=r"f\.jsonl:1: .*begin with '<think>\\n'.*without any reasoning.*enable_thinking"
    ):
        encode(item("q", "a"), tiny_tokenizer)
    for given in ("<think>\nhm\n</think>\n\na", "<think>hm</think>a"):
        example = encode(item("q", given), tiny_tokenizer)
        (learned,) = supervised(example, tiny_tokenizer)
        assert learned == given.removeprefix("<think>").removeprefix("\n") + "<|im_end|>"
        assert "assistant\n<think>\nhm" in tiny_tokenizer.decode(example.input_ids)


def test_a_closed_thought_in_the_generation_prompt_is_kept(tiny_tokenizer: Any) -> None:
    """Some templates ask without thinking by an empty thought that they do not write before a given response."""
    tiny_tokenizer.chat_template = tiny_tokenizer.chat_template.replace(
        "%}<|im_start|>assistant\n{% endif", "%}<|im_start|>assistant\n<think></think>{% endif"
    )
    example = encode(item("q", "a"), tiny_tokenizer)
    assert supervised(example, tiny_tokenizer) == ["a<|im_end|>"]
    assert "assistant\n<think></think>a<|im_end|>" in tiny_tokenizer.decode(example.input_ids)


def test_a_template_that_trims_keeps_its_labels(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = tiny_tokenizer.chat_template.replace(
        "message['content'] }}", "message['content'] | trim }}"
    )
    assert supervised(encode(item("q ", "  a  "), tiny_tokenizer), tiny_tokenizer) == ["a<|im_end|>"]


BARE = (
    "{% for m in messages %}{{ m['role'] }}:SPACE{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:SPACE{% endif %}"
)


def test_a_template_without_end_of_turn_supervises_the_response_to_its_end(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = BARE.replace("SPACE", "")
    assert supervised(encode(item("q", "0123"), tiny_tokenizer), tiny_tokenizer) == ["0123\n"]


@pytest.mark.parametrize("answer", ["0123", "Paris", "two", " a"])
def test_no_token_lies_astride_the_prompt_and_the_response(tiny_tokenizer: Any, answer: str) -> None:
    """The model reads the prompt's own tokens and continues from there, in training as in evaluation."""
    tiny_tokenizer.chat_template = BARE.replace("SPACE", " ")
    one = item("q", answer)
    example = encode(one, tiny_tokenizer)
    assert supervised(example, tiny_tokenizer) == [f"{answer}\n"]
    prompt = tiny_tokenizer(render(tiny_tokenizer, one.messages()[:1], True), add_special_tokens=False)["input_ids"]
    assert example.input_ids[: len(prompt)] == prompt and example.labels[: len(prompt)] == [IGNORED] * len(prompt)
    assert tiny_tokenizer.decode(example.input_ids).endswith(f"assistant: {answer}\n")


def test_an_item_that_an_assistant_opens_is_labelled_or_refused_by_place(tiny_tokenizer: Any) -> None:
    """Some data sets begin with the assistant's greeting, and a template may let them through."""
    one = Item((("assistant", "Hello"), ("user", "q"), ("assistant", "a")), "f.jsonl:1")
    try:
        example = encode(one, tiny_tokenizer)
    except DataError as error:
        assert "f.jsonl:1" in str(error)
    else:
        assert supervised(example, tiny_tokenizer) == ["Hello<|im_end|>", "a<|im_end|>"]


def test_a_response_that_starts_with_white_space_keeps_all_its_tokens(tiny_tokenizer: Any) -> None:
    one = item("q", "\n\n  a")
    assert supervised(encode(one, tiny_tokenizer), tiny_tokenizer) == ["\n\n  a<|im_end|>"]


@pytest.mark.parametrize("contents", [("q", "a"), ("q", "a", "q", "b")])
def test_a_template_that_always_opens_the_next_turn_teaches_no_model_to(tiny_tokenizer: Any, contents: Any) -> None:
    """The first Llama-3-Instruct's template wrote the generation prompt whether it was asked to or not."""
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{{ '<|im_start|>assistant\n' }}"
    )
    encoded = encode_item(item(*contents), tiny_tokenizer)
    learned = [text for example in encoded.examples for text in supervised(example, tiny_tokenizer)]
    assert learned == [f"{text}<|im_end|>" for text in contents[1::2]] and encoded.ends_with_token


WITHOUT_SYSTEM = (  # writes user and assistant, as Gemma's does; `loud` raises as it does, the other drops the turn
    "{% for m in messages %}{% if m['role'] == 'system' %}LOUD{% else %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LOUD = "{{ raise_exception('System role not supported') }}"


def roles(text: str) -> Item:
    names = {"s": "system", "u": "user", "a": "assistant"}
    return Item(tuple((names[role], f"{names[role]} {place}") for place, role in enumerate(text)), "f:1")


@pytest.mark.parametrize("loud", ["", LOUD], ids=["drops", "raises"])
@pytest.mark.parametrize("turns", ["sua", "ssua", "uasua", "suassua"])
def test_merged_system_turns_are_all_seen(tiny_tokenizer: Any, loud: str, turns: str) -> None:
    tiny_tokenizer.chat_template = WITHOUT_SYSTEM.replace("LOUD", loud)
    with pytest.raises(BadItemError, match=r"^f:1: .*data\.system: merge puts a system turn in front of the user's"):
        encode(roles(turns), tiny_tokenizer)
    set_template(tiny_tokenizer, ChatTemplate(system="merge"))
    text = tiny_tokenizer.decode(encode(roles(turns), tiny_tokenizer).input_ids)
    places = [text.index(content) for _, content in roles(turns).turns]
    assert places == sorted(places), "every text, in its order"


@pytest.mark.parametrize("loud", ["", LOUD], ids=["drops", "raises"])
@pytest.mark.parametrize(("turns", "place"), [("usa", 1), ("suasa", 3)])
def test_a_system_turn_that_nothing_can_be_merged_into_is_named(
    tiny_tokenizer: Any, loud: str, turns: str, place: int
) -> None:
    tiny_tokenizer.chat_template = WITHOUT_SYSTEM.replace("LOUD", loud)
    set_template(tiny_tokenizer, ChatTemplate(system="merge"))
    with pytest.raises(BadItemError, match=rf"needs a user's turn behind a system turn, and turn {place} has none"):
        encode(roles(turns), tiny_tokenizer)


def test_system_turns_are_not_blamed_for_other_refusals(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = "{{ raise_exception('never') }}"
    for system in ("keep", "merge"):
        set_template(tiny_tokenizer, ChatTemplate(system=system))
        with pytest.raises(BadItemError, match="refuses this item: never$"):
            encode(roles("sua"), tiny_tokenizer)


@pytest.mark.parametrize("content", ["", "Let me see."])
def test_a_tool_call_is_learned_where_nothing_asks_for_a_response(tiny_tokenizer: Any, content: str) -> None:
    """Mistral's templates write no generation prompt, and a control token before the calls."""
    tiny_tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]{% else %}{{ m['content'] }}"
        "{% if m.tool_calls %}[TOOL_CALLS]{{ m.tool_calls[0].function | tojson }}{% endif %}<|im_end|>{% endif %}"
        "{% endfor %}"
    )
    call = {"function": {"name": "look", "arguments": {"a": 1}}}
    answer = {"role": "assistant", "content": content, "tool_calls": [call]}
    one = make_item("f.jsonl:1", {"messages": [{"role": "user", "content": "q"}, answer]}, "messages")
    (example,) = encode_item(one, tiny_tokenizer).examples
    learned = f'{content}[TOOL_CALLS]{{"name": "look", "arguments": {{"a": 1}}}}<|im_end|>'
    assert supervised(example, tiny_tokenizer) == [learned]
