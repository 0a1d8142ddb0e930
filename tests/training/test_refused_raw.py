"""An error as DeepSpeed starts is `deepspeed.raw`'s where it names a key of it; else it is told as it is."""

from __future__ import annotations

import pytest

from cofitune.training.refused_raw import refused_raw

RAW = {
    "zero_optimization": {"stage3_prefetch_bucket_size": 5, "overlap_comm": True},
    "flops_profiler": {"enabled": True},
    "steps_per_print": 3,
}


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ("prefetch_bucket_size: too small", "zero_optimization.stage3_prefetch_bucket_size"),
        ("overlap_comm needs another steps_per_print", "zero_optimization.overlap_comm, steps_per_print"),
        ("flops_profiler is not enabled", "flops_profiler.enabled"),
    ],
)
def test_a_key_that_the_error_names_is_named(message: str, named: str) -> None:
    assert str(refused_raw(ValueError(message), RAW)) == (
        f"deepspeed.raw: DeepSpeed refuses {named}: ValueError: {message}"
    )


def test_an_error_that_names_no_key_is_told_as_it_is_with_the_keys() -> None:
    told = str(refused_raw(AttributeError("'NoneType' object has no attribute 'enabled'"), RAW))
    assert told.startswith("DeepSpeed does not start: AttributeError: 'NoneType' object has no attribute 'enabled'\n")
    keys = "zero_optimization.stage3_prefetch_bucket_size, zero_optimization.overlap_comm, flops_profiler.enabled"
    assert f"names no key of deepspeed.raw ({keys}, steps_per_print), though one may be to blame" in told
