"""A part of a fused tensor as region, under the mask, on two real ranks: against the unfused copy in plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cofitune.model.anatomy import anatomy_of
from cofitune.model.region import resolve_region
from cofitune.softmask.factors import freeze_factors
from tests.helpers import run_ranks
from tests.model import test_layouts as layouts
from tests.softmask import fused_cases as cases

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Start two ranks once; they run every case and write what came out."""
    folder = tmp_path_factory.mktemp("fused")
    run_ranks("softmask.fused_cases", folder)
    return folder


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_two_ranks_step_as_the_unfused_copy_and_hold_the_rest_bit_for_bit(case: Any, two_ranks: Path) -> None:
    model = layouts.build(case.family)
    anatomy = anatomy_of(model)
    region = resolve_region("1", case.modules, layouts.L, anatomy.modules)
    known = {"layers": region.layers, "modules": region.modules, "mask": case.mask, "axis": case.axis}
    expected = layouts.reference_step(case.family, model, known)
    before, base = layouts.trained_parts(case.family, model), dict(model.named_parameters())
    whole = load_file(two_ranks / f"{case.name}.safetensors")
    held = freeze_factors(region, anatomy)
    assert held, "no tensor trains in part: the case would prove nothing"
    for name, factor in held.items():
        assert torch.equal(factor.part_at_zero(whole[name]), factor.part_at_zero(base[name].detach())), name
        assert not torch.equal(whole[name], base[name]), name
    after = layouts.build(case.family)
    after.load_state_dict(whole, strict=False)
    got = layouts.trained_parts(case.family, after)
    for key, tensor in got.items():
        if key[0] not in region.layers or key[1] not in region.modules:
            assert torch.equal(tensor, before[key]), key
            continue
        moved, should = tensor - before[key], expected[key] - before[key]
        assert should.norm() > 1e-3 * before[key].norm(), f"{key} hardly moved: the comparison would prove nothing"
        assert (moved - should).norm() <= 2e-3 * should.norm(), key
