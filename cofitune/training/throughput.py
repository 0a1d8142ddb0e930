"""How much of a device's arithmetic a training uses: the FLOPs that its step needs, counted, over what the device can.

Model FLOPs utilisation (MFU) as PaLM defines it (arXiv 2204.02311, appendix B): what the mathematics needs of real
tokens, not what is recomputed for checkpointing or spent on padding.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from cofitune.model.anatomy import Anatomy
from cofitune.model.layouts import EXPERTS
from cofitune.model.region import Region

ATTENTION = ("q_proj", "k_proj", "v_proj")
# dense TFLOP/s in bf16, tf32 and fp32, from the makers' data sheets (NVIDIA: halved where they count sparsity)
PEAKS = {
    "H100 PCIe": (756.0, 378.0, 51.0),
    "H100 NVL": (835.5, 417.5, 60.0),
    "H100": (989.4, 494.7, 66.9),
    "H200": (989.4, 494.7, 66.9),
    "A100": (312.0, 156.0, 19.5),
    "A10": (125.0, 62.5, 31.2),
    "L40S": (362.0, 183.0, 91.6),
    "L4": (121.0, 60.0, 30.3),
    "RTX A6000": (154.8, 77.4, 38.7),
    "RTX 4090": (165.2, 82.6, 82.6),
    "MI300X": (1307.4, 653.7, 163.4),
}


@dataclass(frozen=True)
class Cost:
    """FLOPs of a training step by what they grow with; a multiply-add counts as two.

    Attributes:
        token: FLOPs a token.
        pair: FLOPs a pair of tokens of one item, T² pairs an item of T tokens (the causal half is not left out: so
            PaLM and `torch.utils.flop_counter` count).
        supervised: FLOPs a supervised token: the head sees no other.
    """

    token: int
    pair: int
    supervised: int

    def flops(self, tokens: int, pairs: int, supervised: int) -> int:
        """FLOPs of a step that holds these."""
        return self.token * tokens + self.pair * pairs + self.supervised * supervised


def training_cost(anatomy: Anatomy, region: Region, cached: bool = False) -> Cost:
    """Count what a step needs.

    Every linear module of P weights takes 2P a token in the forward pass, 2P for its weight's gradient where it is
    trained, and 2P for its input's gradient where something below it is trained; the four products of attention
    likewise. A fused tensor of which a part trains gets a gradient whole. Below the lowest trained layer there is no
    backward pass; norms, rotations and the embedding count as nothing.

    Args:
        cached: the layers below the lowest trained one are not run, their result having been kept.
    """
    token = pair = 0
    below = False  # whether anything is trained below, so that gradients must pass through
    for layer in range(region.first if cached else 0, anatomy.num_layers):
        trained = {m for m in anatomy.modules if any(region.trains(layer, p, anatomy) for p in anatomy.layout.parts(m))}
        below = below or (bool(region.matched) and layer >= region.first)  # a regex may train what is no module
        wants = {m: below or m in trained for m in ATTENTION}  # the gradient of q, of k and of v
        after_attention = below or any(m in trained for m in (*ATTENTION, "o_proj"))
        inside_ffn = after_attention or "gate_proj" in trained or "up_proj" in trained
        passes = dict.fromkeys(ATTENTION, below) | {
            "o_proj": any(wants.values()),
            "gate_proj": after_attention,
            "up_proj": after_attention,
            "down_proj": inside_ffn,
            EXPERTS: after_attention,
        }
        for module in (module for module in anatomy.modules if anatomy.has(layer, module)):
            shape = anatomy.shapes[next(anatomy.parameter_names(layer, module))]
            rows, of_tensor = anatomy.num_rows(layer, module), anatomy.num_rows_of_tensor(layer, module)
            weights = math.prod(shape) // of_tensor * rows
            if module == EXPERTS:  # a token passes through some of them
                every = sum(math.prod(anatomy.shapes[name]) for name in anatomy.parameter_names(layer, module))
                weights = every // anatomy.num_experts * anatomy.experts_per_token
            token += 2 * weights * (1 + (module in trained) + passes[module])
        scores = wants["q_proj"] or wants["k_proj"]
        size = anatomy.sizes[layer]
        product = 2 * size.num_heads * size.head_dim  # of one pair: a query with a key, or a weight with a value
        pair += (
            anatomy.has(layer, "o_proj") * product * (2 + wants["q_proj"] + wants["k_proj"] + wants["v_proj"] + scores)
        )
        below = inside_ffn or "down_proj" in trained or EXPERTS in trained
    head = 2 * anatomy.vocab_size * anatomy.hidden_size
    return Cost(token, pair, 2 * head)


def peak_flops(device_name: str, dtype: torch.dtype, tf32: bool) -> float | None:
    """What one device can do, in FLOP/s; None for one that is not in the table.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.
        dtype: of the training.
        tf32: whether fp32 products may be rounded to tf32.
    """
    for name, (bf16, rounded, fp32) in PEAKS.items():
        if re.search(rf"\b{name}\b", device_name):
            return 1e12 * (bf16 if dtype == torch.bfloat16 else rounded if tf32 else fp32)
    return None


@dataclass(frozen=True)
class Meter:
    """Turns a step's counts into its MFU.

    Attributes:
        cost, cached_cost: of a step with and without the frozen layers below the lowest trained one.
        peak: FLOP/s of all ranks' devices together; None where unknown, and on a CPU.
        device_name: rank 0's device.
    """

    cost: Cost
    cached_cost: Cost
    peak: float | None
    device_name: str

    def mfu(self, flops: int, seconds: float) -> float | None:
        """The share, in [0, 1], of the devices' arithmetic that was needed.

        Args:
            flops: what the step's real tokens needed.
        """
        return None if self.peak is None else flops / (seconds * self.peak)


def start_meter(anatomy: Anatomy, region: Region, dtype: torch.dtype, world_size: int) -> Meter:
    """A meter for this rank's device; all ranks are taken to have the same. Where a part of the model is not known, nor
    is what it needs: no share is told."""
    costs = training_cost(anatomy, region), training_cost(anatomy, region, cached=True)
    if not torch.cuda.is_available():
        return Meter(*costs, None, "cpu")
    name = torch.cuda.get_device_name()
    tf32 = torch.get_float32_matmul_precision() != "highest"
    peak = None if anatomy.unknown else peak_flops(name, dtype, tf32)
    return Meter(*costs, world_size * peak if peak else None, name)
