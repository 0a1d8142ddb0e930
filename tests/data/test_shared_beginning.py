"""Examples that begin alike, read together: the loss of each is that of reading it alone."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from cofitune.data.batches import Batch, collate
from cofitune.data.chat import IGNORED, Example
from cofitune.data.shared_beginning import SharedBeginning, collate_shared, divide
from cofitune.model.varlen import attending_by_conversation
from cofitune.training.loss import summed_loss, supervised_logits
from tests.model.test_varlen import KINDS, make


def behind(question: list[int], *answers: list[int]) -> list[Example]:
    return [Example([*question, *answer], [IGNORED] * len(question) + answer) for answer in answers]


QUESTIONS = [
    behind([1, 2, 3, 4, 5, 6, 7], [8, 9], [8, 10, 11], [12]),  # two answers begin alike, which are predicted apart
    behind([20, 21, 22], [23], [24, 25, 26, 27]),
    behind([30], [31, 32], [33]),  # nothing but the token that predicts
]


def shared() -> list[SharedBeginning]:
    names = iter(range(100))
    return [SharedBeginning.of(examples, [next(names) for _ in examples]) for examples in QUESTIONS]


def test_a_beginning_is_what_all_have_in_common_and_none_is_asked_for() -> None:
    first, second, third = shared()
    assert (first.ids, [rest.input_ids for rest in first.rests]) == (
        (1, 2, 3, 4, 5, 6),
        [[7, 8, 9], [7, 8, 10, 11], [7, 12]],
    )
    assert [rest.labels for rest in first.rests] == [[IGNORED, 8, 9], [IGNORED, 8, 10, 11], [IGNORED, 12]]
    assert second.ids == (20, 21) and third.ids == () and first.num_tokens == 6 + 3 + 4 + 2
    # a tokenizer may cut the end of a question otherwise before another answer
    apart = SharedBeginning.of([*behind([1, 2, 3], [4]), *behind([1, 2, 9], [4])], [0, 1])
    assert apart.ids == (1,) and [rest.input_ids for rest in apart.rests] == [[2, 3, 4], [2, 9, 4]]


def nats(model: PreTrainedModel, batch: Batch, names: torch.Tensor, count: int) -> torch.Tensor:
    logits, targets, (rows, columns) = supervised_logits(model, batch)
    each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return torch.zeros(count).index_add_(0, names[rows, columns + 1], each)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_each_is_what_it_is_alone(kind: str) -> None:
    """Also where the window is narrower than a question."""
    model = make(kind).eval()
    model.set_attn_implementation("sdpa")
    alone = [float(summed_loss(model, collate([e], 0))) for examples in QUESTIONS for e in examples]
    with attending_by_conversation(model) as can:
        batch = collate_shared(shared())
        together = nats(model, batch, batch.pop("names"), len(alone))
    assert can and together.tolist() == pytest.approx(alone, rel=1e-5)
    assert model.config._attn_implementation == "sdpa"


def test_without_attention_by_conversation_it_is_refused() -> None:
    model = make("llama").eval()
    model.set_attn_implementation("eager")
    with attending_by_conversation(model) as can:
        assert not can
        with pytest.raises(RuntimeError, match="under eager conversations cannot share"):
            summed_loss(model, collate_shared(shared()))


def test_batches_hold_what_there_is_room_for() -> None:
    items = shared()
    sizes, labels = [item.num_tokens for item in items], [item.num_labels for item in items]
    assert labels == [6, 5, 3]
    assert [len(batch) for batch in divide(items, sum(sizes[:2]), 99)] == [2, 1]
    assert [len(batch) for batch in divide(items, 99, sum(labels[:2]))] == [2, 1]
    assert [len(batch) for batch in divide(items, 1, 99)] == [1, 1, 1], "one that is longer has a batch of its own"
    assert [len(batch) for batch in divide(items, sum(sizes), 99)] == [3] and divide([], 5, 5) == []


@torch.no_grad()
def test_a_silent_one_adds_nothing() -> None:
    model = make("llama").eval()
    model.set_attn_implementation("sdpa")
    with attending_by_conversation(model):
        assert float(summed_loss(model, collate_shared([shared()[0].silent()]))) == 0
