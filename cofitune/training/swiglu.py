"""Gated FFNs that keep gate and up for the backward pass, and not SiLU's result beside them.

Autograd keeps three tensors of an FFN's width in each layer: the gate, SiLU of it, and the other factor. SiLU is
computed again from the gate, by the same operations, so that losses and gradients have the same bits.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from cofitune.training.autograd import Context

# of transformers' MLPs, those that compute down_proj(silu(gate_proj(x)) * up_proj(x)), by their model's type
MODEL_TYPES = {
    "cohere", "cohere2", "granite", "llama", "mistral", "olmo", "olmo2", "olmo3", "qwen2", "qwen3", "smollm3",
    "stablelm",
}  # fmt: skip


def keep_gate_and_up(model: nn.Module, layers: str, first: int) -> int:
    """Let the FFNs of the layers from `first` on keep less; returns how many do.

    Layers that compute their activations again keep nothing for long, and would compute SiLU a third time: leave them
    out. A model whose code is not known to be of that form stays as it is.

    Args:
        layers: path of the model's list of decoder layers.
    """
    config = getattr(model, "config", None)
    known = getattr(config, "model_type", None) in MODEL_TYPES and getattr(config, "hidden_act", None) == "silu"
    if not known or not type(model).__module__.startswith("transformers."):
        return 0
    count = 0
    for layer in list(model.get_submodule(layers).children())[first:]:
        mlp = getattr(layer, "mlp", None)
        if not isinstance(mlp, nn.Module) or "forward" in vars(mlp):  # a kernel's keeps gate and up, too
            continue
        if all(hasattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")):
            mlp.forward = partial(_forward, mlp)
            count += 1
    return count


def _forward(mlp: Any, hidden: Tensor) -> Tensor:
    """What the MLP's own forward pass gives."""
    product: Tensor = _GatedSiLU.apply(mlp.gate_proj(hidden), mlp.up_proj(hidden))  # type: ignore[no-untyped-call]
    result: Tensor = mlp.down_proj(product)
    return result


class _GatedSiLU(torch.autograd.Function):
    """silu(gate) * up, element by element."""

    @staticmethod
    def forward(ctx: Context, gate: Tensor, up: Tensor) -> Tensor:
        """Keeps the gate, and up where the gate's gradient is wanted."""
        ctx.save_for_backward(gate, up if ctx.needs_input_grad[0] else None)
        return silu(gate) * up

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of gate and up, as autograd computes them."""
        (gradient,) = gradients
        gate, up = ctx.saved_tensors
        of_gate = torch.ops.aten.silu_backward(gradient * up, gate) if ctx.needs_input_grad[0] else None
        of_up = gradient * silu(gate) if ctx.needs_input_grad[1] else None
        return of_gate, of_up
