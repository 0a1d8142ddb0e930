"""Answers against a slow loop, a token a time without a cache; stored probabilities against plain forward passes."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cofitune.rehearsal.generate import (
    SEEDS_A_RUN,
    TOKENS_AT_ONCE,
    Answer,
    Sampling,
    TransformersGenerator,
    VllmGenerator,
    cut,
    opening_of_user_turn,
    rows_at_once,
    store_probabilities,
)

PAD = 0
PROMPTS = [[5, 6, 7], [11, 3, 8, 9, 30, 31, 2], [40], [17, 18, 4, 19, 20]]


@pytest.fixture(scope="module")
def model() -> Any:
    """A small Llama with weights so large that its choices are clear."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=60, max_position_embeddings=128, initializer_range=0.3, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return LlamaForCausalLM(config).eval()


def slow_greedy(model: Any, prompt: list[int], most: int, ends: set[int]) -> Answer:
    """The likeliest token each time, all of the text read again for each."""
    ids: list[int] = []
    for _ in range(most):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] in ends:
            return Answer(tuple(ids), True)
    return Answer(tuple(ids), False)


def log_softmax_of(model: Any, prompt: list[int], answer: tuple[int, ...]) -> Tensor:
    """Log-probabilities of the whole vocabulary at each token of an answer, read alone."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]
    return logits[len(prompt) - 1 : -1].float().log_softmax(-1)


def test_greedy_answers_are_those_of_the_slow_loop(model: Any) -> None:
    free = [slow_greedy(model, p, 12, set()).ids for p in PROMPTS]
    ends = {free[0][4], free[2][2]}
    expected = [slow_greedy(model, p, 12, ends) for p in PROMPTS]
    assert {a.ended for a in expected} == {True, False}, "some end and some are cut"
    result = TransformersGenerator(model, tuple(ends), PAD)(PROMPTS, Sampling(12), 0)
    assert result == expected
    assert all((a.ids[-1] in ends) == a.ended and not ends & set(a.ids[:-1]) for a in result)


def test_an_answer_may_end_with_its_last_token(model: Any) -> None:
    end = slow_greedy(model, PROMPTS[0], 5, set()).ids[-1]
    expected = slow_greedy(model, PROMPTS[0], 5, {end})
    assert TransformersGenerator(model, (end,), PAD)(PROMPTS[:1], Sampling(5), 0) == [expected]
    assert expected.ended


def test_the_same_seed_and_batch_number_give_the_same_samples(model: Any) -> None:
    generate = TransformersGenerator(model, (1,), PAD)
    sampling = Sampling(10, temperature=1.0, top_p=0.9, seed=7)
    first = generate(PROMPTS, sampling, 3)
    torch.rand(5)
    generate(PROMPTS, sampling, 4)
    assert generate(PROMPTS, sampling, 3) == first, "whatever ran before"
    assert TransformersGenerator(model, (1,), PAD)(PROMPTS, sampling, 3) == first
    assert generate(PROMPTS, sampling, 4) != first
    assert generate(PROMPTS, Sampling(10, 1.0, 0.9, seed=8), 3) != first
    assert len(set(generate([PROMPTS[0]] * 4, sampling, 3))) > 1, "equal prompts of a batch get samples of their own"


def test_hot_sampling_differs_from_greedy_and_a_tiny_top_p_does_not(model: Any) -> None:
    generate = TransformersGenerator(model, (), PAD)
    greedy = generate(PROMPTS, Sampling(8), 0)
    assert generate(PROMPTS, Sampling(8, temperature=5.0), 0) != greedy
    assert generate(PROMPTS, Sampling(8, temperature=5.0, top_p=1e-6), 0) == greedy


def test_the_models_own_generation_defaults_count_for_nothing(model: Any) -> None:
    generate = TransformersGenerator(model, (), PAD)
    greedy, sampled = (generate(PROMPTS, Sampling(8, temperature=t), 0) for t in (0.0, 2.0))
    own = model.generation_config
    strange = {"repetition_penalty": 9.0, "top_k": 1, "min_p": 0.9, "do_sample": True, "max_length": 3}
    model.generation_config = type(own)(**strange)
    try:
        assert [generate(PROMPTS, Sampling(8, temperature=t), 0) for t in (0.0, 2.0)] == [greedy, sampled]
        assert model.generation_config.to_dict()["repetition_penalty"] == 9.0, "and stay what they were"
    finally:
        model.generation_config = own


def test_what_follows_an_end_is_cut_off() -> None:
    assert cut([4, 5, 1, 0, 0], [1, 2]) == Answer((4, 5, 1), True)
    assert cut([1, 1], [1]) == Answer((1,), True)
    assert cut([4, 5], [1]) == Answer((4, 5), False)


def test_stored_probabilities_are_those_of_each_text_read_alone(model: Any) -> None:
    answers = TransformersGenerator(model, (1,), PAD)(PROMPTS, Sampling(9, temperature=1.0), 0)
    for k in (0, 5, 60):
        top_k, own = store_probabilities(model, PROMPTS, answers, k, PAD)
        whole = torch.cat([log_softmax_of(model, p, a.ids) for p, a in zip(PROMPTS, answers, strict=True)])
        ids = torch.tensor([i for a in answers for i in a.ids])
        torch.testing.assert_close(own, whole.gather(1, ids[:, None])[:, 0], atol=1e-5, rtol=0)
        assert own.dtype == torch.float32 and top_k.indices.dtype == torch.int32
        values, indices = whole.topk(k)
        assert torch.equal(top_k.indices.long(), indices)
        torch.testing.assert_close(top_k.log_probs, values, atol=1e-5, rtol=0)
        mass = top_k.log_probs.double().exp().sum(-1) + top_k.rest.double().exp()
        torch.testing.assert_close(mass, torch.ones(len(ids), dtype=torch.float64), atol=1e-5, rtol=0)
        others = 1 - values.double().exp().sum(-1)
        torch.testing.assert_close(top_k.rest.double().exp(), others, atol=1e-5, rtol=0)


@pytest.mark.parametrize("k", [0, 5, 60])
def test_probabilities_of_the_generation_are_those_of_a_second_pass(model: Any, k: int) -> None:
    free = [slow_greedy(model, p, 12, set()).ids for p in PROMPTS]
    generate = TransformersGenerator(model, (free[0][4], free[2][2]), PAD)  # some end early and some are cut
    answers, top_k, own = generate.with_probabilities(PROMPTS, Sampling(12), 0, k)
    assert answers == generate(PROMPTS, Sampling(12), 0)
    expected, expected_own = store_probabilities(model, PROMPTS, answers, k, PAD)
    torch.testing.assert_close(own, expected_own, atol=1e-5, rtol=0)
    assert top_k.indices.shape == expected.indices.shape and top_k.indices.dtype == torch.int32
    assert torch.equal(top_k.indices[:, : min(k, 5)], expected.indices[:, : min(k, 5)])
    torch.testing.assert_close(top_k.log_probs, expected.log_probs, atol=1e-5, rtol=0)
    torch.testing.assert_close(top_k.rest.exp(), expected.rest.exp(), atol=1e-5, rtol=0)


def test_only_greedy_float32_answers_need_no_second_pass(model: Any) -> None:
    assert TransformersGenerator(model, (1,), PAD).gives_probabilities(Sampling(9))
    assert not TransformersGenerator(model, (1,), PAD).gives_probabilities(Sampling(9, temperature=0.7))
    half = type(model)(model.config).to(torch.bfloat16)
    assert not TransformersGenerator(half, (1,), PAD).gives_probabilities(Sampling(9))


def test_many_tokens_are_read_in_groups_and_stored_in_order(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = TransformersGenerator(model, (1,), PAD)(PROMPTS, Sampling(9), 0)
    at_once = store_probabilities(model, PROMPTS, answers, 4, PAD)
    monkeypatch.setattr("cofitune.rehearsal.generate.TOKENS_AT_ONCE", 10)
    in_groups = store_probabilities(model, PROMPTS, answers, 4, PAD)
    torch.testing.assert_close(in_groups[1], at_once[1], atol=1e-5, rtol=0)
    assert torch.equal(in_groups[0].indices, at_once[0].indices)


def test_rows_share_a_pass_as_long_as_their_tokens_fit() -> None:
    half = TOKENS_AT_ONCE // 2
    assert rows_at_once([half, half, 1, 3 * half, 2, 2]) == [[0, 1], [2], [3], [4, 5]]
    assert rows_at_once([]) == []


def test_the_opening_of_a_users_turn_is_what_stands_before_its_text(tiny_tokenizer: Any) -> None:
    assert opening_of_user_turn(tiny_tokenizer) == "<|im_start|>user\n"


class FakeVllm:
    """Stands for vLLM: notes what it is asked, and answers with the prompt, an end and a token too many."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], dict[str, Any]]] = []

    def generate(self, prompts: list[dict[str, Any]], requested: Any, use_tqdm: bool) -> list[Any]:
        each = requested if isinstance(requested, list) else [requested] * len(prompts)
        self.asked += [(p["prompt_token_ids"], vars(w)) for p, w in zip(prompts, each, strict=True)]
        answers = [[*p["prompt_token_ids"], 1, 9] for p in prompts]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids)]) for ids in answers]


def test_vllm_is_asked_for_the_tokens_limits_and_seeds_that_were_set(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeVllm()
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    generate = VllmGenerator(SimpleNamespace(generate=fake.generate), (2, 1))
    prompts = [[5, 6], [5, 6], [7]]
    result = generate(prompts, Sampling(20, temperature=0.7, top_p=0.9, seed=3), 4)
    assert result == [Answer((5, 6, 1), True), Answer((5, 6, 1), True), Answer((7, 1), True)]
    assert [ids for ids, _ in fake.asked] == prompts
    for _, requested in fake.asked:
        assert (requested["max_tokens"], requested["temperature"], requested["top_p"]) == (20, 0.7, 0.9)
        assert requested["stop_token_ids"] == [1, 2] and requested["detokenize"] is False
    first = 3 + SEEDS_A_RUN * 5
    # vLLM seeds each request by itself: with one seed for all, equal prompts would get one answer
    assert [requested["seed"] for _, requested in fake.asked] == [first, first + 1, first + 2]
