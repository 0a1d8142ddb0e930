"""A guess at a region's worth from gradients alone, before any training: it orders regions, and decides only if asked.

Derivation (ours). AdamW's first steps move every trained weight by about the rate η against its gradient's sign. On the
speciality's loss that is, to first order, a gain of η·Σ|g_i|; on the general data's loss, whose gradient is taken to be
unrelated to that direction, the first-order term is 0 in the mean and the second order counts: ½η²·Σ F_i with the
diagonal Fisher information F_i, the mean square of the gradient of one item (as EWC penalises moves, arXiv 1612.00796).
Over the tensors of a region R:

    gain(R) = Σ over R of the mean over micro-batches of ‖g_speciality‖₁
    harm(R) = Σ over R of the mean over items of ‖g_general‖²

How many points of speciality a nat of gain is worth, and of versatility a nat of harm, is not known beforehand. Both
are put on one scale by those of the whole model, as if training all of it at the full rate gained and lost alike:

    proxy(R) = w·s·gain(R)/gain(all) − (1 − w)·s²·harm(R)/harm(all)

with w the weight of speciality in the objective and s the region's rate over the unscaled one. What this leaves out is
most of what happens: that steps differ, that gradients change, that layers interact, that the gradient of a micro-batch
is partly noise, and that harm can have a direction. So its rank correlation with the trials' scores is told every time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cofitune.data.chat import IGNORED
from cofitune.distributed import all_reduce_sum, world_size_or_one
from cofitune.errors import ArtifactError, UserError
from cofitune.model.anatomy import Anatomy
from cofitune.model.region import Region, freeze_outside
from cofitune.training.loss import summed_loss

PerTensor = dict[str, tuple[float, ...]]  # module → one number a layer
Norm = Callable[[Tensor], Tensor]
FEWEST = 3  # trials that a rank correlation is taken from


@dataclass(frozen=True)
class Statistics:
    """Of every module of every layer: gain in nats a unit of rate, harm in nats a squared unit of rate (times ½).

    Raises:
        ValueError: they are not of the same modules and layers.
    """

    gain: PerTensor
    harm: PerTensor

    def __post_init__(self) -> None:
        sizes = [{module: len(values) for module, values in part.items()} for part in (self.gain, self.harm)]
        if sizes[0] != sizes[1] or not sizes[0]:
            raise ValueError("gain and harm are not of the same modules and layers")

    def proxy_score(self, region: Region, weight: float, rate_factor: float = 1.0) -> float:
        """The proxy of a region, high is good; 0 for the whole model at weight 0.5.

        Args:
            weight: w, of speciality in the objective, 0 to 1.
            rate_factor: s, the region's learning rate over the unscaled one.
        """
        gain, harm = (_share(part, region) for part in (self.gain, self.harm))
        return weight * rate_factor * gain - (1 - weight) * rate_factor**2 * harm


def statistics_from_json(value: Any, where: str) -> Statistics:
    """Read what `dataclasses.asdict` of `Statistics` wrote.

    Raises:
        ArtifactError: it is none; `where` names it in the message.
    """
    try:
        parts = {name: {m: tuple(map(float, v)) for m, v in value[name].items()} for name in ("gain", "harm")}
        return Statistics(**parts)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ArtifactError(f"{where}: these gradient statistics are damaged: {error}") from None


def first_norm(gradient: Tensor) -> Tensor:
    """‖g‖₁, summed in fp32."""
    norm: Tensor = torch.linalg.vector_norm(gradient, 1, dtype=torch.float32)
    return norm


def squared_norm(gradient: Tensor) -> Tensor:
    """‖g‖₂², summed in fp32."""
    norm: Tensor = torch.linalg.vector_norm(gradient, 2, dtype=torch.float32)
    return norm.square()


def module_weights(anatomy: Anatomy) -> set[str]:
    """The names of all modules' weights and biases, whose gradients are taken."""
    layers = range(anatomy.num_layers)
    return {name for layer in layers for module in anatomy.modules for name in anatomy.parameter_names(layer, module)}


def gradient_norms(
    model: nn.Module, anatomy: Anatomy, micro_batches: Iterable[Mapping[str, Tensor]], norm: Norm, idle: int = 0
) -> PerTensor:
    """The mean over the micro-batches of all ranks of a norm of the gradient of each module's weights and biases.

    A gradient is looked at as soon as it is whole, and freed: the model's weights, the activations of one micro-batch
    and the gradient of one tensor are in memory at a time. Collective where there are several ranks.

    Args:
        model: on its device, whole or sharded by ZeRO-3; which of its parameters require gradients is changed.
        micro_batches: this rank's: `input_ids`, `attention_mask` and `labels`, each [B, T]; the loss is the mean over
            the supervised tokens of each.
        idle: passes that come after them and count for nothing: ranks that share the weights must take equally many.

    Raises:
        UserError: there is no micro-batch, or a gradient is not finite.
    """
    freeze_outside(model, module_weights(anatomy))
    device = next(model.parameters()).device
    sums = {module: torch.zeros(anatomy.num_layers, dtype=torch.float64, device=device) for module in anatomy.modules}
    model.eval()
    count = 0
    with _watched(model, anatomy, norm, sums):
        for given in micro_batches:
            batch = {name: value.to(device) for name, value in given.items()}
            supervised = int((batch["labels"][:, 1:] >= 0).sum())
            (summed_loss(model, batch) / max(1, supervised)).backward()
            count += 1
        for _ in range(idle):  # without a label: every gradient is 0
            ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
            idle_batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids + IGNORED}
            summed_loss(model, idle_batch).backward()
    total = torch.tensor(count, device=device)
    if world_size_or_one() > 1:
        for values in (*sums.values(), total):
            all_reduce_sum(values)
    if not total:
        raise UserError("search.proxy: there is not one item to take gradients of")
    means = {module: tuple((values / total).tolist()) for module, values in sums.items()}
    if not all(math.isfinite(value) for values in means.values() for value in values):
        raise UserError(
            "search.proxy: a gradient is not finite; try model.dtype: float32, and check the model's weights"
        )
    return means


def rank_correlation(guesses: Sequence[float], scores: Sequence[float]) -> float | None:
    """Spearman's, −1 to 1; None for fewer than three pairs, or where one side does not vary."""
    from scipy.stats import spearmanr

    if len(guesses) < FEWEST or len(set(guesses)) == 1 or len(set(scores)) == 1:
        return None
    return float(spearmanr(guesses, scores).statistic)


@contextmanager
def _watched(model: nn.Module, anatomy: Anatomy, norm: Norm, sums: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, every gradient of a module adds its norm to `sums` and is gone."""
    owners: dict[str, list[tuple[int, str]]] = {}  # a fused tensor is several modules'
    for layer in range(anatomy.num_layers):
        for module in anatomy.modules:
            for name in anatomy.parameter_names(layer, module):
                owners.setdefault(name, []).append((layer, module))
    parameters = dict(model.named_parameters())

    def hook_of(name: str) -> Callable[[Tensor], None]:
        def look(parameter: Tensor) -> None:
            gradient = parameter.grad
            parameter.grad = None
            if gradient is None:
                return
            for layer, module in owners[name]:
                sums[module][layer] += norm(_own(gradient, anatomy, layer, module, len(owners[name])))

        return look

    with ExitStack() as hooks:
        for name in owners:
            hooks.enter_context(parameters[name].register_post_accumulate_grad_hook(hook_of(name)))
        yield


def _own(gradient: Tensor, anatomy: Anatomy, layer: int, module: str, owners: int) -> Tensor:
    """A module's own part of the gradient of the tensor that it lies in."""
    if owners == 1:
        return gradient
    axis = anatomy.row_axis if gradient.dim() > 1 else 0
    return gradient.index_select(axis, anatomy.rows(layer, module).to(gradient.device))


def _share(part: PerTensor, region: Region) -> float:
    """A region's sum over that of the whole model."""
    whole = sum(map(sum, part.values()))
    own = sum(part[module][layer] for module in region.modules for layer in region.layers)
    return own / whole if whole else 0.0
