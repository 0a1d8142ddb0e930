"""Whether `model.attn_implementation` can run: its package, and the device; told before any weight is read."""

from __future__ import annotations

import importlib.util
from importlib import metadata

from cofitune.errors import UserError

PACKAGES = {  # of flash attention 2 and 4 the module is called alike, so that the distribution tells them apart
    "flash_attention_2": "flash-attn",
    "flash_attention_3": "flash-attn-3",
    "flash_attention_4": "flash-attn-4",
}
FLEX = "flex_attention"
FROM_THE_HUB = "kernels"  # with this package transformers fetches what is not installed


def check_attention(implementation: str) -> None:
    """Find out whether an attention implementation's package is there.

    Raises:
        UserError: it is not.
    """
    package = PACKAGES.get(implementation)
    if package is None or importlib.util.find_spec(FROM_THE_HUB) is not None:
        return
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise UserError(
            f"model.attn_implementation: {implementation} needs {package}, which is not installed: pip install "
            f"{package} (and a GPU), or pip install {FROM_THE_HUB}; sdpa needs nothing"
        ) from None


def check_device(implementation: str, trains: bool, on_gpu: bool) -> None:
    """Find out whether an attention implementation computes on this process's device.

    Args:
        trains: there is a backward pass, too.
        on_gpu: whether the device is a GPU.

    Raises:
        UserError: it does not.
    """
    if on_gpu:
        return
    if implementation in PACKAGES:
        raise UserError(
            f"model.attn_implementation: {implementation} runs on GPUs alone, and there is none here; use sdpa"
        )
    if trains and implementation == FLEX:
        raise UserError(
            f"model.attn_implementation: {FLEX} has no backward pass on a CPU, and there is no GPU here: use sdpa"
        )
