"""The optimizer that DeepSpeed steps with: which weights decay, and AdamW with 8-bit moments where asked for."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn, optim

from cofitune.errors import UserError, install

PACKAGE = "bitsandbytes"
# as Hugging Face's Trainer decides (Trainer.get_decay_parameter_names); tests compare with it
UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def check_optimizer(kind: str) -> None:
    """Find out before any weight is read whether the optimizer's package is there.

    Raises:
        UserError: it is not.
    """
    if kind == "adamw_8bit" and importlib.util.find_spec(PACKAGE) is None:
        raise UserError(
            f"train.optimizer: adamw_8bit needs {PACKAGE}, which is not installed: {install(PACKAGE)}; adamw needs "
            "nothing, and 6 bytes more a trained weight"
        )


def may_be_undecayed(names: Iterable[str], shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether weight decay leaves out some of these parameters of a base, as far as names and shapes tell.

    A norm's weight has one dimension, whatever its name; matrices decay unless their name says otherwise.
    """
    return any(len(shapes[name]) < 2 or _is_undecayed(name) for name in names)


def decay_groups(model: nn.Module, weight_decay: float, decay_all: bool) -> list[dict[str, Any]]:
    """The trained parameters as AdamW's groups: those that decay, and biases and norms, which do not.

    Args:
        decay_all: let biases and norms decay, too: one group.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    left_out = set() if decay_all or not weight_decay else set(_undecayed(model))
    groups = (
        {"params": [p for name, p in trained if name not in left_out], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if name in left_out], "weight_decay": 0.0},
    )
    return [group for group in groups if group["params"]]


def adamw_8bit(
    groups: Sequence[dict[str, Any]], learning_rate: float, betas: tuple[float, float], epsilon: float
) -> optim.Optimizer:
    """AdamW whose moments are 8-bit codes, a scale for each 256 of them (Dettmers et al., arXiv 2110.02861).

    Raises:
        UserError: the package does not load.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"train.optimizer: adamw_8bit: {PACKAGE} does not load: {error}") from error
    made: optim.Optimizer = AdamW8bit(groups, lr=learning_rate, betas=betas, eps=epsilon)
    return made


def _undecayed(model: nn.Module) -> Iterator[str]:
    """Names of the parameters of a model that do not decay: by their name, or as part of a LayerNorm."""
    for path, module in model.named_modules():
        for own, _ in module.named_parameters(recurse=False):
            name = f"{path}.{own}" if path else own
            if isinstance(module, nn.LayerNorm) or _is_undecayed(name):
                yield name


def _is_undecayed(name: str) -> bool:
    return UNDECAYED.search(name.lower()) is not None
