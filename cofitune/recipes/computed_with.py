"""What computes: the kind of device, and the packages on whose kernels the last digits of every figure depend."""

from __future__ import annotations

from collections.abc import Mapping

from cofitune.distributed import device_name
from cofitune.recipes.folders import package_version

COMPUTING = ("torch", "transformers", "deepspeed")
COMPUTED_WITH = "computed_with"  # in identities


def computed_with(device: str | None = None) -> dict[str, str]:
    """The device here, or the one that is given, and the versions of the packages."""
    return {"device": device or device_name(), **{name: package_version(name) for name in COMPUTING}}


def changed_since(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """What differs, in words: `torch 2.12.0, now 2.13.0`; empty where nothing does, or where it was not written down.

    Example:
        >>> changed_since({"device": "cpu", "torch": "2.12.0"}, {"device": "cpu", "torch": "2.13.0"})
        'torch 2.12.0, now 2.13.0'
    """
    return "; ".join(
        f"{name} {before[name]}, now {now[name]}" for name in now if before.get(name, now[name]) != now[name]
    )
