"""Where memory runs out while a model answers: what was being done, and which settings would take less."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from cofitune.training.out_of_memory import is_on_gpu, telling_out_of_memory

Doing = Callable[[], tuple[str, int]]  # what is being done, and how many items of a batch that takes at once


def ways_to_less(batch_size: int, dtype: str, key: str, again: str = "all models are asked again") -> list[str]:
    """Settings that take less memory while models answer, each with what it costs.

    Args:
        dtype: as torch calls the precision that answers are made in.
        key: of the config, that says how many items are asked at once.
        again: what another batch size means.
    """
    ways = []
    if batch_size > 1:
        ways.append(f"{key}: {batch_size // 2} ({again})")
    if dtype == "float32":
        ways.append("model.dtype: bfloat16 (rounds all weights; half their memory)")
    if not torch.cuda.is_available():
        ways.append("fewer ranks on this machine: each holds the whole model")
    return ways or ["a device with more memory: no setting would help much"]


@contextmanager
def explaining_out_of_memory(
    doing: Doing, dtype: str, key: str, again: str = "all models are asked again"
) -> Iterator[None]:
    """Turn an allocation that failed while a model answers into one message that says which settings to change.

    Args:
        doing: is asked when memory has run out.
        dtype, key, again: as for `ways_to_less`.

    Raises:
        UserError: memory ran out inside.
    """

    def explain(error: Exception, output: str) -> str:
        what, batch_size = doing()
        at_once = f", {batch_size} items at once" if batch_size > 1 else ""
        ways = ways_to_less(batch_size, dtype, key, again)
        return (
            f"out of memory on the {'GPU' if is_on_gpu(error) else 'host'} while {what}{at_once}: {output}\n"
            "what would take less:\n" + "\n".join(f"  - {way}" for way in ways)
        )

    with telling_out_of_memory(explain):
        yield
