"""The share that the mask leaves to each layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cofitune.softmask.factors import Factor, join
from cofitune.softmask.gradient import mask_gradients
from cofitune.softmask.retained import EVERY, RetainedUpdate, kept_sentence
from cofitune.softmask.update import mask_updates
from cofitune.zero import Shard

NAMES = ["layers.0.weight", "layers.3.weight"]
FACTORS = [Factor(torch.tensor([0.0, 0.25, 1.0]), 0), Factor(torch.tensor([0.5, 1.0]), 1)]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({"0": nn.Linear(2, 3, bias=False), "3": nn.Linear(2, 3, bias=False)})


def loss(model: Model) -> torch.Tensor:
    return sum((p.sin() * (i + 1)).sum() for i, p in enumerate(model.parameters()))  # type: ignore[return-value]


def test_update_mode_tells_the_share_of_the_update() -> None:
    model, factors = Model(), dict(zip(NAMES, FACTORS, strict=True))
    flats = {n: p.detach().view(-1) for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(flats.values(), lr=0.1, weight_decay=0.3)
    kept = RetainedUpdate(factors)
    shards = {id(flats[n]): [Shard(n, (3, 2), 0, 0, 6)] for n in NAMES}
    mask_updates(optimizer, shards, factors, kept)
    free = torch.optim.AdamW([p.clone() for p in flats.values()], lr=0.1, weight_decay=0.3)
    before = [p.clone() for p in flats.values()]
    loss(model).backward()
    for held, alone, parameter in zip(flats.values(), free.param_groups[0]["params"], model.parameters(), strict=True):
        assert parameter.grad is not None
        held.grad = alone.grad = parameter.grad.view(-1)
    kept.watching = True
    optimizer.step()
    free.step()
    shares = kept.read(torch.device("cpu"))
    for layer, held, alone, old in zip((0, 3), flats.values(), free.param_groups[0]["params"], before, strict=True):
        assert shares[layer] == pytest.approx(float((held - old).abs().sum() / (alone - old).abs().sum()), rel=1e-5)
    assert kept.read(torch.device("cpu")) == {}, "read once, counted once"
    kept.watching = False
    optimizer.step()
    assert kept.read(torch.device("cpu")) == {}


def test_gradient_mode_tells_the_share_of_the_gradient() -> None:
    model, factors = Model(), dict(zip(NAMES, FACTORS, strict=True))
    kept = RetainedUpdate(factors)
    kept.watching = True
    mask_gradients(model, factors, kept)
    free = [(i + 1) * p.detach().cos() for i, p in enumerate(model.parameters())]
    loss(model).backward()
    shares = kept.read(torch.device("cpu"))
    for layer, full, factor in zip((0, 3), free, FACTORS, strict=True):
        assert shares[layer] == pytest.approx(float((full * factor.shaped(full)).abs().sum() / full.abs().sum()))


def test_rows_that_are_held_do_not_count_in_gradient_mode() -> None:
    """Of a fused tensor that trains in part, the other rows' gradient is not the mask's to keep or to take."""
    model, name = Model(), NAMES[0]
    held = {name: Factor(torch.tensor([0.0, 1.0, 1.0]), 0)}
    mask = {name: Factor(torch.tensor([1.0, 0.25, 1.0]), 0)}
    kept = RetainedUpdate(mask)
    kept.watching = True
    mask_gradients(model, join(held, mask), kept, held)
    first = next(model.parameters())
    full = first.detach().cos()
    loss(model).backward()
    assert first.grad is not None and not first.grad[0].any()
    left = 0.25 * full[1].abs().sum() + full[2].abs().sum()
    assert kept.read(torch.device("cpu"))[0] == pytest.approx(float(left / full[1:].abs().sum()))


def test_it_watches_every_tenth_step_and_the_last() -> None:
    kept = RetainedUpdate(NAMES)

    def watched(step: int) -> bool:
        kept.watch_for(step, 23)
        return kept.watching

    assert [s for s in range(1, 24) if watched(s)] == [EVERY, 2 * EVERY, 23]


def test_the_sentence_names_the_least_and_the_most() -> None:
    message = kept_sentence({"8": 0.5, "9": 0.25, "10": 0.75}, "update")
    assert message == "soft mask: left 50% of the update, from 25% in layer 9 to 75% in layer 10"
