"""Which layout a model has: found by what it is made of, or as the config describes it. Never guessed at."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from cofitune.errors import UserError
from cofitune.model.layouts import LAYOUTS, MODULES, Layout


def choose_layout(model: PreTrainedModel, described: Layout | None) -> Layout:
    """Return the described layout, or the one of the table all of whose modules the model has in every layer.

    Raises:
        UserError: a wrapper around a text model, expert layers, no layout of the table, or paths of the described
            layout that the model does not have.
    """
    kind = model.config.model_type
    if "text_config" in model.config.sub_configs:
        raise UserError(
            f"model type {kind} wraps a text model (its config has a text_config): images and other inputs are not "
            "supported; name a checkpoint of the text model alone"
        )
    modules = dict(model.named_modules())
    last_parts = {name.rsplit(".", 1)[-1] for name in modules}
    experts = sorted(part for part in last_parts if "expert" in part or part.endswith("moe"))
    if experts:
        raise UserError(f"model type {kind} has expert layers ({', '.join(experts)}): not supported yet")
    if described is not None:
        missing = missing_paths(modules, described)
        if missing:
            raise UserError(f"model.anatomy: model type {kind} has no {missing}; {what_is_there(model)}")
        return described
    for layout in LAYOUTS.values():
        if not missing_paths(modules, layout):
            return layout
    raise UserError(
        f"model type {kind} has none of the layouts that cofitune knows ({', '.join(LAYOUTS)}), and it does not guess. "
        + how_to_describe(model)
    )


def missing_paths(modules: dict[str, nn.Module], layout: Layout) -> str:
    """Name the first thing of a layout that a model lacks, or nothing."""
    linear, name = (Conv1D, "Conv1D (transposed: true)") if layout.transposed else (nn.Linear, "linear module")
    layers = modules.get(layout.layers)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        return f"list of layers '{layout.layers}'"
    for index in range(len(layers)):
        for path in layout.modules.values():
            if not isinstance(modules.get(f"{layout.layers}.{index}.{path}"), linear):
                return f"{name} '{path}' in layer {index}"
        if f"{layout.layers}.{index}.{layout.attention}" not in modules:
            return f"attention module '{layout.attention}' in layer {index}"
    return ""


def how_to_describe(model: PreTrainedModel) -> str:
    """The section `model.anatomy` that the user would have to write, filled in as far as names tell, and what to fill
    it with."""
    result = _linear_modules(model)
    layers, paths = result if result else ("…", {})
    by_name = {path.rsplit(".", 1)[-1]: path for path in paths}
    lines = [f"      {module}: {by_name.get(module, '…')}" for module in MODULES]
    lines[MODULES.index("gate_proj")] += "  # leave it out where the FFN has no gate"
    attention = next((p.rsplit(".", 1)[0] for p in by_name.values() if p.rsplit(".", 1)[-1] in MODULES[:4]), "…")
    example = "\n".join(
        (
            "model:",
            "  anatomy:",
            f"    layers: {layers}",
            "    modules:  # path below a layer; modules with the same path are fused, in the order written here",
            *lines,
            f"    attention: {attention}  # the module that drops attention probabilities",
            "    attention_dropout: attention_dropout  # its attribute with their probability",
            "    interleaved: false  # true: fused q, k, v lie head by head",
            "    transposed: false  # true: weights are [in, out], as Conv1D's",
        )
    )
    return f"Describe it in the config:\n{example}\n{what_is_there(model)}"


def what_is_there(model: PreTrainedModel) -> str:
    """The linear modules of the model's first layer, with their shapes."""
    result = _linear_modules(model)
    if result is None:
        return "it has no list of layers with linear modules"
    message = ", ".join(f"{path} {list(shape)}" for path, shape in result[1].items())
    return f"a layer of '{result[0]}' holds these linear modules, [out, in]: {message}"


def names_in_files(model: PreTrainedModel) -> dict[str, str]:
    """Names that transformers writes into weight files, where they are not the model's own → the model's own.

    GPT-NeoX's head, for one, is `lm_head` in memory and `embed_out` in every file.
    """
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    back = [change.reverse_transform() for change in reversed(mapping) if isinstance(change, WeightRenaming)]
    written = {name: rename_source_key(name, back, [], reverse=True)[0] for name, _ in model.named_parameters()}
    return {other: name for name, other in written.items() if other != name}


def true_shape(parameter: Tensor) -> tuple[int, ...]:
    """The whole parameter's shape; under ZeRO-3 `shape` is [0] outside a gather and DeepSpeed keeps the true one."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _linear_modules(model: PreTrainedModel) -> tuple[str, dict[str, tuple[int, ...]]] | None:
    """The path of the longest list of layers, and the linear modules of its first layer with their [out, in]."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        return None
    name, layers = max(lists, key=lambda item: len(item[1]))
    paths = {}
    for path, module in layers[0].named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            shape = true_shape(module.weight)
            paths[path] = shape[::-1] if isinstance(module, Conv1D) else shape
    return name, paths
