"""What a training run will need, estimated before any weight is read: bytes on each device and on the host."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cofitune.model.anatomy import Anatomy
from cofitune.model.region import Region
from cofitune.training.engine import EngineSettings

MASTER_AND_MOMENTS = 12  # bytes a trained weight: fp32 master, exp_avg, exp_avg_sq
MOMENTS = 8  # fp32 training has no separate master
ACCUMULATED_GRADIENT = 4  # fp32, also under bf16


@dataclass(frozen=True)
class Memory:
    """Bytes. `weights`, `gradients`, `optimizer` and `activations` are on each device, `host` on the whole machine."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    host: int

    @property
    def device(self) -> int:
        """The sum on one device."""
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate_memory(
    anatomy: Anatomy, region: Region, settings: EngineSettings, world_size: int, max_length: int, checkpointing: bool
) -> Memory:
    """Estimate a run's memory from counts alone.

    ZeRO-3 shards weights, gradients and optimizer states over the ranks and gathers about two layers at a time;
    stage 2 shards gradients and states, stage 1 only states. Frozen weights have neither gradient nor state.
    Activations are kept from the lowest trained layer up: one layer input each when checkpointing, else what a layer
    keeps for its backward pass (as Korthikanti et al., arXiv 2205.05198, count it, without attention scores: fused
    kernels never write them).
    """
    width = settings.dtype.itemsize
    trained = region.num_parameters(anatomy)
    stage = settings.zero_stage
    layer = sum(math.prod(shape) for name, shape in anatomy.shapes.items() if f".{region.first}." in name)
    weights = anatomy.num_parameters * width
    if stage == 3:
        working_set = (2 * layer + anatomy.vocab_size * anatomy.hidden_size) * width
        weights = weights // world_size + working_set
    gradients = trained * ACCUMULATED_GRADIENT // (world_size if stage >= 2 else 1)
    optimizer = trained * (MASTER_AND_MOMENTS if width == 2 else MOMENTS) // world_size
    host = 0
    if settings.offload_optimizer == "cpu":
        optimizer, gradients, host = 0, 0, host + (optimizer + gradients) * world_size
    if settings.offload_param == "cpu":
        host += anatomy.num_parameters * width
        weights -= anatomy.num_parameters * width // world_size
    tokens = settings.micro_batch * max_length
    one_layer = tokens * (18 * anatomy.hidden_size + 6 * anatomy.intermediate_size) * width // 2
    depth = anatomy.num_layers - region.first
    kept = depth * tokens * anatomy.hidden_size * width + one_layer if checkpointing else depth * one_layer
    logits = tokens * anatomy.vocab_size * 8  # fp32, and their gradient; less where only responses are scored
    return Memory(weights, gradients, optimizer, kept + logits, host)
