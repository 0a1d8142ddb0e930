"""Operations of transformers' layers in fewer calls, for the time of a training: norms, rotary embedding, gated FFNs.

A GPU waits where the host cannot launch kernels fast enough. Modules of known code compute here what they do there; all
others, and those with fused kernels already, stay as they are. Models that are only evaluated keep transformers' code.
"""

from __future__ import annotations

from torch import nn

from cofitune.training.rms_norm import fuse_norms
from cofitune.training.rotary import fuse_rotary
from cofitune.training.swiglu import keep_gate_and_up


def fuse_operations(model: nn.Module, layers: str, first_kept: int) -> None:
    """Put them into a model in memory.

    Args:
        layers: path of the model's list of decoder layers.
        first_kept: the first layer whose activations are kept for the backward pass, and not computed again.
    """
    fuse_norms(model)
    fuse_rotary(model)
    keep_gate_and_up(model, layers, first_kept)
