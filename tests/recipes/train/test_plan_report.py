"""What the plan of a training says before it begins."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from cofitune.config.schema import Config
from cofitune.recipes.train.plan_report import print_stage_hint


@pytest.mark.parametrize(
    ("ranks", "on_gpu", "deepspeed", "is_told"),
    [
        (1, True, {"zero_stage": 3}, True),
        (1, True, {}, False),  # auto
        (1, True, {"zero_stage": 2}, False),
        (1, True, {"zero_stage": 3, "offload_param": "cpu"}, False),  # which only stage 3 can
        (2, True, {"zero_stage": 3}, False),
        (1, False, {"zero_stage": 3}, False),
    ],
)
def test_one_gpu_is_told_of_the_faster_stage(
    ranks: int, on_gpu: bool, deepspeed: dict[str, object], is_told: bool
) -> None:
    output = StringIO()
    config = Config.model_validate({"model": {"name": "any"}, "output_dir": "any", "deepspeed": deepspeed})
    print_stage_hint(config.deepspeed, ranks, on_gpu, Console(file=output, width=200))
    assert ("deepspeed.zero_stage=2" in output.getvalue()) == is_told
