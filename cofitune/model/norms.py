"""Which form of RMSNorm (Zhang and Sennrich, arXiv 1910.07467) a module of transformers is, told by its code.

transformers writes a norm once for each family, and there are few ways in which they differ: where the result is
rounded, and whether the weight is the factor or what it differs from 1 by. Each is written out here as it stands there.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn

from cofitune.model.same_code import same_code


@dataclass(frozen=True)
class NormForm:
    """How a norm's weight meets what was normed in fp32.

    Attributes:
        epsilon: name of the attribute with what is added to the mean square.
        rounds_first: whether what was normed is rounded to the input's precision before the weight is applied.
        offset: whether the factor is 1 + weight.
    """

    epsilon: str
    rounds_first: bool = False
    offset: bool = False


def norm_form(module: nn.Module) -> NormForm | None:
    """The form of a norm of transformers as it stands there; None of everything else.

    A norm whose own forward pass was replaced, as by fused kernels, has none.
    """
    kind = type(module)
    if not kind.__module__.startswith("transformers.") or "forward" in vars(module):
        return None
    for forward, inner, form in FORMS:
        if same_code(kind.forward, forward) and (inner is None or same_code(getattr(kind, "_norm", None), inner)):
            return form
    return None


def has_known_norms(model: nn.Module) -> bool:
    """Whether all of a model's norms without a bias have a form."""
    norms = [m for m in model.modules() if "weight" in m._parameters and type(m).__name__.endswith("RMSNorm")]
    return bool(norms) and all(norm_form(module) is not None for module in norms)


def _llama(self: Any, hidden_states: Tensor) -> Any:
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)


def _olmo(self: Any, hidden_states: Tensor) -> Any:
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return (self.weight * hidden_states).to(input_dtype)


def _gemma(self: Any, x: Tensor) -> Any:
    output = self._norm(x.float())
    output = output * (1.0 + self.weight.float())
    return output.type_as(x)


def _gemma_norm(self: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


FORMS = [
    (cast(FunctionType, forward), cast("FunctionType | None", inner), form)
    for forward, inner, form in (
        (_llama, None, NormForm("variance_epsilon", rounds_first=True)),
        (_olmo, None, NormForm("variance_epsilon")),
        (_gemma, _gemma_norm, NormForm("eps", offset=True)),
    )
]
