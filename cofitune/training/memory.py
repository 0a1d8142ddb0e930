"""What a training run will need, estimated before any weight is read: bytes on each device and on the host."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cofitune.model.anatomy import Anatomy
from cofitune.model.region import Region
from cofitune.training.activations import Activations
from cofitune.training.engine import ELEMENTS_AT_ONCE, EngineSettings, deepspeed_config, loads_sharded
from cofitune.training.peft import AdapterPlan

MASTER = 4  # bytes a trained weight, in fp32; fp32 training has no separate one
MOMENTS = {"adamw": 8, "adamw_8bit": 2}  # bytes a trained weight: exp_avg and exp_avg_sq
ACCUMULATED_GRADIENT = 4  # fp32, also under bf16


@dataclass(frozen=True)
class Memory:
    """Bytes: five parts on each device, and two on the whole machine.

    Attributes:
        buffers: DeepSpeed's gradient bucket, the gradient of what one inner step takes, and old values for a soft mask.
        host_loading: the weights while they are read: by rank 0 alone, or as pages that the ranks share; where they are
            stored in another dtype, each rank has a copy of its own.
        host_offloaded: what offloading keeps there for the whole run.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    host_loading: int
    host_offloaded: int

    @property
    def device(self) -> int:
        """The sum on one device."""
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations


@dataclass(frozen=True)
class Footprint:
    """A run by what its memory depends on.

    Attributes:
        max_length: tokens of the longest item.
        checkpointed: layers, from the lowest trained one up, whose activations are computed again.
        adapter: what trains instead of the region, which carries it; None without one.
        base_kept: whether a copy of the trained weights as the base has them is kept, for the pull towards it.
        shared_base: whether the base's weights stay on the device for other trainings: what trains is a copy.
        masked: whether attention gets a mask.
        fused: whether attention is a fused kernel.
        converting: ranks of this machine that each convert the weights, which are stored in another dtype, while they
            load; 1 where they are stored as they are trained, and the ranks share the pages of the files.
    """

    anatomy: Anatomy
    region: Region
    settings: EngineSettings
    world_size: int
    max_length: int
    checkpointed: int
    adapter: AdapterPlan | None = None
    base_kept: bool = False
    shared_base: bool = False
    masked: bool = False
    fused: bool = True
    converting: int = 1

    @property
    def activations(self) -> Activations:
        """Those of its longest micro-batch."""
        settings = self.settings
        tokens = settings.micro_batch * self.max_length
        width = settings.dtype.itemsize
        zero = deepspeed_config(settings)["zero_optimization"]
        inputs = settings.zero_stage == 3 and bool(zero.get("memory_efficient_linear", True))  # DeepSpeed's default
        return Activations(self.anatomy, self.region, width, tokens, self.adapter, self.masked, self.fused, inputs)

    @property
    def depth(self) -> int:
        """Layers that the backward pass runs through: the most that can be checkpointed."""
        return self.activations.depth

    @property
    def memory(self) -> Memory:
        """The estimate, part by part."""
        return estimate_memory(self)


def estimate_memory(run: Footprint) -> Memory:
    """Estimate a run's memory from counts alone.

    ZeRO-3 shards weights, gradients and optimizer states over the ranks, the weights perhaps once more in each node,
    and gathers about two layers at a time; stage 2 shards gradients and states, stage 1 only states. Frozen weights
    have neither gradient nor state; the held rows of a fused tensor that trains in part have both.
    """
    anatomy, settings, world_size = run.anatomy, run.settings, run.world_size
    width, stage = settings.dtype.itemsize, settings.zero_stage
    trained = run.region.num_touched(anatomy) if run.adapter is None else run.adapter.num_parameters
    needs_whole = run.adapter is not None and run.adapter.needs_whole
    in_parts = loads_sharded(anatomy.num_parameters, settings, world_size) and not needs_whole
    whole = anatomy.num_parameters * width
    weights, zero = whole, deepspeed_config(settings)["zero_optimization"]
    if stage == 3:
        weights = whole // world_size + gathered_at_once(anatomy, run.region.first) * width
        second = _elements(zero.get("zero_hpz_partition_size", 1))
        weights += whole // second if second > 1 else 0
    elif run.shared_base and run.adapter is None:
        weights += trained * width
    all_gradients = trained * ACCUMULATED_GRADIENT
    masters = (MASTER if width == 2 else 0) + (MASTER if run.base_kept else 0)
    all_states = trained * (MOMENTS[settings.optimizer] + masters)
    gradients, optimizer = all_gradients // (world_size if stage >= 2 else 1), all_states // world_size
    own = trained // world_size
    of_gradient = min(own, _elements(zero["sub_group_size"])) if stage == 3 else own
    in_pieces = stage < 3 and settings.optimizer == "adamw"
    of_old = min(of_gradient, ELEMENTS_AT_ONCE) if in_pieces else of_gradient
    bucket = min(trained, _elements(zero["reduce_bucket_size"])) * width
    buffers, offloaded = bucket + (of_gradient + of_old) * ACCUMULATED_GRADIENT, 0
    if settings.offload_optimizer == "cpu":
        gradients, optimizer, buffers, offloaded = 0, 0, bucket, all_gradients + all_states
    if settings.offload_param == "cpu":
        weights, offloaded = weights - whole // world_size, offloaded + whole
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        buffers=buffers,
        activations=run.activations.peak(run.checkpointed),
        host_loading=whole * (1 if in_parts else run.converting),
        host_offloaded=offloaded,
    )


def gathered_at_once(anatomy: Anatomy, layer: int = 0) -> int:
    """Weights that ZeRO-3 has gathered at a time, about: two layers like this one, and the embedding or the head."""
    path = f"{anatomy.layout.layers}.{layer}."
    numel = sum(math.prod(shape) for name, shape in anatomy.shapes.items() if name.startswith(path))
    return 2 * numel + anatomy.vocab_size * anatomy.hidden_size


def _elements(value: object) -> int:
    """A size of `deepspeed.raw`, which DeepSpeed has not checked yet; it will refuse what is no number."""
    return int(value) if isinstance(value, int | float) else ELEMENTS_AT_ONCE
