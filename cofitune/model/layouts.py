"""How decoder layers are laid out, as data: where each module of a region lives, and what is fused with what.

A layout is chosen by what a model *has*, never by its family's name. One that is not in the table can be described in
the config (`model.anatomy`) by the same fields.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from cofitune.errors import RegionError, did_you_mean

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION, FFN = MODULES[:4], MODULES[4:]
GROUPS = {"mha": ATTENTION, "ffn": FFN, "all": MODULES}
EXPERTS = "experts"  # a module that holds all experts of a layer; in no group, for it is most of a model's weights


@dataclass(frozen=True)
class Layout:
    """Where a decoder layer keeps the modules of a region.

    Attributes:
        layers: path of the list of decoder layers, below the model.
        modules: module → path of its linear module, below a layer. Modules of one path are fused: parts of one weight,
            in the order written here. An FFN without a gate has no `gate_proj`.
        attention: path, below a layer, of the module that drops attention probabilities.
        attention_dropout: its attribute with their probability, a number or an `nn.Dropout`; `config.NAME` is that of
            its config.
        interleaved: how fused q, k, v lie. False: one after the other. True: a key/value head at a time, each with the
            query heads that it serves, its key and its value.
        transposed: whether weights are [in, out] (GPT-2's Conv1D) and not [out, in].
        num_heads, num_key_value_heads, head_dim: None: as the model's config.json says.
    """

    layers: str
    modules: Mapping[str, str]
    attention: str
    attention_dropout: str = "attention_dropout"
    interleaved: bool = False
    transposed: bool = False
    num_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None

    def parts(self, module: str) -> tuple[str, ...]:
        """The modules whose weights lie in one tensor with this one's, in their order there; itself among them."""
        if module not in self.modules:
            return (module,)
        return tuple(other for other, path in self.modules.items() if path == self.modules[module])

    def only(self, modules: Container[str]) -> Layout:
        """The same without its other modules."""
        return replace(self, modules={name: path for name, path in self.modules.items() if name in modules})


def _layout(
    layers: str, attention: str, qkv: str, ffn: str, dropout: str = "attention_dropout", **more: bool
) -> Layout:
    """One line of the table.

    Args:
        attention: path of the module that drops attention probabilities; q, k, v, o lie in it.
        qkv: names of q, k, v and o, or of the one module that q, k, v are fused in, and o.
        ffn: paths of gate, up and down, or of up and down; or, in brackets, of gate and up fused, and down.
    """
    names, paths = qkv.split(), ffn.split()
    fused, last = names[:-1], names[-1]
    inputs = fused * 3 if len(fused) == 1 else fused
    modules = {m: f"{attention}.{n}" for m, n in zip(MODULES, [*inputs, last], strict=False)}
    if paths[0].startswith("["):
        paths = [paths[0].strip("[]"), paths[0].strip("[]"), paths[1]]
    modules |= dict(zip(MODULES[7 - len(paths) :], paths, strict=True))
    return Layout(layers, modules, attention, dropout, **more)


_PLAIN = "q_proj k_proj v_proj o_proj"
_OUT = "q_proj k_proj v_proj out_proj"
_H = "transformer.h"
FAMILIES = {  # layout → models that have it
    "plain": "Llama, Mistral, SmolLM, OLMo, Qwen 2/2.5/3, Gemma 1-3, StableLM, Cohere, Granite 3",
    "no_gate": "Nemotron, Arcee, Apertus",
    "fused": "Phi-3, Phi-4-mini",
    "glm": "GLM, GLM-4",
    "phi": "Phi-1, Phi-2",
    "nanochat": "nanochat",
    "starcoder2": "StarCoder 2",
    "opt": "OPT",
    "gpt_neox": "GPT-NeoX, Pythia",
    "persimmon": "Persimmon",
    "falcon": "Falcon, BLOOM",
    "gpt2": "GPT-2",
    "gpt_bigcode": "StarCoder 1",
    "gptj": "GPT-J",
    "gpt_neo": "GPT-Neo",
    "mpt": "MPT",
    "lfm2": "LFM2",
    "feed_forward": "Falcon-H1, Bamba, Jamba",
    "granite_hybrid": "Granite 4",
}
LAYOUTS = {
    "plain": _layout("model.layers", "self_attn", _PLAIN, "mlp.gate_proj mlp.up_proj mlp.down_proj"),
    "no_gate": _layout("model.layers", "self_attn", _PLAIN, "mlp.up_proj mlp.down_proj"),
    "fused": _layout("model.layers", "self_attn", "qkv_proj o_proj", "[mlp.gate_up_proj] mlp.down_proj"),
    "glm": _layout("model.layers", "self_attn", _PLAIN, "[mlp.gate_up_proj] mlp.down_proj"),
    "phi": _layout("model.layers", "self_attn", "q_proj k_proj v_proj dense", "mlp.fc1 mlp.fc2"),
    "nanochat": _layout("model.layers", "self_attn", _PLAIN, "mlp.fc1 mlp.fc2"),
    "starcoder2": _layout("model.layers", "self_attn", _PLAIN, "mlp.c_fc mlp.c_proj"),
    "opt": _layout("model.decoder.layers", "self_attn", _OUT, "fc1 fc2", "dropout"),
    "gpt_neox": _layout(
        "gpt_neox.layers", "attention", "query_key_value dense", "mlp.dense_h_to_4h mlp.dense_4h_to_h", interleaved=True
    ),
    "persimmon": _layout(
        "model.layers",
        "self_attn",
        "query_key_value dense",
        "mlp.dense_h_to_4h mlp.dense_4h_to_h",
        "config.attention_dropout",
        interleaved=True,
    ),
    "falcon": _layout(
        _H, "self_attention", "query_key_value dense", "mlp.dense_h_to_4h mlp.dense_4h_to_h", interleaved=True
    ),
    "gpt2": _layout(_H, "attn", "c_attn c_proj", "mlp.c_fc mlp.c_proj", "attn_dropout", transposed=True),
    "gpt_bigcode": _layout(_H, "attn", "c_attn c_proj", "mlp.c_fc mlp.c_proj", "attn_dropout", interleaved=True),
    "gptj": _layout(_H, "attn", _OUT, "mlp.fc_in mlp.fc_out", "attn_dropout"),
    "gpt_neo": _layout(_H, "attn.attention", _OUT, "mlp.c_fc mlp.c_proj", "attn_dropout"),
    "mpt": _layout("transformer.blocks", "attn", "Wqkv out_proj", "ffn.up_proj ffn.down_proj", "attn_dropout_p"),
    "lfm2": _layout("model.layers", "self_attn", _OUT, "feed_forward.w1 feed_forward.w3 feed_forward.w2"),
    "feed_forward": _layout(
        "model.layers", "self_attn", _PLAIN, "feed_forward.gate_proj feed_forward.up_proj feed_forward.down_proj"
    ),
    "granite_hybrid": _layout(
        "model.layers", "self_attn", _PLAIN, "[shared_mlp.input_linear] shared_mlp.output_linear"
    ),
}


def _module_meant(name: str, known: Sequence[str]) -> str:
    """As `did_you_mean`, where `up` is short for up_proj, as regions are printed."""
    return f"; did you mean '{name}_proj'?" if f"{name}_proj" in known else did_you_mean(name, known)


def expand_modules(
    names: Iterable[str], available: tuple[str, ...] = MODULES, key: str | None = None
) -> tuple[str, ...]:
    """Resolve groups (mha, ffn, all) to module names, in the layer's own order, each once.

    Args:
        available: the modules that the model has. A group stands for those of its modules that there are.
        key: the config's key that names them, for the message.

    Raises:
        RegionError: a name is neither a module nor a group, or the model has no such module.
    """
    known = [*MODULES, EXPERTS, *GROUPS]
    where = f"{key}: " if key else ""
    requested: set[str] = set()
    for name in names:
        if name not in known:
            raise RegionError(
                f"{where}'{name}' names no module{_module_meant(name, known)} (modules: {', '.join(available)}; "
                f"groups: {', '.join(GROUPS)})"
            )
        if name not in GROUPS and name not in available:
            raise RegionError(f"{where}this model has no '{name}' (its modules: {', '.join(available)})")
        requested.update(GROUPS.get(name, (name,)))
    return tuple(m for m in available if m in requested)
