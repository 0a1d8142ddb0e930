"""The response's log-likelihood: the loss whose squared gate gradients are the empirical Fisher information.

F_u = 1/N Σ_n (∂ log p(y_n | x_n) / ∂g_u)², the diagonal of EWC's Fisher information (Kirkpatrick et al., arXiv
1612.00796) taken at a unit's gate instead of at a weight: how much the likelihood of good answers depends on the unit.
Its first-order relative, the mean of |∂L/∂g|, is the head importance of Michel et al. (arXiv 1905.10650). *Empirical*:
y_n are the data's own responses, not samples of the model, so that data which the model finds strange weighs more;
give it data that the model should keep answering as it does.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel

from cofitune.training.loss import summed_loss


def response_loss(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """−log p(responses | prompts), a scalar in nats, summed over the samples of a micro-batch, without dropout.

    A sample's gates meet no other sample's loss, so the sum's gradient at them is that of the sample's own likelihood.

    Args:
        model: a model inside `virtual_gates`, its gates renewed.
        batch: `input_ids`, `attention_mask` and `labels`, each [B, T], on the model's device.
    """
    return summed_loss(model, dict(batch))
