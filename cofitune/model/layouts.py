"""How decoder layers are laid out, as data: where each module of a region lives, and what is fused with what.

A layout is chosen by what a model *has*, never by its family's name. One that is not in the table can be described in
the config (`model.anatomy`) by the same fields.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cofitune.errors import RegionError, did_you_mean

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GROUPS = {"mha": MODULES[:4], "ffn": MODULES[4:], "all": MODULES}


@dataclass(frozen=True)
class Layout:
    """Where a decoder layer keeps the modules of a region.

    Attributes:
        layers: path of the list of decoder layers, below the model.
        modules: module → path of its linear module, below a layer. Modules of one path are fused: parts of one weight,
            in the order written here. An FFN without a gate has no `gate_proj`.
        attention: path, below a layer, of the module that drops attention probabilities.
        attention_dropout: its attribute with their probability, a number or an `nn.Dropout`.
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
        return tuple(other for other, path in self.modules.items() if path == self.modules[module])


FAMILIES = {  # layout → models that have it
    "plain": "Llama, Mistral, SmolLM, OLMo, Qwen 2/2.5/3, Gemma 1-3 (text)",
    "fused": "Phi-3",
    "gpt_neox": "GPT-NeoX, Pythia",
    "gpt2": "GPT-2",
}
LAYOUTS = {
    "plain": Layout(
        layers="model.layers",
        modules={
            "q_proj": "self_attn.q_proj",
            "k_proj": "self_attn.k_proj",
            "v_proj": "self_attn.v_proj",
            "o_proj": "self_attn.o_proj",
            "gate_proj": "mlp.gate_proj",
            "up_proj": "mlp.up_proj",
            "down_proj": "mlp.down_proj",
        },
        attention="self_attn",
    ),
    "fused": Layout(
        layers="model.layers",
        modules={
            "q_proj": "self_attn.qkv_proj",
            "k_proj": "self_attn.qkv_proj",
            "v_proj": "self_attn.qkv_proj",
            "o_proj": "self_attn.o_proj",
            "gate_proj": "mlp.gate_up_proj",
            "up_proj": "mlp.gate_up_proj",
            "down_proj": "mlp.down_proj",
        },
        attention="self_attn",
    ),
    "gpt_neox": Layout(
        layers="gpt_neox.layers",
        modules={
            "q_proj": "attention.query_key_value",
            "k_proj": "attention.query_key_value",
            "v_proj": "attention.query_key_value",
            "o_proj": "attention.dense",
            "up_proj": "mlp.dense_h_to_4h",
            "down_proj": "mlp.dense_4h_to_h",
        },
        attention="attention",
        interleaved=True,
    ),
    "gpt2": Layout(
        layers="transformer.h",
        modules={
            "q_proj": "attn.c_attn",
            "k_proj": "attn.c_attn",
            "v_proj": "attn.c_attn",
            "o_proj": "attn.c_proj",
            "up_proj": "mlp.c_fc",
            "down_proj": "mlp.c_proj",
        },
        attention="attn",
        attention_dropout="attn_dropout",
        transposed=True,
    ),
}


def expand_modules(names: Iterable[str], available: tuple[str, ...] = MODULES) -> tuple[str, ...]:
    """Resolve groups (mha, ffn, all) to module names, in the layer's own order, each once.

    Args:
        available: the modules that the model has. A group stands for those of its modules that there are.

    Raises:
        RegionError: a name is neither a module nor a group, or the model has no such module.
    """
    known = [*MODULES, *GROUPS]
    requested: set[str] = set()
    for name in names:
        if name not in known:
            raise RegionError(
                f"'{name}' names no module{did_you_mean(name, known)} (modules: {', '.join(available)}; "
                f"groups: {', '.join(GROUPS)})"
            )
        if name in MODULES and name not in available:
            raise RegionError(f"this model has no '{name}' (its modules: {', '.join(available)})")
        requested.update(GROUPS.get(name, (name,)))
    return tuple(m for m in available if m in requested)
