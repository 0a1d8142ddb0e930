"""Which layout a model has: found by what it is made of, or as the config describes it. Never guessed at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.pytorch_utils import Conv1D

from cofitune.errors import UserError
from cofitune.model.describe import find_layers, what_is_there
from cofitune.model.layouts import ATTENTION, FFN, LAYOUTS, Layout


@dataclass(frozen=True)
class Recognised:
    """A model's layout, possibly of a part of its modules, and why units are known of no more of them.

    Attributes:
        unknown: of which modules the units are not known, and why; empty where all are known.
    """

    layout: Layout
    unknown: str = ""


def choose_layout(model: PreTrainedModel, described: Layout | None) -> Recognised:
    """The described layout; or the one of the table whose modules the model has, in all layers or in some.

    A model whose layers differ (attention here, a state-space block there; experts from the second layer on) has a
    module in those layers where its attention, or its FFN, is made as the layout says.

    Raises:
        UserError: the model lacks paths of the described layout.
    """
    modules = dict(model.named_modules())
    if described is not None:
        missing = missing_paths(modules, described)
        if missing:
            kind = model.config.model_type
            raise UserError(f"model.anatomy: model type {kind} has no {missing}; {what_is_there(model)}")
        return Recognised(described)
    where, _ = find_layers(model)
    best, score, whole = Layout(where, {}, ""), 0, False
    for layout in LAYOUTS.values():
        moved = _at(layout, where)
        held = {group: layers_with(modules, moved, group) for group in (ATTENTION, FFN)}
        total = sum(map(len, held.values()))
        if total > score:
            best = moved.only({m for group, layers in held.items() if layers for m in group})
            score, whole = total, total == 2 * len(modules[moved.layers])
    return Recognised(_with_its_dropout(best, modules), "" if whole else _what_lacks(best, modules))


def missing_paths(modules: dict[str, nn.Module], layout: Layout) -> str:
    """Name the first thing of a layout that no layer of a model has, or nothing."""
    linear, name = (Conv1D, "Conv1D (transposed: true)") if layout.transposed else (nn.Linear, "linear module")
    layers = modules.get(layout.layers)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        return f"list of layers '{layout.layers}'"
    for group in (ATTENTION, FFN):
        if layers_with(modules, layout, group):
            continue
        for path in (path for module, path in layout.modules.items() if module in group):
            if not isinstance(modules.get(f"{layout.layers}.0.{path}"), linear):
                return f"{name} '{path}' in layer 0"
        if f"{layout.layers}.0.{layout.attention}" not in modules:
            return f"attention module '{layout.attention}' in layer 0"
    return ""


def layers_with(modules: dict[str, nn.Module], layout: Layout, group: tuple[str, ...]) -> list[int]:
    """The layers that have all of a layout's modules of a group, attention or FFN, and where they belong."""
    linear = Conv1D if layout.transposed else nn.Linear
    layers = modules.get(layout.layers)
    paths = [path for module, path in layout.modules.items() if module in group]
    if not isinstance(layers, nn.ModuleList) or not paths:
        return []
    needed = [layout.attention] if group == ATTENTION else []
    return [
        index
        for index in range(len(layers))
        if all(isinstance(modules.get(f"{layout.layers}.{index}.{path}"), linear) for path in paths)
        and all(f"{layout.layers}.{index}.{path}" in modules for path in needed)
    ]


def _at(layout: Layout, layers: str) -> Layout:
    """A layout with its layers where this model has them; how fused q, k, v lie is known at their own place alone."""
    return layout if layout.modules["q_proj"] == layout.modules["k_proj"] else replace(layout, layers=layers)


def _with_its_dropout(layout: Layout, modules: dict[str, nn.Module]) -> Layout:
    """A layout whose attention calls its dropout as most families do now: GPT-J's does so since transformers 5.24."""
    attention = modules.get(f"{layout.layers}.0.{layout.attention}")
    own, usual = layout.attention_dropout, Layout.attention_dropout
    renamed = "." not in own and not hasattr(attention, own) and hasattr(attention, usual)
    return replace(layout, attention_dropout=usual) if renamed else layout


def _what_lacks(layout: Layout, modules: dict[str, nn.Module]) -> str:
    """Of which modules no units are known."""
    names = []
    for group, name in ((ATTENTION, "attention"), (FFN, "FFN")):
        count = len(layers_with(modules, layout, group))
        layers: Any = modules.get(layout.layers, ())
        if count < len(layers) or not count:
            names.append(f"the {name} of {len(layers) - count} of {len(layers)} layers" if count else f"the {name}")
    return f"{' and '.join(names)} {'lie' if len(names) > 1 else 'lies'} otherwise than in any layout that is known"


def find_experts(layers: nn.ModuleList) -> tuple[str, int]:
    """The path, below a layer, of the module that holds all experts of a layer, and how many these are; none: ("", 0).

    Its parameters are one for all experts, [experts, …] each, and it is called with the tokens [N, H], the experts of
    each token and their weights [N, k]; so it is in all of transformers' families but Llama 4.
    """
    for layer in layers:
        for path, module in layer.named_modules():
            shapes = [true_shape(p) for p in module.parameters(recurse=False)]
            if len(shapes) < 2 or {len(shape) for shape in shapes} - {2, 3} or max(map(len, shapes)) < 3:
                continue
            called_with = signature(module.forward).parameters.values()
            if len({shape[0] for shape in shapes}) == 1 and len(called_with) == 3:
                return path, shapes[0][0]
    return "", 0


def names_in_files(model: PreTrainedModel) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Names that transformers writes into weight files, where they are not the model's own → the model's own; and those
    parameters that no file holds as they are, but in parts, or turned, each with all that make up the same tensors.

    GPT-NeoX's head, for one, is `lm_head` in memory and `embed_out` in every file; Mixtral's experts are one tensor in
    memory and one an expert in the files.
    """
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    back = [change.reverse_transform() for change in reversed(mapping)]
    renamings = [change for change in back if isinstance(change, WeightRenaming)]
    converters = [change for change in back if isinstance(change, WeightConverter)]
    written: dict[str, str] = {}
    converted: dict[str, str] = {}
    for name, _ in model.named_parameters():
        other, converter = rename_source_key(name, renamings, converters, reverse=True)
        if converter is not None:
            converted[name] = other
        elif other != name:
            written[other] = name
    together: dict[str, list[str]] = {}
    for name, other in converted.items():
        together.setdefault(other, []).append(name)
    return written, {name: tuple(together[other]) for name, other in converted.items()}


def as_in_files(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of a model as transformers writes them into weight files: the files' names and parts.

    Args:
        model: of their family and config; its own weights are not looked at.
        tensors: by their names in the model; of those that are converted together, all.
    """
    result: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return result


def true_shape(parameter: Tensor) -> tuple[int, ...]:
    """The whole parameter's shape; under ZeRO-3 `shape` is [0] outside a gather and DeepSpeed keeps the true one."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
