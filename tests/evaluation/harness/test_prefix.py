"""A beginning that all prompts of a harness task share: read once, and the answers are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cofitune.evaluation.harness import prefix
from cofitune.evaluation.harness.prefix import LEAST, SharedPrefix, shared_length

SHOTS = [int(n) for n in torch.randint(1, 60, (200,), generator=torch.Generator().manual_seed(1))]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.4,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def requests() -> list[tuple[tuple[str, str], list[int], list[int]]]:
    """Three questions of four choices; those of the first differ in one token."""
    asked = []
    for question in range(3):
        for choice in range(4):
            continuation = [choice + 1] if question == 0 else [choice + 5, question, 3][: choice + 1]
            asked.append((("", ""), [*SHOTS, 7, question, *[9] * question], continuation))
    return asked


def expected(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One request by itself, read whole."""
    with torch.inference_mode():
        logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
    asked = torch.tensor(continuation)
    return float(logits.log_softmax(-1).gather(-1, asked[:, None]).sum()), bool((logits.argmax(-1) == asked).all())


def test_answers_behind_a_shared_beginning_are_those_of_whole_prompts(model: Any) -> None:
    asked = requests()
    length = shared_length([((*c, *a[:-1]), len(a)) for _, c, a in asked])
    assert length == len(SHOTS) + 1
    shared = SharedPrefix.of(model, [*SHOTS[:length], 7])
    assert shared is not None
    for batch in (asked[:5], asked[5:], asked):  # the cache is left as it was
        for (_, context, continuation), (value, greedy) in zip(batch, shared.score(batch, None), strict=True):
            likelihood, same = expected(model, context, continuation)
            assert value == pytest.approx(likelihood, abs=1e-4) and greedy == same


def test_a_batch_reads_no_more_than_what_differs(model: Any) -> None:
    shared = SharedPrefix.of(model, [*SHOTS, 7])
    assert shared is not None
    read = []
    handle = model.register_forward_pre_hook(
        lambda _, __, kwargs: read.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    shared.score(requests(), None)
    handle.remove()
    assert read == [(9, 5)], "four choices of one token are one row"


def test_what_is_asked_for_is_no_part_of_the_beginning() -> None:
    alike = tuple(range(LEAST + 10))
    assert shared_length([(alike, 1), ((*alike, 1), 3)]) == LEAST + 8
    assert shared_length([(alike, 1), ((*alike[:-3], 1, 1, 1), 1)]) == LEAST + 7
    assert shared_length([(alike, 20), (alike, 1)]) == 0, "little is left of it"
    assert shared_length([(alike[: LEAST - 1], 1), (alike, 1)]) == 0
    assert shared_length([(alike, 1)]) == 0, "one request shares with none"


def test_a_model_without_a_plain_cache_reads_whole_prompts(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "grows_by_copies", lambda cache: False)
    assert SharedPrefix.of(model, SHOTS) is None
