"""A frozen model whose weights the ranks share: DeepSpeed's ZeRO-3 without an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from cofitune.training.engine import loading_under
from cofitune.zero import skip_cpu_communication_op

if TYPE_CHECKING:
    from cofitune.zero import Engine


def frozen_config(dtype: torch.dtype, at_once: int) -> dict[str, object]:
    """What DeepSpeed is told of a model that it shards and nobody trains.

    Args:
        dtype: the precision that the weights are loaded in.
        at_once: weights that a rank may have gathered ahead of their use; at its default of 10⁹, a small model would be
            gathered whole.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,  # asked for, and without meaning here
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {"stage": 3, "stage3_max_live_parameters": at_once},
        "steps_per_print": 10**9,
    }


def share_frozen(load: Callable[[], nn.Module], dtype: torch.dtype, at_once: int) -> Engine:
    """Load a model sharded, for forward and backward passes that end in something else than its weights. Collective.

    From here on every rank must run as many passes as any other: each takes part in gathering the weights for all.
    The weights are sharded while they are read, so that no device ever holds them all.

    Args:
        load: reads the model by `from_pretrained`.
        dtype, at_once: as in `frozen_config`.

    Returns:
        DeepSpeed's engine, which must be kept for as long as its `module` is used.
    """
    import deepspeed

    if not torch.cuda.is_available():
        skip_cpu_communication_op()
    config = frozen_config(dtype, at_once)
    with loading_under(config):
        model = load()
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine
