"""What a step keeps on a device for its backward pass, and what it takes beside that for a moment: bytes from counts.

The formulas follow transformers' decoder layers operation by operation (norm, attention by a fused kernel, gated or
plain FFN): autograd keeps an operand where the other one needs a gradient, and nothing where none does, so that frozen
modules keep less than trained ones. Tests count the bytes that are really kept. Of experts, state spaces and other
parts the formulas know nothing (`Activations.is_known`): such layers keep more than they say.
"""

from __future__ import annotations

from dataclasses import dataclass

from cofitune.model.anatomy import Anatomy
from cofitune.model.region import Region
from cofitune.training.head_loss import KNOWN_HEADS, LOGITS_AT_ONCE
from cofitune.training.peft import AdapterPlan
from cofitune.training.swiglu import MODEL_TYPES

WRITTEN_OUT = {"codegen", "gpt2", "gpt_neo", "gptj", "phi"}  # whose GELU is written in operations of its own
CONVOLUTIONS = {"gpt2"}  # whose linear layers are transformers' Conv1D, which keeps no input of a frozen weight
FP32 = 4  # norms and softmax work in it, whatever the training's precision


@dataclass(frozen=True)
class Activations:
    """A micro-batch's activations on one device.

    Attributes:
        width: bytes of a number in the training's precision.
        tokens: positions of the longest micro-batch, padding included.
        adapter: what trains beside the region's modules, instead of them; None without one.
        masked: whether attention gets a mask, for which grouped keys and values are repeated.
        fused: whether attention is a fused kernel; another one keeps its scores, which are not counted.
        keeps_inputs: whether frozen linear layers keep their inputs, too, as DeepSpeed's do under ZeRO-3.
    """

    anatomy: Anatomy
    region: Region
    width: int
    tokens: int
    adapter: AdapterPlan | None = None
    masked: bool = False
    fused: bool = True
    keeps_inputs: bool = False

    @property
    def depth(self) -> int:
        """Layers that the backward pass runs through."""
        return self.anatomy.num_layers - self.region.first

    @property
    def is_known(self) -> bool:
        """Whether the formulas fit: each layer has fused attention and an FFN, both known, nothing linear beside."""
        anatomy = self.anatomy
        whole = {"v_proj", "o_proj", "up_proj", "down_proj"} <= set(anatomy.modules) and anatomy.is_whole
        layers = range(anatomy.num_layers)
        known = {name for i in layers for m in anatomy.modules for name in anatomy.parameter_names(i, m)}
        return whole and self.fused and not anatomy.experts and known.issuperset(anatomy.linear)

    def kept(self, checkpointed: int) -> int:
        """Bytes kept from the forward pass to the backward pass.

        Args:
            checkpointed: layers from the lowest trained one up that keep their input alone.
        """
        first = self.region.first
        layers = range(first + checkpointed, self.anatomy.num_layers)
        inputs = checkpointed * self.anatomy.hidden_size * self.width
        last_norm = self.anatomy.hidden_size * self._rms_norm_width + FP32
        to_hidden = self.anatomy.hidden_size * self.width  # the head's gradient, at tokens that carry the loss
        per_token = inputs + sum(map(self.of_layer, layers)) + last_norm + to_hidden
        return self.tokens * per_token + sum(self._composed(layer) for layer in layers)

    def passing(self, checkpointed: int) -> int:
        """Bytes that are there for a moment: a layer that is computed again, its gradients, a chunk of the logits."""
        anatomy, first = self.anatomy, self.region.first
        layers = range(first, first + checkpointed)
        again = max((self.tokens * self.of_layer(layer) + self._composed(layer) for layer in layers), default=0)
        gradients = (3 * anatomy.intermediate_size + 4 * anatomy.hidden_size) * self.width
        return max(again + self.tokens * gradients + self._normed(), self._logits())

    def peak(self, checkpointed: int) -> int:
        """Bytes at the fullest moment."""
        return self.kept(checkpointed) + self.passing(checkpointed)

    def of_layer(self, layer: int) -> int:
        """Bytes a token that a layer keeps when all of it is kept."""
        anatomy, width, size = self.anatomy, self.width, self.anatomy.sizes[layer]
        hidden, neurons = anatomy.hidden_size, size.intermediate_size
        queries, keys = size.num_heads * size.head_dim, size.num_key_value_heads * size.head_dim
        trained = {
            part  # a tensor that trains in part has its gradient whole
            for module in anatomy.modules
            if self.region.trains(layer, module, anatomy)
            for part in anatomy.layout.parts(module)
        }
        below = layer > self.region.first or bool(self.region.matched)
        attention = below or bool(trained & {"q_proj", "k_proj", "v_proj"})
        after_attention = attention or "o_proj" in trained
        gate, up = after_attention or "gate_proj" in trained, after_attention or "up_proj" in trained
        norms, norm_width = self._norms(layer)
        total = (hidden * norm_width + FP32) * (norms if below else norms // 2 if after_attention else 0)
        if attention:
            values = queries + 2 * keys if len(anatomy.layout.parts("v_proj")) > 1 else keys  # a view keeps all of it
            grouped = 2 * queries if self.masked else keys + values
            total += (2 * queries + grouped) * width + FP32 * size.num_heads
            if self._norms_heads(layer):
                total += (queries + keys) * self._rms_norm_width + (size.num_heads + size.num_key_value_heads) * FP32
        elif "o_proj" in trained:
            total += queries * width
        frozen_too = self.keeps_inputs and anatomy.model_type not in CONVOLUTIONS
        if trained & {"q_proj", "k_proj", "v_proj"} or (frozen_too and attention):
            total += hidden * width
        if trained & {"gate_proj", "up_proj"} or (frozen_too and after_attention):
            total += hidden * width
        total += self._between(gate, up) * neurons * width
        if "down_proj" in trained or (frozen_too and (gate or up)):
            total += neurons * width
        return total + self._of_adapter(layer)

    def _of_adapter(self, layer: int) -> int:
        """Bytes a token that a layer keeps for its adapter, beside what enters the modules that carry it."""
        adapter, total = self.adapter, 0
        if adapter is None:
            return 0
        for outputs, inputs in adapter.carriers(layer, self.anatomy):
            factors = 2 if adapter.kind == "osf" else 1  # what trains, and what it began with
            total += factors * adapter.rank((outputs, inputs)) * self.width  # between a product's two factors
            total += (adapter.dropout > 0) * inputs * (self.width + 1)  # what is left of the input, and which
            total += (adapter.kind == "dora") * 2 * outputs * self.width  # both results that the norm scales
        return total

    def _composed(self, layer: int) -> int:
        """Bytes that a layer keeps whatever the tokens: under OSF the factors that it puts together."""
        if self.adapter is None or self.adapter.kind != "osf":
            return 0
        carriers = self.adapter.carriers(layer, self.anatomy)
        return sum(2 * self.adapter.rank(shape) * sum(shape) * self.width for shape in carriers)

    def _normed(self) -> int:
        """Bytes that DoRA takes for a moment: a unit matrix, the product, and the weight with it, twice."""
        if self.adapter is None or self.adapter.kind != "dora":
            return 0
        carriers = self.adapter.carriers(self.region.last, self.anatomy)
        return max((inputs * (inputs + 3 * outputs) * self.width for outputs, inputs in carriers), default=0)

    def _between(self, gate: bool, up: bool) -> int:
        """How many times its width an FFN keeps between its projections."""
        if "gate_proj" not in self.anatomy.modules:
            return (4 if self.anatomy.model_type in WRITTEN_OUT else 1) * up
        if self.anatomy.model_type in MODEL_TYPES:
            return 2 if gate else int(up)  # up, too, where the gate's gradient needs it
        return 2 * gate + up  # the gate and, beside its activation, the other factor

    def _norms(self, layer: int) -> tuple[int, int]:
        """Norms of a layer that are as wide as the hidden size, and bytes of a number that they keep.

        A LayerNorm, which has biases, is one operation in the training's precision.
        """
        path, wide = f"{self.anatomy.layout.layers}.{layer}.", (self.anatomy.hidden_size,)
        vectors = [n for n, s in self.anatomy.shapes.items() if n.startswith(path) and s == wide]
        weights = [n for n in vectors if n.endswith(".weight")]
        biased = any(n.replace(".weight", ".bias") in vectors for n in weights)
        return len(weights), self.width if biased else self._rms_norm_width

    @property
    def _rms_norm_width(self) -> int:
        """Bytes of a number that an RMSNorm keeps: transformers computes it in fp32, `fuse_norms` keeps its input."""
        return self.width if self.anatomy.known_norms else FP32

    def _norms_heads(self, layer: int) -> bool:
        """Whether queries and keys are normed head by head."""
        shape = self.anatomy.shapes.get(f"{self.anatomy.layout.layers}.{layer}.self_attn.q_norm.weight")
        return shape is not None and shape != (self.anatomy.hidden_size,)

    def _logits(self) -> int:
        """Logits in the training's precision, in fp32, their softmax and its gradient: a chunk of them, or all."""
        logits = self.tokens * self.anatomy.vocab_size
        if self.anatomy.model_type in KNOWN_HEADS:
            logits = min(logits, LOGITS_AT_ONCE)
        return logits * (2 * FP32 + 2 * self.width)
