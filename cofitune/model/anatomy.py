"""What a model is made of: the layout of its decoder layers, and the sizes that units are counted by."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from cofitune.errors import UserError
from cofitune.model.folder import ODD_FILE, first_line, read_object, refuse_adapter
from cofitune.model.layouts import MODULES, Layout
from cofitune.model.recognise import choose_layout, how_to_describe, names_in_files, true_shape


@dataclass(frozen=True)
class Anatomy:
    """One model. L layers, A attention heads, K key/value heads, D width of a head, F FFN neurons, H hidden.

    Attributes:
        num_parameters: all weights of the model, tied ones counted once.
        shapes: name of every parameter → its shape.
        tied: second names of tied parameters → the name in `shapes` (the head's, where it is the embedding).
        written: names in weight files that are not the model's own → the name in `shapes`.
        embedding, head: names in `shapes` of the input embedding's and the head's weight.
        prefix: how the names in `shapes` begin that some weight files write without it (GPT-2's `transformer.`).
    """

    model_type: str
    layout: Layout
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    hidden_size: int
    vocab_size: int
    num_parameters: int
    shapes: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    written: dict[str, str]
    embedding: str
    head: str | None
    prefix: str

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that a layer has, in its own order."""
        return tuple(module for module in MODULES if module in self.layout.modules)

    @property
    def aliases(self) -> dict[str, str]:
        """Every other name that a weight file may have for a parameter → its name in `shapes`."""
        return {**self.tied, **self.written}

    @property
    def row_axis(self) -> int:
        """The axis of a weight that its rows, one an output, lie along: 0, or 1 where weights are transposed."""
        return 1 if self.layout.transposed else 0

    def parameter_names(self, layer: int, module: str) -> Iterator[str]:
        """Yield the names of the weight and, where there is one, the bias that hold a module, fused or alone."""
        for kind in ("weight", "bias"):
            name = f"{self.layout.layers}.{layer}.{self.layout.modules[module]}.{kind}"
            if name in self.shapes:
                yield name

    def num_rows(self, module: str) -> int:
        """A module's own outputs."""
        return {
            "q_proj": self.num_heads * self.head_dim,
            "k_proj": self.num_key_value_heads * self.head_dim,
            "v_proj": self.num_key_value_heads * self.head_dim,
            "gate_proj": self.intermediate_size,
            "up_proj": self.intermediate_size,
        }.get(module, self.hidden_size)

    def num_rows_of_tensor(self, module: str) -> int:
        """Outputs of the tensor that a module lies in, those of the modules that it is fused with included."""
        return sum(map(self.num_rows, self.layout.parts(module)))

    def rows(self, module: str) -> Tensor:
        """Where a module's own rows, in their order, lie among those of its tensor; int64 [rows of the module]."""
        parts = self.layout.parts(module)
        if self.layout.interleaved and len(parts) == 3:
            heads = torch.arange(self.num_rows_of_tensor(module)).view(
                self.num_key_value_heads, -1, self.head_dim
            )  # [K, A/K + 2, D]
            cut = {"q_proj": slice(-2), "k_proj": slice(-2, -1), "v_proj": slice(-1, None)}[module]
            return heads[:, cut].flatten()
        start = sum(map(self.num_rows, parts[: parts.index(module)]))
        return torch.arange(start, start + self.num_rows(module))


def read_anatomy(config: PretrainedConfig, trust_remote_code: bool = False, described: Layout | None = None) -> Anatomy:
    """Describe a model from its configuration alone: it is built on the meta device, no weight is read.

    Args:
        described: its layout, where the config's `model.anatomy` gives one; None: one of the table.

    Raises:
        UserError: it is no causal language model, or its layout is unknown or not as described.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ODD_FILE as error:
        reason = first_line(error)
        raise UserError(f"model.name: model type {config.model_type} cannot be built: {reason}") from error
    return anatomy_of(model, described)


def anatomy_of(model: PreTrainedModel, described: Layout | None = None) -> Anatomy:
    """Describe a model in memory. Shapes are true also under ZeRO-3, where a parameter has no elements of its own.

    Raises:
        UserError: the model's layout is unknown, or not as described.
    """
    layout = choose_layout(model, described)
    config = model.config
    heads = layout.num_heads or config.num_attention_heads
    parameters = dict(model.named_parameters())
    shapes = {name: true_shape(p) for name, p in parameters.items()}
    names = {id(p): name for name, p in parameters.items()}
    head = model.get_output_embeddings()
    layers = model.get_submodule(layout.layers)
    down = layers[0].get_submodule(layout.modules["down_proj"]).weight
    anatomy = Anatomy(
        model_type=config.model_type,
        layout=layout,
        num_layers=len(layers),
        num_heads=heads,
        num_key_value_heads=layout.num_key_value_heads or getattr(config, "num_key_value_heads", None) or heads,
        head_dim=layout.head_dim or getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate_size=true_shape(down)[0 if layout.transposed else 1],
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_parameters=sum(math.prod(shape) for shape in shapes.values()),
        shapes=shapes,
        tied={n: names[id(p)] for n, p in model.named_parameters(remove_duplicate=False) if n not in parameters},
        written=names_in_files(model),
        embedding=names[id(model.get_input_embeddings().weight)],
        head=None if head is None else names[id(head.weight)],
        prefix=f"{model.base_model_prefix}.",
    )
    _check_shapes(model, anatomy)
    return anatomy


def read_model_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read a model's configuration from a folder or the hub.

    Raises:
        UserError: there is no such folder or hub model, or its config.json cannot be used.
    """
    if is_missing_folder(name):
        raise UserError(f"model.name: {name}: no such folder")
    folder = Path(name)
    if folder.is_dir():
        refuse_adapter(folder, name)
        if (folder / "config.json").is_file():
            read_object(folder / "config.json", "model config")
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except ODD_FILE as error:
        reason = first_line(error)
        raise UserError(
            f"model.name: {name} is neither a folder with a config.json nor a hub model: {reason}"
        ) from error


def is_missing_folder(name: str) -> bool:
    """Whether a model's name can only be a folder's, and there is none: the hub would be asked in vain, and again."""
    return not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1)


def _check_shapes(model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Compare every module's weight with what its units say: the right path with other contents is another layout."""
    layout = anatomy.layout
    width = {"o_proj": anatomy.num_heads * anatomy.head_dim, "down_proj": anatomy.intermediate_size}
    sizes = f"{anatomy.num_heads} heads, {anatomy.num_key_value_heads} key/value heads of width {anatomy.head_dim}"
    problem = "" if anatomy.num_heads % anatomy.num_key_value_heads == 0 else "they do not divide evenly"
    for layer in range(anatomy.num_layers):
        for module in anatomy.modules:
            parts = layout.parts(module)
            expected = (anatomy.num_rows_of_tensor(module), width.get(module, anatomy.hidden_size))
            name = f"{layout.layers}.{layer}.{layout.modules[module]}.weight"
            result = anatomy.shapes[name]
            if (result[::-1] if layout.transposed else result) != expected and not problem:
                problem = f"{name} should then hold {' + '.join(parts)} as {list(expected)}, and is {list(result)}"
    if problem:
        raise UserError(
            f"model type {anatomy.model_type} looks like a layout that cofitune knows, with {sizes}, but {problem}. "
            "num_heads, num_key_value_heads and head_dim may be given in model.anatomy. " + how_to_describe(model)
        )
