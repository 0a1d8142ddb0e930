"""What a decoder layer is made of: where the modules of a region live, and the sizes that units are counted by.

One layout is known so far, the plain one of Llama, Mistral, Qwen 2/3, Gemma, OLMo and SmolLM: seven separate linear
modules a layer. A model that does not have it is refused by name, never guessed at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from cofitune.errors import RegionError, UserError, did_you_mean

LAYERS = "model.layers"
MODULE_PATHS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
GROUPS = {
    "mha": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "ffn": ("gate_proj", "up_proj", "down_proj"),
    "all": tuple(MODULE_PATHS),
}


@dataclass(frozen=True)
class Anatomy:
    """Sizes of one model. L layers, A attention heads, K key/value heads, D width of a head, F FFN neurons, H hidden.

    Attributes:
        num_parameters: all weights of the model, tied ones counted once.
        shapes: name of every parameter → its shape.
    """

    model_type: str
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    hidden_size: int
    vocab_size: int
    num_parameters: int
    shapes: dict[str, tuple[int, ...]]

    def parameter_names(self, layer: int, module: str) -> Iterator[str]:
        """Yield the names of a module's weight and, where it has one, bias."""
        for kind in ("weight", "bias"):
            name = f"{LAYERS}.{layer}.{MODULE_PATHS[module]}.{kind}"
            if name in self.shapes:
                yield name


def read_anatomy(config: PretrainedConfig, trust_remote_code: bool = False) -> Anatomy:
    """Describe a model from its configuration alone: it is built on the meta device, no weight is read.

    Raises:
        UserError: it is no causal language model, or not laid out as seven linear modules a layer.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model.name: model type {config.model_type} cannot be built: {reason}") from error
    return anatomy_of(model)


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """Describe a model in memory. Shapes are true also under ZeRO-3, where a parameter has no elements of its own."""
    config = model.config
    modules = dict(model.named_modules())
    _check_layout(config.model_type, modules)
    heads = config.num_attention_heads
    shapes = {name: true_shape(p) for name, p in model.named_parameters()}
    return Anatomy(
        model_type=config.model_type,
        num_layers=len(model.get_submodule(LAYERS)),
        num_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate_size=config.intermediate_size,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_parameters=sum(math.prod(shape) for shape in shapes.values()),
        shapes=shapes,
    )


def expand_modules(modules: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """Resolve groups (mha, ffn, all) to module names, in the layer's own order, each once.

    Raises:
        RegionError: a name is neither a module nor a group.
    """
    known = [*MODULE_PATHS, *GROUPS]
    wanted: set[str] = set()
    for name in modules:
        if name not in known:
            raise RegionError(
                f"'{name}' names no module{did_you_mean(name, known)} (modules: {', '.join(MODULE_PATHS)}; "
                f"groups: {', '.join(GROUPS)})"
            )
        wanted.update(GROUPS.get(name, (name,)))
    return tuple(m for m in MODULE_PATHS if m in wanted)


def true_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The whole parameter's shape; under ZeRO-3 `shape` is [0] outside a gather and DeepSpeed keeps the true one."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def read_model_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read a model's configuration from a folder or the hub.

    Raises:
        UserError: there is no such folder or hub model, or its config.json cannot be used.
    """
    if is_missing_folder(name):
        raise UserError(f"model.name: {name}: no such folder")
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.name: {name} is neither a folder with a config.json nor a hub model: {reason}"
        ) from error


def is_missing_folder(name: str) -> bool:
    """Whether a model's name can only be a folder's, and there is none: the hub would be asked in vain, and again."""
    return not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1)


def _check_layout(model_type: str, modules: dict[str, nn.Module]) -> None:
    experts = sorted({name.rsplit(".", 1)[-1] for name in modules if name.endswith((".experts", ".moe"))})
    if experts:
        raise UserError(f"model type {model_type} has expert layers ({', '.join(experts)}): not supported yet")
    layers = modules.get(LAYERS)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise UserError(f"model type {model_type} keeps no layers under '{LAYERS}': this layout is not supported yet")
    for index in range(len(layers)):
        missing = [p for p in MODULE_PATHS.values() if not isinstance(modules.get(f"{LAYERS}.{index}.{p}"), nn.Linear)]
        if missing:
            raise UserError(
                f"model type {model_type} has no linear module {', '.join(missing)} in layer {index}: fused or renamed "
                "projections are not supported yet"
            )
