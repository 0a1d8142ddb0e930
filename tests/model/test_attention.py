"""Attention kernels that this device does not run, told before any weight is read."""

from __future__ import annotations

import pytest

from cofitune.errors import UserError
from cofitune.model.attention import check_device


@pytest.mark.parametrize(
    ("implementation", "trains", "message"),
    [
        ("flash_attention_2", False, "flash_attention_2 runs on GPUs alone"),
        ("flash_attention_3", True, "flash_attention_3 runs on GPUs alone"),
        ("flex_attention", True, "flex_attention has no backward pass on a CPU"),
        ("flex_attention", False, None),
        ("sdpa", True, None),
        ("auto", True, None),
    ],
)
def test_what_does_not_run_on_a_cpu_is_refused(implementation: str, trains: bool, message: str | None) -> None:
    check_device(implementation, trains, on_gpu=True)
    if message is None:
        check_device(implementation, trains, on_gpu=False)
        return
    with pytest.raises(UserError, match=message):
        check_device(implementation, trains, on_gpu=False)
