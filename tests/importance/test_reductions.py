"""Each sample's own gradient, reduced: one backward over a batch against a loop over single samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from cofitune.importance.estimate import FISHER, KL_DROPOUT, EstimatorSettings, estimate
from cofitune.importance.sums import Scores
from cofitune.importance_file import UNIT_KINDS, unit_counts
from cofitune.model.anatomy import anatomy_of

P, SEED, V = 0.2, 5, 64
LENGTHS = [5, 9, 3, 7]


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=V, initializer_range=0.15, attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def samples(rows: list[int]) -> dict[str, Tensor]:
    """The named samples padded to the longest of them; all but the first two tokens carry the loss."""
    width = max(LENGTHS[row] for row in rows)
    batch = {name: torch.zeros(len(rows), width, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    batch["labels"] = torch.full((len(rows), width), -100)
    for place, row in enumerate(rows):
        length = LENGTHS[row]
        ids = torch.randint(0, V, (length,), generator=torch.Generator().manual_seed(row))
        batch["input_ids"][place, :length] = ids
        batch["attention_mask"][place, :length] = 1
        batch["labels"][place, 2:length] = ids[2:]
    return batch


class DropoutByPlace:
    """Stands in for dropout: a place's mask is the same in any row and however the batch is padded."""

    def __init__(self, calls_a_batch: int) -> None:
        self.calls, self.calls_a_batch = 0, calls_a_batch

    def __call__(self, value: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        call = self.calls % self.calls_a_batch
        self.calls += 1
        places = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in value.shape[1:]), indexing="ij")
        wave = torch.stack([torch.sin((1.7 + axis) * place + 0.9 * call) for axis, place in enumerate(places)]).sum(0)
        return value * (wave > -1.2).float() / (1 - P)


def scores(model: LlamaForCausalLM, rows: list[int], estimator: str, reduce: str) -> Scores:
    return estimate(
        model, [(0, samples(rows))], EstimatorSettings(dropout=P, seed=SEED, estimator=estimator, reduce=reduce)
    )


def close(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for kind in UNIT_KINDS:
        assert float(expected[kind].abs().amax()) > 1e-6, "nothing to compare"
        difference = (results[kind] - expected[kind]).abs().amax(-1)
        assert bool((difference <= 1e-5 * expected[kind].abs().amax(-1)).all()), kind


@pytest.mark.parametrize(("estimator", "reduce"), [(KL_DROPOUT, "absolute"), (FISHER, "squared")])
def test_a_batch_equals_a_loop_over_its_samples(estimator: str, reduce: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    if estimator == KL_DROPOUT:
        monkeypatch.setattr(nn.functional, "dropout", DropoutByPlace(2 * 2 * 3))
    together = scores(model, [0, 1, 2, 3], estimator, reduce)
    loop = [scores(model, [row], estimator, "signed") for row in range(4)]
    apply = torch.abs if reduce == "absolute" else torch.square
    single = {k: torch.stack([one.values[k] * one.tokens for one in loop]) for k in UNIT_KINDS}
    assert (together.samples, together.tokens) == (4, sum(LENGTHS))
    close(together.values, {k: apply(single[k]).mean(0) for k in UNIT_KINDS})
    signed = {k: single[k].sum(0) / sum(LENGTHS) for k in UNIT_KINDS}
    close(scores(model, [0, 1, 2, 3], estimator, "signed").values, signed)
    assert not torch.allclose(together.values["ffn_neurons"], signed["ffn_neurons"].abs(), rtol=0.1)


@pytest.mark.parametrize("reduce", ["squared", "absolute", "signed"])
def test_an_item_of_several_examples_counts_once(reduce: str) -> None:
    """Its loss is the sum over its examples, so that its gradient is, too."""
    model = tiny_llama()
    loop = [scores(model, [row], FISHER, "signed") for row in range(4)]
    single = {k: torch.stack([one.values[k] * one.tokens for one in loop]) for k in UNIT_KINDS}
    items = {k: torch.stack([v[0] + v[1] + v[2], v[3]]) for k, v in single.items()}
    batch = samples([0, 1, 2, 3]) | {"items": torch.tensor([0, 0, 0, 1])}
    result = estimate(model, [(0, batch)], EstimatorSettings(0.0, SEED, FISHER, reduce))
    assert (result.samples, result.tokens) == (2, sum(LENGTHS))
    apply = {"absolute": torch.abs, "squared": torch.square, "signed": lambda value: value * 2 / sum(LENGTHS)}[reduce]
    close(result.values, {k: apply(v).mean(0) for k, v in items.items()})


def test_fisher_is_the_squared_finite_difference_of_the_log_likelihood() -> None:
    """A neuron's gate scales its row of `up_proj`: nudge the weight and see what the responses' likelihood does."""
    model, step = tiny_llama().eval(), 1e-2  # its norms and softmax stay in fp32
    layer, neuron = 1, 7
    result = scores(model, [0, 1, 2, 3], FISHER, "squared").values["ffn_neurons"][layer, neuron]

    def log_likelihood(row: int, factor: float) -> float:
        weight = model.model.layers[layer].mlp.up_proj.weight
        batch = samples([row])
        with torch.no_grad():
            before = weight[neuron].clone()
            weight[neuron] *= factor
            log_p = model(batch["input_ids"]).logits[0].log_softmax(-1)
            weight[neuron] = before
        targets = batch["input_ids"][0]
        return sum(float(log_p[t - 1, targets[t]]) for t in range(2, LENGTHS[row]))

    slopes = [(log_likelihood(r, 1 + step) - log_likelihood(r, 1 - step)) / (2 * step) for r in range(4)]
    assert float(result) == pytest.approx(sum(s * s for s in slopes) / 4, rel=5e-3)


def test_fisher_has_no_dropout_and_no_seed() -> None:
    model = tiny_llama()
    one, two = (
        estimate(
            model, [(i, samples([0, 1]))], EstimatorSettings(dropout=p, seed=i, estimator=FISHER, reduce="squared")
        ).values
        for i, p in enumerate((0.1, 0.7))
    )
    assert all(torch.equal(one[k], two[k]) and bool((one[k] >= 0).all()) for k in unit_counts(anatomy_of(model)))
