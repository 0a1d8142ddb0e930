"""Virtual gates on an unmodified model: each unit's output is multiplied by 1, and that 1 receives a gradient.

CoFiTune, Figure 2 (arXiv 2404.10306): a module's output o becomes g ⊙ o with g = 1. The units are a layer's attention
heads (gate on each head's output, the input of `o_proj`), FFN neurons (on the input of `down_proj`), FFN output
channels (on `down_proj`'s output) and, in a mixture, experts (on each one's output, by the weight that the router gives
it). Dropout acts on the attention probabilities and, after the gate, on the output of the FFN or of the experts.

The paper's neuron gate is on `up_proj`'s output. Where the FFN has a gate that is the same: (g ⊙ up) ⊙ act(gate) =
g ⊙ (up ⊙ act(gate)). On the input of `down_proj` it is also right for fused weights, and where there is no gate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from cofitune.errors import UserError
from cofitune.importance.sparse_dropout import SparseDropout
from cofitune.importance_file import ATTENTION_HEADS, EXPERTS, FFN_NEURONS, FFN_OUTPUTS, layer_units, unit_counts
from cofitune.model.anatomy import Anatomy, anatomy_of
from cofitune.training.autograd import Context

Gates = dict[str, tuple[Tensor, ...]]
SEEDED_KERNELS = ("eager", "sdpa", "flash_attention_2")  # attention implementations whose dropout torch's seeds govern


class VirtualGates:
    """The gates of the micro-batch at hand, which the model's hooks read.

    Attributes:
        current: each unit kind → L leaf tensors of shape [B, units], fp32; no units where a layer has none. A row a
            sample: the sum over B is the gradient of one shared gate, and per-sample gradients stay available.
    """

    def __init__(self, anatomy: Anatomy, device: torch.device) -> None:
        self._counts = {kind: layer_units(anatomy, kind) for kind in unit_counts(anatomy)}
        self._device = device
        self.current: Gates = {}

    def has(self, kind: str, layer: int) -> bool:
        """Whether a layer has units of a kind; where it has none, its gates are in no place and get no gradient."""
        return kind in self._counts and self._counts[kind][layer] > 0

    def renew(self, batch_size: int) -> Gates:
        """Make the gates of a new micro-batch, all 1: nothing is left in them of the batch before."""
        self.current = {
            kind: tuple(torch.ones(batch_size, units, device=self._device, requires_grad=True) for units in counts)
            for kind, counts in self._counts.items()
        }
        return self.current


@contextmanager
def virtual_gates(model: PreTrainedModel, dropout: float, anatomy: Anatomy | None = None) -> Iterator[VirtualGates]:
    """Put gates and the method's dropout on a model, and leave it as it was found.

    Inside, every parameter is frozen and every module is in eval mode except the attention modules themselves, which
    drop attention probabilities in train mode only. So no other dropout of the model, and no activation checkpointing,
    can switch itself on.

    Args:
        model: a causal language model.
        dropout: probability p, on attention probabilities and FFN outputs.
        anatomy: the model's; None: it is in the table of layouts.

    Raises:
        UserError: the model's layout, or its attention's dropout, is not one that we know.
    """
    anatomy = anatomy or anatomy_of(model)
    anatomy.check_units("importance")
    layout = anatomy.layout
    layers = list(model.get_submodule(layout.layers))
    gates = VirtualGates(anatomy, model.device)
    training = [(module, module.training) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    attentions = _attentions(model, layers, anatomy, dropout)
    dropouts = [_get_dropout(attention, layout.attention_dropout) for attention in attentions]
    handles: list[RemovableHandle] = []
    try:
        model.eval()
        model.requires_grad_(False)
        for attention in attentions:
            attention.training = True  # not .train(), which would wake the children too
            inner = _find_dropout(attention, layout.attention_dropout)
            if isinstance(inner, nn.Dropout):  # some kernels ask the attention whether it trains, others call this
                inner.training = True
            _set_dropout(attention, layout.attention_dropout, dropout)
        for index, layer in enumerate(layers):
            handles += _hook_layer(layer, index, gates, anatomy, dropout)
        yield gates
    finally:
        for handle in handles:
            handle.remove()
        for attention, probability in zip(attentions, dropouts, strict=True):
            _set_dropout(attention, layout.attention_dropout, probability)
        for parameter, before in trained:
            parameter.requires_grad_(before)
        for module, before in training:
            module.training = before
        gates.current = {}


@contextmanager
def seeded_dropout(seed: int, micro_batch: int, pass_index: int, device: torch.device) -> Iterator[None]:
    """Draw the dropout masks of one pass from (seed, micro-batch, pass) alone; the global generators are left alone.

    Args:
        seed: the config's seed.
        micro_batch: index of the micro-batch in the whole data, whatever rank computes it.
        pass_index: 0 or 1, of a second pair 2 or 3, and so on.
        device: where the model is; its generator is seeded beside the CPU's.
    """
    words = hashlib.sha256(f"{seed}:{micro_batch}:{pass_index}".encode()).digest()  # neighbours share no stream
    number = int.from_bytes(words[:8], "big") >> 1  # torch takes 63 bits
    is_cuda = device.type == "cuda"
    sparse = nullcontext() if is_cuda else SparseDropout()  # kernels of GPUs draw as they go
    with torch.random.fork_rng(devices=[device] if is_cuda else []), sparse:
        torch.default_generator.manual_seed(number)  # torch.manual_seed would reseed other ranks' GPUs as well
        if is_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(number)
        yield


class _Gated(Context, Protocol):
    is_one: bool


class _Multiply(torch.autograd.Function):
    """output ⊙ gate, where the gate's gradient is summed in its own fp32 whatever the model computes in.

    Plain autograd would sum a bf16 model's gate gradients in bf16, or keep an fp32 copy of every gated activation. By
    a gate that is 1 nothing is multiplied.
    """

    @staticmethod
    def forward(ctx: _Gated, output: Tensor, gate: Tensor, is_one: bool) -> Tensor:
        ctx.save_for_backward(output, gate)
        ctx.is_one = is_one
        return output.view_as(output) if is_one else output * gate.to(output.dtype)

    @staticmethod
    def backward(ctx: _Gated, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (gradient,) = gradients
        output, gate = ctx.saved_tensors
        to_gate = (gradient.to(gate.dtype) * output.to(gate.dtype)).sum_to_size(gate.shape)
        if not ctx.needs_input_grad[0]:
            return None, to_gate, None
        return gradient if ctx.is_one else gradient * gate.to(gradient.dtype), to_gate, None


def _multiply(output: Tensor, gate: Tensor, is_one: bool = False) -> Tensor:
    gated: Tensor = _Multiply.apply(output, gate, is_one)  # type: ignore[no-untyped-call] # torch gives it no type
    return gated


def _multiply_rows(output: Tensor, gate: Tensor, is_one: bool = False) -> Tensor:
    """output [B, T, units] ⊙ gate [B, units]; some models (OPT) hand their FFN all rows' tokens as [B·T, units]."""
    return _multiply(output.reshape(len(gate), -1, gate.shape[1]), gate[:, None, :], is_one).view_as(output)


def _is_one(gate: Tensor) -> bool:
    """Whether a gate is as `renew` made it: nobody has written into it."""
    return bool(gate._version == 0)


def _hook_layer(
    layer: nn.Module, index: int, gates: VirtualGates, anatomy: Anatomy, dropout: float
) -> list[RemovableHandle]:
    """Hook one decoder layer's gated places."""

    def gate_heads(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        heads = inputs[0].unflatten(-1, (anatomy.sizes[index].num_heads, -1))  # [B, T, A, D]
        gate = gates.current[ATTENTION_HEADS][index]
        return (_multiply(heads, gate[:, None, :, None], _is_one(gate)).flatten(-2), *inputs[1:])

    def gate_neurons(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        gate = gates.current[FFN_NEURONS][index]
        return (_multiply_rows(inputs[0], gate, _is_one(gate)), *inputs[1:])  # [B, T, F]

    def gate_outputs(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        gate = gates.current[FFN_OUTPUTS][index]
        # what it gives may be added to in place, which torch refuses of a view: only dropout makes a tensor of its own
        gated = _multiply_rows(output, gate, dropout > 0 and _is_one(gate))  # [B, T, H]
        return nn.functional.dropout(gated, p=dropout, training=True)

    def gate_experts(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        tokens, chosen, weights = inputs  # [B·T, H], [B·T, k], [B·T, k]
        gate = gates.current[EXPERTS][index]
        sample = torch.arange(len(chosen), device=chosen.device) // (len(chosen) // len(gate))
        return tokens, chosen, _multiply(weights, gate[sample[:, None], chosen])

    def drop_outputs(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return nn.functional.dropout(output, p=dropout, training=True)

    handles = []
    if gates.has(EXPERTS, index):
        experts = layer.get_submodule(anatomy.experts)
        handles += [experts.register_forward_pre_hook(gate_experts), experts.register_forward_hook(drop_outputs)]
    if gates.has(ATTENTION_HEADS, index):
        handles += [layer.get_submodule(anatomy.layout.modules["o_proj"]).register_forward_pre_hook(gate_heads)]
    if gates.has(FFN_NEURONS, index):
        down = layer.get_submodule(anatomy.layout.modules["down_proj"])
        handles += [down.register_forward_pre_hook(gate_neurons), down.register_forward_hook(gate_outputs)]
    return handles


def _find_dropout(attention: nn.Module | None, name: str) -> Any:
    """An attribute of an attention module, or with a dot in its name (`config.attention_dropout`) of an attribute."""
    value: object = attention
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def _get_dropout(attention: nn.Module, name: str) -> float:
    value = _find_dropout(attention, name)
    return float(value.p if isinstance(value, nn.Dropout) else value)


def _set_dropout(attention: nn.Module, name: str, probability: float) -> None:
    """Set the probability that an attention module hands to its kernel while it is in train mode."""
    value = _find_dropout(attention, name)
    if isinstance(value, nn.Dropout):
        value.p = probability
    else:
        outer, _, last = name.rpartition(".")
        setattr(_find_dropout(attention, outer) if outer else attention, last, probability)


def check_seeded(kernel: str) -> None:
    """Find out whether an attention implementation drops what torch's seeds say.

    Raises:
        UserError: it is not known to.
    """
    if kernel not in SEEDED_KERNELS:
        raise UserError(
            f"model.attn_implementation: the paper's importance needs attention dropout, which {kernel} is not known "
            f"to have; use one of {', '.join(SEEDED_KERNELS)}, or importance.estimator: fisher, which drops nothing"
        )


def _attentions(model: PreTrainedModel, layers: list[nn.Module], anatomy: Anatomy, dropout: float) -> list[nn.Module]:
    """The modules that drop attention probabilities, of the layers that have one.

    Raises:
        UserError: a dropout that we could not switch on: the importance would silently miss half of its noise.
    """
    layout, kind, kernel = anatomy.layout, model.config.model_type, model.config._attn_implementation
    if dropout:
        check_seeded(kernel)
    name, found = layout.attention_dropout, []
    for index, layer in enumerate(layers):
        paths = {path for path, _ in layer.named_modules()}
        attention = layer.get_submodule(layout.attention) if layout.attention in paths else None
        if isinstance(_find_dropout(attention, name), int | float | nn.Dropout) and attention is not None:
            found.append(attention)
        elif dropout and anatomy.has(index, "o_proj"):
            raise UserError(
                f"model type {kind}: its attention modules ({layout.attention}) have no probability '{name}' to set, "
                "so the paper's importance cannot be estimated on it; use importance.estimator: fisher, which drops "
                "nothing; where the probability has another name, model.anatomy.attention_dropout says it"
            )
    if kind == "falcon" and dropout and not model.config.alibi:
        raise UserError(
            "model type falcon: with rotary positions its attention drops nothing, so the paper's importance cannot be "
            "estimated on it; use importance.estimator: fisher"
        )
    if dropout and kernel == "eager" and getattr(model.config, "reorder_and_upcast_attn", False):
        raise UserError(
            f"model type {kind}: with reorder_and_upcast_attn its eager attention drops nothing that could be set; "
            "use model.attn_implementation: sdpa"
        )
    return found
