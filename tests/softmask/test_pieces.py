"""The masked step a piece at a time: the bits of the whole step, and a piece's copy in place of the whole's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from cofitune.softmask.factors import Factor
from cofitune.softmask.pieces import cut_points
from cofitune.softmask.update import mask_updates
from cofitune.training.l2 import DecoupledL2SP
from cofitune.zero import Flat, Shard
from tests.peak import PeakBytes

COLUMNS, STEPS = 48, 3
# a row that another rank begins, a free weight, whole matrices, a bias
ROW = [
    Shard("w0", (40, COLUMNS), 16, 0, 40 * COLUMNS - 16),
    Shard("free", (112,), 0, 40 * COLUMNS - 16, 112),
    Shard("w1", (96, COLUMNS), 0, 42 * COLUMNS, 96 * COLUMNS),
    Shard("b", (96,), 0, 138 * COLUMNS, 96),
]
NUMEL = ROW[-1].offset + ROW[-1].numel + 13  # padding


def factors() -> dict[str, Factor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "w0": Factor(torch.rand(40, generator=generator), 0),
        "w1": Factor(torch.rand(COLUMNS, generator=generator), 1),
        "b": Factor(torch.rand(96, generator=generator), 0),
    }


def train(elements: int | None, fused: bool, pull: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Some masked steps; the flat tensor and AdamW's states."""
    generator = torch.Generator().manual_seed(0)
    flat = nn.Parameter(torch.randn(NUMEL, generator=generator))
    optimizer = torch.optim.AdamW([flat], lr=0.1, weight_decay=0.3, fused=fused)
    mask_updates(optimizer, {id(flat): ROW}, factors(), elements=elements)
    if pull:
        DecoupledL2SP(optimizer, [Flat(flat, ROW)], 0.5)
    for _ in range(STEPS):
        flat.grad = torch.randn(NUMEL, generator=generator)
        optimizer.step()
    return flat.detach(), dict(optimizer.state[flat])


@pytest.mark.parametrize("pull", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("elements", [64, 300, 1000, 10**6])
def test_pieces_step_to_the_bits_of_the_whole(elements: int, fused: bool, pull: bool) -> None:
    (whole, states), (pieces, others) = train(None, fused, pull), train(elements, fused, pull)
    assert torch.equal(whole, pieces)
    assert states.keys() == others.keys() and float(others["step"]) == STEPS
    assert all(torch.equal(states[name], others[name]) for name in states)


def test_a_cut_leaves_rows_whole_and_vectors_where_they_begin() -> None:
    cuts = cut_points(NUMEL, ROW, 1000, 64)
    assert cuts[0] == 0 and cuts[-1] == NUMEL and len(cuts) > 6
    for place in cuts[1:-1]:
        assert place % 64 == 0
        for shard in ROW:
            if shard.offset < place < shard.offset + shard.numel:
                within = shard.start + place - shard.offset
                assert len(shard.shape) == 1 or within % COLUMNS == 0, (place, shard)
    assert max(end - begin for begin, end in pairwise(cuts)) <= 1000
    anywhere = cut_points(NUMEL, ROW, 1000, 1)
    assert anywhere != cuts and len(anywhere) <= len(cuts), "a GPU needs no vectors"


@pytest.mark.parametrize(("shards", "numel"), [([], 5000), ([Shard("w", (1, 5000), 0, 0, 5000)], 5000), (ROW, 0)])
def test_what_cannot_be_cut_stays_whole(shards: Sequence[Shard], numel: int) -> None:
    assert cut_points(numel, shards, 64, 64) == [0, numel]


def test_the_step_holds_copies_of_one_piece_at_a_time() -> None:
    numel, piece = 64 * 1024, 4096
    row = [Shard("w", (numel // 64, 64), 0, 0, numel)]

    def peak(elements: int | None) -> int:
        flat = nn.Parameter(torch.zeros(numel))
        optimizer = torch.optim.AdamW([flat], lr=0.1, fused=True)
        mask_updates(optimizer, {id(flat): row}, {"w": Factor(torch.rand(numel // 64), 0)}, elements=elements)
        flat.grad = torch.ones(numel)
        optimizer.step()  # the states are there from now on
        with PeakBytes() as counted:
            optimizer.step()
        return counted.most

    assert peak(None) >= 4 * numel, "old values of the whole"
    assert 4 * piece <= peak(piece) < 3 * 4 * piece


@pytest.mark.parametrize("aligned", [1, 8, 64])
def test_cuts_are_the_farthest_that_may_be(aligned: int) -> None:
    """Against all places tried one by one."""

    def may_be(place: int) -> bool:
        within = next((s for s in ROW if s.offset < place < s.offset + s.numel), None)
        columns = 1 if within is None or len(within.shape) == 1 else COLUMNS
        return place % aligned == 0 and (within is None or (within.start + place - within.offset) % columns == 0)

    places = [place for place in range(1, NUMEL) if may_be(place)]
    for elements in (50, 64, 129, 1000, 3000):
        expected = [0]
        while NUMEL - expected[-1] > elements:
            near = [p for p in places if expected[-1] < p <= expected[-1] + elements]
            far = [p for p in places if p > expected[-1] + elements]
            if not near + far:
                break
            expected.append(near[-1] if near else far[0])
        assert cut_points(NUMEL, ROW, elements, aligned) == [*expected, NUMEL], elements


@pytest.mark.filterwarnings("error")
def test_a_schedule_sees_the_steps() -> None:
    flat = nn.Parameter(torch.zeros(NUMEL))
    optimizer = torch.optim.AdamW([flat], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    mask_updates(optimizer, {id(flat): ROW}, factors(), elements=300)
    for _ in range(2):
        flat.grad = torch.ones(NUMEL)
        optimizer.step()
        schedule.step()
