"""The section `model.anatomy` that a model of an unknown layout would need, as far as names tell: it can be pasted."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cofitune.model.layouts import ATTENTION, FFN, MODULES

# last parts of names that families have for a module, the likeliest first
ALIASES = {
    "q_proj": ("q_proj", "q", "query", "wq", "Wq", "q_lin"),
    "k_proj": ("k_proj", "k", "key", "wk", "Wk", "k_lin"),
    "v_proj": ("v_proj", "v", "value", "wv", "Wv", "v_lin"),
    "o_proj": ("o_proj", "out_proj", "dense", "c_proj", "wo", "out_lin", "proj_out"),
    "gate_proj": ("gate_proj", "w1", "linear"),
    "up_proj": ("up_proj", "w3", "linear_v", "fc1", "c_fc", "fc_in", "dense_h_to_4h", "lin1", "Wi", "wi", "fc_up"),
    "down_proj": ("down_proj", "w2", "linear_1", "fc2", "c_proj", "fc_out", "dense_4h_to_h", "lin2", "Wo", "wo"),
}
FUSED_QKV = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "in_proj")
FUSED_GATE_UP = ("gate_up_proj", "input_linear", "Wi", "fc1_gate_up")
DROPOUTS = ("attention_dropout", "attn_dropout", "attn_dropout_p", "dropout")


def find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its path: of the lists that lie in no other, one of as many layers as the config
    says, and with most weights. Where the model wraps a text model, that one's. The path is empty where there is none.
    """
    text = model.config.get_text_config(decoder=True)
    depth = getattr(text, "num_hidden_layers", None)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    inside = next((name for name, module in model.named_modules() if module is decoder), "")
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    # what sees images or hears has a config of its own
    others = [n for n, m in model.named_modules() if n and _has_other_config(m, model, text)]
    ours = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other in others)] or lists
    outer = [(n, m) for n, m in ours if not any(n.startswith(f"{other}.") for other, _ in ours)]
    of_decoder = [(n, m) for n, m in outer if not inside or n.startswith(f"{inside}.")] or outer
    weights = {name: sum(_numel(p) for p in layers.parameters()) for name, layers in of_decoder}
    return max(of_decoder, key=lambda item: (len(item[1]) == depth, weights[item[0]]), default=("", nn.ModuleList()))


def linear_modules(layer: nn.Module) -> dict[str, tuple[int, int]]:
    """The linear modules below a layer, with their [out, in]."""
    found = {}
    for path, module in layer.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            rows, columns = getattr(module.weight, "ds_shape", module.weight.shape)
            found[path] = (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
    return found


def what_is_there(model: PreTrainedModel) -> str:
    """The linear modules of the model's first layer, with their shapes."""
    where, layers = find_layers(model)
    if not where:
        return "it has no list of layers with linear modules"
    message = ", ".join(f"{path} {list(shape)}" for path, shape in linear_modules(layers[0]).items())
    return f"a layer of '{where}' holds these linear modules, [out, in]: {message or 'none'}"


def how_to_describe(model: PreTrainedModel) -> str:
    """How to describe the model: the section as it can be pasted, or, where names tell too little, what there is."""
    where, layers = find_layers(model)
    layer, proposed = next(((la, found) for la in layers if (found := propose_modules(la))), (None, None))
    if layer is None or proposed is None:
        return f"Its names tell too little for a proposal of model.anatomy; {what_is_there(model)}"
    attention = proposed["o_proj"].rpartition(".")[0]
    inside = layer.get_submodule(attention)
    dropout = next((n for n in DROPOUTS if isinstance(getattr(inside, n, None), int | float | nn.Dropout)), DROPOUTS[0])
    is_conv = isinstance(layer.get_submodule(proposed["down_proj"]), Conv1D)
    example = "\n".join(
        (
            "model:",
            "  anatomy:",
            f"    layers: {where}",
            "    modules:  # path below a layer; modules with the same path are fused, in the order written here",
            *(f"      {module}: {path}" for module, path in proposed.items()),
            f"    attention: {attention}  # the module that drops attention probabilities",
            f"    attention_dropout: {dropout}  # its attribute with their probability",
            "    interleaved: false  # true: fused q, k, v lie head by head",
            f"    transposed: {str(is_conv).lower()}  # true: weights are [in, out], as Conv1D's",
        )
    )
    return f"Describe it in the config; as far as names tell, so:\n{example}\n{what_is_there(model)}"


def propose_modules(layer: nn.Module) -> dict[str, str] | None:
    """Module → path in a layer, by the names that families use; None where a module that must be has none of them."""
    paths = linear_modules(layer)
    if not paths:
        return None
    down = _find("down_proj", paths, lambda path: "attention" not in path and "attn" not in path)
    out = _find("o_proj", paths, lambda path: path != down)
    if down is None or out is None:
        return None
    beside, hidden = out.rpartition(".")[0], paths[out][0]
    found = dict.fromkeys(ATTENTION[:3], _named(FUSED_QKV, paths, beside))
    if not found["q_proj"]:
        found = {module: _named(ALIASES[module], paths, beside) for module in ATTENTION[:3]}
    inside = down.rpartition(".")[0]
    width = paths[down][1]
    fused = _named(FUSED_GATE_UP, paths, inside)
    if fused and paths[fused][0] == 2 * width:
        ffn = {"gate_proj": fused, "up_proj": fused}
    else:
        ffn = {module: _named(ALIASES[module], paths, inside) for module in FFN[:2]}
    shapes = {module: paths[path] for module, path in ffn.items() if path}
    if any(shape not in ((width, hidden), (2 * width, hidden)) for shape in shapes.values()):
        return None
    result = {**found, "o_proj": out, **ffn, "down_proj": down}
    if any(not path for module, path in result.items() if module != "gate_proj"):
        return None
    return {module: path for module in MODULES if (path := result[module])}


def _find(module: str, paths: dict[str, tuple[int, int]], accepts: Callable[[str], bool]) -> str | None:
    return next((p for name in ALIASES[module] for p in paths if p.rpartition(".")[2] == name and accepts(p)), None)


def _named(names: tuple[str, ...], paths: dict[str, tuple[int, int]], parent: str) -> str:
    """The path of the first of these names that lies in this parent, or nothing."""
    return next((p for name in names if (p := f"{parent}.{name}".removeprefix(".")) in paths), "")


def _has_other_config(module: nn.Module, model: PreTrainedModel, text: object) -> bool:
    """Whether a module is a model of its own, and not the text model."""
    return isinstance(module, PreTrainedModel) and module.config not in (text, model.config)


def _numel(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
