"""Importance of input columns without gradients: a weight's magnitude times the norm of what enters it.

Wanda (Sun et al., arXiv 2306.11695) scores a weight by |W_ij|·‖x_j‖, the norm taken over the tokens of general data.
SSU (Yamaguchi et al., arXiv 2512.04844) freezes whole input columns by it. A column's score is the sum of its weights':

    s_j = ‖x_j‖ · Σ_i |W_ij|,   ‖x_j‖² = 1/N · Σ_t x_tj²

over the N real tokens, prompts included (dividing by N changes no order), and over a module's own rows i, also where
the module shares a tensor with others. The code that SSU's authors published takes the column's Euclidean norm times
the mean square of its input instead; Wanda's scores, added up, are what we take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from cofitune.errors import UserError
from cofitune.importance.sums import Scores
from cofitune.importance_file import COLUMNS, column_kind, layer_units, unit_counts
from cofitune.model.anatomy import Anatomy
from cofitune.zero import gathered

SquaresOf = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@contextmanager
def watched_inputs(model: PreTrainedModel, anatomy: Anatomy) -> Iterator[SquaresOf]:
    """Give what runs a micro-batch through the model and adds up the squares of what enters each module.

    That function takes `input_ids` and `attention_mask`, each [B, T], and returns each column kind → [L, columns], fp64
    on the model's device; 0 where a layer has fewer columns or no such module. Inside, the model is in eval mode.

    Raises:
        UserError: the model has no linear module of a known kind; from the function, a module sees other tokens than
            those that entered the model.
    """
    modules = [module for module in anatomy.modules if module in anatomy.layout.modules]
    if not modules:
        raise UserError("importance.estimator: wanda scores linear weights, and this model has none of a known kind")
    layers = list(model.get_submodule(anatomy.layout.layers))
    squares: dict[tuple[int, str], Tensor] = {}
    mask: list[Tensor] = []
    # the whole model runs, since ZeRO-3 counts its passes, but nobody looks at what it answers
    few_logits = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    handles: list[RemovableHandle] = []
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for layer, module in _inputs(anatomy, modules):
            path = anatomy.layout.modules[module]
            handles.append(
                layers[layer].get_submodule(path).register_forward_pre_hook(_adder(squares, mask, layer, path))
            )

        def squares_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
            ids, real = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
            squares.clear()
            mask[:] = [real.flatten().bool()]
            with torch.no_grad():
                model(input_ids=ids, attention_mask=real, use_cache=False, **few_logits)
            return _by_kind(squares, anatomy, modules, model.device)

        yield squares_of
    finally:
        for handle in handles:
            handle.remove()
        for one, before in training:
            one.training = before


def column_scores(found: Scores, model: PreTrainedModel, anatomy: Anatomy) -> Scores:
    """From mean squares of inputs to s_j, of each half and of the whole. Every rank must enter.

    Args:
        found: column kind → mean squares.
        model: whole, or sharded by ZeRO-3.
    """
    sums = {kind: torch.zeros_like(values) for kind, values in found.values.items()}  # Σ_i |W_ij|, [L, columns]
    for module in (m for m in anatomy.modules if column_kind(m) in sums):
        for layer in range(anatomy.num_layers):
            if anatomy.has(layer, module):
                weight = model.get_parameter(next(anatomy.parameter_names(layer, module)))
                with gathered(weight) as whole:
                    own = whole.index_select(anatomy.row_axis, anatomy.rows(layer, module).to(whole.device))
                    columns = own.abs().sum(dim=anatomy.row_axis, dtype=torch.float64)
                sums[column_kind(module)][layer, : len(columns)] = columns.cpu()
    return replace(
        found,
        halves={kind: half.sqrt() * sums[kind] for kind, half in found.halves.items()},
        values={kind: whole.sqrt() * sums[kind] for kind, whole in found.values.items()},
    )


def _inputs(anatomy: Anatomy, modules: list[str]) -> Iterator[tuple[int, str]]:
    """Each layer with one of the modules of each of its tensors: those that are fused have one input."""
    for layer in range(anatomy.num_layers):
        paths = set()
        for module in modules:
            path = anatomy.layout.modules[module]
            if anatomy.has(layer, module) and path not in paths:
                paths.add(path)
                yield layer, module


def _adder(
    squares: dict[tuple[int, str], Tensor], mask: list[Tensor], layer: int, path: str
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].flatten(0, -2)  # [B·T, columns]: some models (OPT) hand it on so themselves
        if len(values) != len(mask[0]):
            raise UserError(
                f"importance.estimator: wanda: {path} of layer {layer} sees {len(values)} tokens of {len(mask[0])}, so "
                "that its columns cannot be told the general data's norms; use fisher"
            )
        real = values[mask[0]].float().square().sum(dim=0, dtype=torch.float64)
        squares[layer, path] = squares[layer, path] + real if (layer, path) in squares else real

    return add


def _by_kind(
    squares: Mapping[tuple[int, str], Tensor], anatomy: Anatomy, modules: list[str], device: torch.device
) -> dict[str, Tensor]:
    counts = unit_counts(anatomy, COLUMNS)
    found = {}
    for module in modules:
        kind, path = column_kind(module), anatomy.layout.modules[module]
        none = torch.zeros(counts[kind], dtype=torch.float64, device=device)
        own = [
            pad(squares[layer, path], (0, counts[kind] - columns)) if columns else none
            for layer, columns in enumerate(layer_units(anatomy, kind))
        ]
        found[kind] = torch.stack(own)
    return found
