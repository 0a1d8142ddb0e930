"""What a model is made of: the layout of its decoder layers, and the sizes that units are counted by."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from cofitune.errors import UserError
from cofitune.model.describe import how_to_describe, linear_modules, what_is_there
from cofitune.model.folder import ODD_FILE, check_folder, first_line
from cofitune.model.kind import auto_class, check_causal, check_kind
from cofitune.model.layouts import ATTENTION, EXPERTS, FFN, MODULES, Layout
from cofitune.model.norms import has_known_norms
from cofitune.model.other_folders import is_missing_folder
from cofitune.model.recognise import choose_layout, find_experts, names_in_files, true_shape
from cofitune.model.sizes import Sizes, number, read_sizes

OLDEST_TRANSFORMERS = (5, 23)  # as pyproject.toml asks for
MOST_PARTS = 10_000  # layers or experts: each of them is built before its shape is known
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")


@dataclass(frozen=True)
class Anatomy:
    """One model. L layers, A attention heads, K key/value heads, D width of a head, F FFN neurons, H hidden.

    Attributes:
        sizes: A, K, D and F of each layer.
        num_parameters: all weights of the model, tied ones counted once.
        shapes: name of every parameter → its shape.
        tied: second names of tied parameters → the name in `shapes` (the head's, where it is the embedding).
        written: names in weight files that are not the model's own → the name in `shapes`.
        embedding, head: names in `shapes` of the input embedding's and the head's weight.
        prefix: how the names in `shapes` begin that some weight files write without it (GPT-2's `transformer.`).
        linear: names of the weights of all linear modules in the layers, those of no known unit included.
        converted: names in `shapes` of what weight files hold otherwise (one tensor of all experts in parts, mostly) →
            the names, itself among them, that make up the same tensors there and can be written only together.
        experts: path, below a layer, of the module that holds all experts of a layer; empty where there is none.
        num_experts, experts_per_token: of a layer that has any; those that a token passes through.
        can_recompute: whether it can recompute activations in the backward pass.
        fuses_attention: whether its attention, as transformers chooses it, is a fused kernel, which keeps no scores.
        known_norms: whether all its RMSNorms have a form of `cofitune.model.norms`, and keep less when they train.
        unknown: of which modules the units are not known, and why; empty where all are known.
        proposal: how to describe those; empty where all are known.
    """

    model_type: str
    layout: Layout
    sizes: tuple[Sizes, ...]
    hidden_size: int
    vocab_size: int
    num_parameters: int
    shapes: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    written: dict[str, str]
    embedding: str
    head: str | None
    prefix: str
    linear: tuple[str, ...] = ()
    converted: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    experts: str = ""
    num_experts: int = 0
    experts_per_token: int = 0
    can_recompute: bool = True
    fuses_attention: bool = True
    known_norms: bool = False
    unknown: str = ""
    proposal: str = ""

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.sizes)

    @property
    def num_heads(self) -> int:
        """Attention heads of a layer, where layers differ the most."""
        return max((size.num_heads for size in self.sizes), default=0)

    @property
    def num_key_value_heads(self) -> int:
        """Key/value heads of a layer, where layers differ the most."""
        return max((size.num_key_value_heads for size in self.sizes), default=0)

    @property
    def head_dim(self) -> int:
        """Width of a head, where layers differ the most."""
        return max((size.head_dim for size in self.sizes), default=0)

    @property
    def intermediate_size(self) -> int:
        """FFN neurons of a layer, where layers differ the most."""
        return max((size.intermediate_size for size in self.sizes), default=0)

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that a layer has, in its own order; where layers differ, those that any has."""
        linear = tuple(module for module in MODULES if module in self.layout.modules)
        return (*linear, EXPERTS) if self.experts else linear

    @property
    def is_whole(self) -> bool:
        """Whether each layer has all of the modules."""
        return all(self.has(layer, module) for layer in range(self.num_layers) for module in self.modules)

    def has(self, layer: int, module: str) -> bool:
        """Whether a layer has a module."""
        if module == EXPERTS:
            return any(True for _ in self._of_experts(layer))
        path = self.layout.modules.get(module)
        return path is not None and f"{self.layout.layers}.{layer}.{path}.weight" in self.shapes

    def check_units(self, what: str) -> None:
        """Refuse what needs modules that are known by their units.

        Args:
            what: what needs them, as the config calls it.

        Raises:
            UserError: none is known.
        """
        if not self.modules:
            raise UserError(
                f"{what} needs heads and neurons, and in model type {self.model_type} {self.unknown}. What needs none: "
                "region.match, full fine-tuning (region: {match: '.*'}), an adapter on all-linear. " + self.proposal
            )

    @property
    def aliases(self) -> dict[str, str]:
        """Every other name that a weight file may have for a parameter → its name in `shapes`."""
        return {**self.tied, **self.written}

    @property
    def row_axis(self) -> int:
        """The axis of a weight that its rows, one an output, lie along: 0, or 1 where weights are transposed."""
        return 1 if self.layout.transposed else 0

    def parameter_names(self, layer: int, module: str) -> Iterator[str]:
        """Yield the names of the weight and, where there is one, the bias that hold a module, fused or alone.

        Of experts these are all that the module with all of them has.
        """
        if module == EXPERTS:
            yield from self._of_experts(layer)
            return
        for kind in ("weight", "bias"):
            name = f"{self.layout.layers}.{layer}.{self.layout.modules[module]}.{kind}"
            if name in self.shapes:
                yield name

    def _of_experts(self, layer: int) -> Iterator[str]:
        """The tensors that hold a layer's experts, [experts, …] each."""
        start = f"{self.layout.layers}.{layer}.{self.experts}."
        for name in self.shapes if self.experts else ():
            if name.startswith(start) and "." not in name.removeprefix(start):
                yield name

    def num_rows(self, layer: int, module: str) -> int:
        """A module's own outputs; of experts, how many there are."""
        size = self.sizes[layer]
        return {
            EXPERTS: self.num_experts,
            "q_proj": size.num_heads * size.head_dim,
            "k_proj": size.num_key_value_heads * size.head_dim,
            "v_proj": size.num_key_value_heads * size.head_dim,
            "gate_proj": size.intermediate_size,
            "up_proj": size.intermediate_size,
        }.get(module, self.hidden_size)

    def num_columns(self, layer: int, module: str) -> int:
        """A linear module's inputs in a layer; 0 where it has no such module."""
        size = self.sizes[layer]
        own = {"o_proj": size.num_heads * size.head_dim, "down_proj": size.intermediate_size}
        return own.get(module, self.hidden_size) if self.has(layer, module) else 0

    def num_rows_of_tensor(self, layer: int, module: str) -> int:
        """Outputs of the tensor that a module lies in, those of the modules that it is fused with included."""
        return sum(self.num_rows(layer, part) for part in self.layout.parts(module))

    def rows(self, layer: int, module: str) -> Tensor:
        """Where a module's own rows, in their order, lie among those of its tensor; int64 [rows of the module]."""
        parts, size = self.layout.parts(module), self.sizes[layer]
        if self.layout.interleaved and len(parts) == 3:
            heads = torch.arange(self.num_rows_of_tensor(layer, module)).view(
                size.num_key_value_heads, -1, size.head_dim
            )  # [K, A/K + 2, D]
            cut = {"q_proj": slice(-2), "k_proj": slice(-2, -1), "v_proj": slice(-1, None)}[module]
            return heads[:, cut].flatten()
        start = sum(self.num_rows(layer, part) for part in parts[: parts.index(module)])
        return torch.arange(start, start + self.num_rows(layer, module))


def read_anatomy(config: PretrainedConfig, trust_remote_code: bool = False, described: Layout | None = None) -> Anatomy:
    """Describe a model from its configuration alone: it is built on the meta device, no weight is read.

    Args:
        described: its layout, where the config's `model.anatomy` gives one; None: one of the table.

    Raises:
        UserError: it is no causal language model, or its layout is not as described.
    """
    check_kind(config)
    model = build_empty(config, trust_remote_code)
    check_causal(model)
    return anatomy_of(model, described)


def build_empty(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a config without weights, on the meta device.

    Raises:
        UserError: transformers cannot build it, or would build without end.
    """
    _check_counts(config)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    except ODD_FILE as error:
        reason = first_line(error)
        if package := re.search(
            r"requires the (\S+) library", reason
        ):  # transformers' words, of an image encoder mostly
            raise UserError(
                f"model.name: model type {config.model_type} needs the package {package[1]}, which is not installed: "
                f"pip install {package[1]}"
            ) from error
        raise UserError(f"model.name: model type {config.model_type} cannot be built: {reason}") from error
    return model


def _check_counts(config: PretrainedConfig) -> None:
    """Refuse a damaged config.json with so many layers or experts that building them would not end.

    Raises:
        UserError: it names the entry.
    """
    for name, value in config.get_text_config().to_dict().items():
        counts = ("layer" in name or "expert" in name) and not ("size" in name or "dim" in name)
        if counts and isinstance(value, int) and value > MOST_PARTS:
            raise UserError(f"model.name: config.json: {name} is above {MOST_PARTS:,}, as in no model; is it damaged?")


def anatomy_of(model: PreTrainedModel, described: Layout | None = None) -> Anatomy:
    """Describe a model in memory. Shapes are true also under ZeRO-3, where a parameter has no elements of its own.

    A layout that is not known leaves the model without modules that have units: it trains by names, or by an adapter.

    Raises:
        UserError: the model's layout is not as described.
    """
    recognised = choose_layout(model, described)
    layout, problems = recognised.layout, [recognised.unknown] * bool(recognised.unknown)
    anatomy = _measure(model, layout)
    for group in (ATTENTION, FFN):
        problem = _odd_shape(anatomy, group)
        if problem and described is not None:
            raise UserError(f"model.anatomy: model type {anatomy.model_type}: {problem}; {what_is_there(model)}")
        if problem:
            problems.append(problem)
            layout = layout.only(set(layout.modules) - set(group))
    if layout != anatomy.layout:
        anatomy = _measure(model, layout)
    return replace(anatomy, unknown="; and ".join(problems), proposal=how_to_describe(model)) if problems else anatomy


def _measure(model: PreTrainedModel, layout: Layout) -> Anatomy:
    """The sizes of a model of this layout."""
    config = model.config.get_text_config(decoder=True)
    parameters = dict(model.named_parameters())
    shapes = {name: true_shape(p) for name, p in parameters.items()}
    names = {id(p): name for name, p in parameters.items()}
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    layers = model.get_submodule(layout.layers) if layout.layers else nn.ModuleList()
    written, converted = names_in_files(model)
    experts, num_experts = find_experts(layers) if isinstance(layers, nn.ModuleList) else ("", 0)
    width, hidden = true_shape(embedding)
    hidden = number(config, "hidden_size") or hidden
    return Anatomy(
        model_type=model.config.model_type,
        layout=layout,
        sizes=read_sizes(config, layout, layers, hidden),
        hidden_size=hidden,
        vocab_size=number(config, "vocab_size") or width,
        num_parameters=sum(math.prod(shape) for shape in shapes.values()),
        shapes=shapes,
        tied={n: names[id(p)] for n, p in model.named_parameters(remove_duplicate=False) if n not in parameters},
        written=written,
        converted=converted,
        experts=experts,
        num_experts=num_experts,
        experts_per_token=max([min(1, num_experts), *(number(config, name) for name in EXPERTS_PER_TOKEN)]),
        can_recompute=model.supports_gradient_checkpointing,
        fuses_attention=getattr(config, "_attn_implementation", None) != "eager",
        known_norms=has_known_norms(model),
        embedding=names[id(embedding)],
        head=None if head is None else names.get(id(head.weight)),
        prefix=f"{model.base_model_prefix}.",
        linear=tuple(
            name
            for index, layer in enumerate(layers)
            for path in linear_modules(layer)
            if (name := f"{layout.layers}.{index}.{path}.weight") in shapes
        ),
    )


def read_model_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read a model's configuration from a folder or the hub.

    Raises:
        UserError: there is no such folder or hub model, or its config.json cannot be used; or the installed
            transformers is too old.
    """
    _check_transformers()
    folder = Path(name)
    if is_missing_folder(name) and not folder.is_file():
        raise UserError(f"model.name: {name}: no such folder")
    if folder.exists():
        check_folder(folder, name)
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except ODD_FILE as error:
        reason = first_line(error)
        if "custom code" in reason:  # transformers' words
            raise UserError(
                f"model.name: {name} brings code of its own, which is not run unasked: look at it, then say "
                "model.trust_remote_code: true (on the command line of convert, export and chat: --trust-remote-code)"
            ) from error
        raise UserError(
            f"model.name: {name} is neither a folder with a config.json nor a hub model: {reason}"
        ) from error


def _check_transformers() -> None:
    """pip tells only once where another package's requirement (vLLM's) puts an older one in its place."""
    if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
        raise UserError(
            f"transformers {transformers.__version__} is installed, and cofitune needs {oldest} or later: under older "
            f"ones conversations of a pack see each other in some families. pip install 'transformers>={oldest}'"
        )


def _odd_shape(anatomy: Anatomy, group: tuple[str, ...]) -> str:
    """Compare the weights of a group's modules with what their units say: the right path with other contents is another
    layout. Returns what is wrong, or nothing."""
    layout = anatomy.layout
    modules = [module for module in anatomy.modules if module in group]
    how = "; num_heads, num_key_value_heads and head_dim may be given in model.anatomy" if group == ATTENTION else ""
    for layer, size in enumerate(anatomy.sizes):
        heads, groups = size.num_heads, size.num_key_value_heads
        sizes = (
            f"{heads} heads and {groups} key/value heads of width {size.head_dim}" if group == ATTENTION else "its FFN"
        )
        here = [module for module in modules if anatomy.has(layer, module)]
        if here and group == ATTENTION and (not groups or heads % groups):
            return f"{sizes} do not divide evenly{how}"
        width = {"o_proj": heads * size.head_dim, "down_proj": size.intermediate_size}
        for module in here:
            expected = (anatomy.num_rows_of_tensor(layer, module), width.get(module, anatomy.hidden_size))
            name = f"{layout.layers}.{layer}.{layout.modules[module]}.weight"
            result = anatomy.shapes[name]
            if (result[::-1] if layout.transposed else result) != expected:
                return (
                    f"with {sizes}, {name} should then hold {' + '.join(layout.parts(module))} as {list(expected)}, "
                    f"and is {list(result)}{how}"
                )
    return ""
