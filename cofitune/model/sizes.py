"""The sizes that a layer's units are counted by: of all layers or of each, as the config and the weights say."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from cofitune.model.layouts import Layout
from cofitune.model.recognise import true_shape


@dataclass(frozen=True)
class Sizes:
    """Of one layer: A attention heads, K key/value heads, D width of a head, F FFN neurons; 0 where none is known."""

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int


def read_sizes(config: PretrainedConfig, layout: Layout, layers: nn.Module, hidden: int) -> tuple[Sizes, ...]:
    """The sizes of every layer.

    Args:
        config: the text model's.
        hidden: width of the hidden states, from which the width of a head follows where the config does not say it.
    """
    modules = list(layers.children())
    each = [config] * len(modules)
    if config.is_heterogeneous and len(config.per_layer_config) == len(modules):
        each = list(config.per_layer_config)
    return tuple(_of(each[i], layout, module, i, hidden) for i, module in enumerate(modules))


def number(config: PretrainedConfig, name: str, layer: int = 0) -> int:
    """A size of the config, of a layer where it lists one each; 0 where it has none, or one a layer in another way."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers' word for a size that differs from layer to layer
        return 0
    if isinstance(value, list | tuple) and layer < len(value):
        value = value[layer]
    return value if isinstance(value, int) else 0


def _of(config: PretrainedConfig, layout: Layout, module: nn.Module, layer: int, hidden: int) -> Sizes:
    heads = layout.num_heads or number(config, "num_attention_heads", layer)
    return Sizes(
        num_heads=heads,
        num_key_value_heads=layout.num_key_value_heads or _key_value_heads(config, layer) or heads,
        head_dim=layout.head_dim or number(config, "head_dim", layer) or (hidden // heads if heads else 0),
        intermediate_size=_ffn_width(module, layout) or number(config, "intermediate_size", layer),
    )


def _key_value_heads(config: PretrainedConfig, layer: int) -> int:
    """Key/value heads; Falcon's and GPT-BigCode's `multi_query` is one of them."""
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    return number(config, "num_key_value_heads", layer) or number(config, "num_kv_heads", layer)


def _ffn_width(layer: nn.Module, layout: Layout) -> int:
    """FFN neurons of a layer, by its weights; 0 where it has no FFN of the layout."""
    path = layout.modules.get("down_proj")
    down = dict(layer.named_modules()).get(path) if path else None
    weight = getattr(down, "weight", None)
    return 0 if weight is None else true_shape(weight)[0 if layout.transposed else 1]
