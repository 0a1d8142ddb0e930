"""DeepSpeed's engine from plain values: its config, and `initialize` with the frozen weights left out."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import get_scheduler

from cofitune.distributed import world_size_or_one
from cofitune.errors import UserError
from cofitune.ranks import is_launched, this_rank
from cofitune.training.optimizer import adamw_8bit, decay_groups
from cofitune.training.refused_raw import REFUSALS, refused_raw
from cofitune.zero import (
    hold_until_gradients,
    keep_signatures,
    reset_zero_globals,
    skip_cpu_communication_op,
    skip_muon_compilation,
    skip_profiler_ranges,
    skip_unread_messages,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cofitune.zero import Engine

SHARDED_LOADING_FROM = 8 * 2**30  # bytes of weights
# elements of the gradient bucket, and of what one inner step takes with copies of its gradient and (in update mode) its
# old values. DeepSpeed's own 5e8 and 1e9 would cost more memory than a 7B model's activations
ELEMENTS_AT_ONCE = 10**8
SECONDS_TO_REST = 0.2  # for gloo's threads, which need microseconds of a free core
STEP_TIMEOUT = 1800  # seconds, as transformers' ddp_timeout
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


@dataclass(frozen=True)
class EngineSettings:
    """What DeepSpeed must know. Names are those of the config's `train` and `deepspeed` sections.

    Attributes:
        num_steps: optimizer steps of the schedule.
        rehearsal_micro_batches: micro-batches of a step on a rank beside the `accumulation` of the task.
        dtype: the training precision; bfloat16 keeps fp32 master weights and accumulates gradients in fp32.
        optimizer: adamw | adamw_8bit.
        decay_all: whether biases and norms decay, too.
        hpz_ranks: under stage 3, ranks that keep a second copy of the weights among them, so that the backward pass
            fetches nothing from other nodes (hpZ of ZeRO++, arXiv 2306.10209); 1: there is none.
    """

    zero_stage: int
    offload_optimizer: str
    offload_param: str
    raw: Mapping[str, object]
    dtype: torch.dtype
    micro_batch: int
    accumulation: int
    learning_rate: float
    weight_decay: float
    adam_betas: tuple[float, float]
    adam_epsilon: float
    max_grad_norm: float
    lr_scheduler_type: str
    warmup_ratio: float
    num_steps: int
    rehearsal_micro_batches: int = 0
    optimizer: str = "adamw"
    decay_all: bool = False
    hpz_ranks: int = 1

    @property
    def warmup_steps(self) -> int:
        """Steps over which the learning rate rises from 0.

        Rounded down: the first of them has rate 0, and a short run must not spend its only steps on that.
        """
        return int(self.warmup_ratio * self.num_steps)


def deepspeed_config(settings: EngineSettings) -> dict[str, Any]:
    """The config that `deepspeed.initialize` gets; `raw` is merged in last, section by section."""
    on_gpu = torch.cuda.is_available()
    offload = {"device": "cpu", "pin_memory": on_gpu}
    zero: dict[str, object] = {
        "stage": settings.zero_stage,
        "reduce_bucket_size": ELEMENTS_AT_ONCE,
        "sub_group_size": ELEMENTS_AT_ONCE,  # read by stage 3 alone
    }
    if on_gpu and world_size_or_one() > 1:  # gradients are reduced while the backward pass goes on
        zero["overlap_comm"] = True
    if settings.zero_stage == 3 and settings.hpz_ranks > 1:
        zero["zero_hpz_partition_size"] = settings.hpz_ranks
    if settings.offload_optimizer == "cpu":
        zero["offload_optimizer"] = offload
    if settings.offload_param == "cpu":
        zero["offload_param"] = offload
    config: dict[str, object] = {
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": settings.accumulation + settings.rehearsal_micro_batches,
        "gradient_clipping": settings.max_grad_norm,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": settings.learning_rate,
                "betas": list(settings.adam_betas),
                "eps": settings.adam_epsilon,
                "weight_decay": settings.weight_decay,
                # DeepSpeed would compile its own Adam, for which a GPU needs nvcc. Torch's fused one needs no compiler
                # and no temporary copies of the states
                "torch_adam": True,
                "fused": True,
            },
        },
        "bf16": {"enabled": settings.dtype == torch.bfloat16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if settings.dtype == torch.bfloat16:
        config["data_types"] = {"grad_accum_dtype": "fp32"}  # else bf16 sums lose small gradients
    return _merge(config, settings.raw)


def start_engine(model: nn.Module, settings: EngineSettings) -> Engine:
    """Wrap the model: only parameters that require gradients get optimizer states.

    The learning-rate schedule is transformers', stepped by the engine after every optimizer step.

    Raises:
        UserError: DeepSpeed refuses a value of `raw`, or the optimizer's package does not load.
    """
    import deepspeed

    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        made: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
            settings.lr_scheduler_type, optimizer, settings.warmup_steps, settings.num_steps
        )
        return made

    config = deepspeed_config(settings)
    groups = decay_groups(model, settings.weight_decay, settings.decay_all)
    own: torch.optim.Optimizer | None = None
    if settings.optimizer == "adamw_8bit":
        own = adamw_8bit(groups, settings.learning_rate, settings.adam_betas, settings.adam_epsilon)
        del config["optimizer"]
    if settings.zero_stage == 3:
        hold_until_gradients(model)
    skip_muon_compilation()
    skip_profiler_ranges()
    skip_unread_messages()
    try:
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=groups,
            optimizer=own,
            config=config,
            lr_scheduler=schedule,
        )
    except REFUSALS as error:
        if not settings.raw:
            raise  # nothing of it is the user's doing
        raise refused_raw(error, settings.raw) from error
    if settings.zero_stage == 3:
        keep_signatures(model)
    return engine


def check_config(settings: EngineSettings) -> None:
    """Let DeepSpeed look at its config before a model loads.

    Raises:
        UserError: it refuses a value of `raw`.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(deepspeed_config(settings))
    except REFUSALS as error:
        if not settings.raw:
            raise
        raise refused_raw(error, settings.raw) from error


def start_distributed(timeout: int = STEP_TIMEOUT) -> tuple[int, int]:
    """Join the other ranks (or be the only one), quietly. Returns (rank, world size).

    Args:
        timeout: seconds that ranks wait for one another in a collective. DeepSpeed's own would be ten minutes.
    """
    import deepspeed

    if torch.distributed.is_initialized():  # DeepSpeed keeps its groups for the life of the process
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if not is_launched():
        from torch.distributed.elastic.utils.distributed import get_free_port

        os.environ.update({**ALONE, "MASTER_PORT": str(get_free_port())})
    if torch.cuda.is_available():
        device = this_rank().device(torch.cuda.device_count())
        os.environ["LOCAL_RANK"] = str(device)  # DeepSpeed takes it for the device's number
        torch.cuda.set_device(device)
    else:
        skip_cpu_communication_op()
    with meeting():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timedelta(seconds=timeout))
    atexit.register(_leave)
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


@contextmanager
def meeting() -> Iterator[None]:
    """Around the start of the process group: say what to do where the ranks cannot meet.

    Raises:
        UserError: another process has the port, or rank 0 is not to be found.
    """
    try:
        yield
    except torch.distributed.DistNetworkError as error:
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        output = str(error).splitlines()[0]
        if "EADDRINUSE" in output:
            raise UserError(
                f"MASTER_PORT {port} on {address} is taken by another process: export another MASTER_PORT (torchrun: "
                "--master-port, or --standalone on one machine)"
            ) from error
        raise UserError(f"rank 0 is not to be found at MASTER_ADDR {address}, MASTER_PORT {port}: {output}") from error


def checkpoint_layers(model: PreTrainedModel, layers: str, first_trained: int, count: int | None = None) -> None:
    """Recompute the activations of some layers in the backward pass, from the lowest trained one up.

    Layers below it take no part in the backward pass, so that checkpointing them would gain nothing. Non-reentrant
    checkpointing needs no gradient at its inputs; asking for one would run the backward pass through frozen layers.

    Args:
        layers: path of the model's list of decoder layers.
        first_trained: the lowest layer that the backward pass runs through.
        count: how many layers; None: all.
    """
    if count == 0:
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if getattr(model, "_require_grads_hooks", None) or getattr(model, "_require_grads_hook", None):
        model.disable_input_require_grads()
    for index, layer in enumerate(model.get_submodule(layers)):
        layer.gradient_checkpointing = index >= first_trained and (count is None or index < first_trained + count)


def _merge(base: dict[str, object], raw: Mapping[str, object]) -> dict[str, object]:
    merged = deepcopy(base)
    for key, value in raw.items():
        lower = merged.get(key)
        merged[key] = (
            _merge(lower, value) if isinstance(value, Mapping) and isinstance(lower, dict) else deepcopy(value)
        )
    return merged


def loads_sharded(num_parameters: int, settings: EngineSettings, world_size: int) -> bool:
    """Whether rank 0 alone reads the weights, and each rank keeps its share: where several share a big model."""
    big = num_parameters * settings.dtype.itemsize >= SHARDED_LOADING_FROM
    return big and world_size > 1 and settings.zero_stage == 3


@contextmanager
def sharded_loading(num_parameters: int, settings: EngineSettings, world_size: int) -> Iterator[None]:
    """Inside, `from_pretrained` shards weights while it reads them, where `loads_sharded` says so.

    Small models are loaded whole by every rank and sharded by `initialize`; safetensors are memory-mapped, so that the
    ranks share the pages of weights that are stored in the training's dtype. Raw keys of the user's are part of the
    config that transformers looks at.
    """
    if not loads_sharded(num_parameters, settings, world_size):
        yield
        return
    with loading_under(deepspeed_config(settings)):
        yield


@contextmanager
def loading_under(config: Mapping[str, object]) -> Iterator[None]:
    """Inside, `from_pretrained` shards weights while it reads them, by a DeepSpeed config of stage 3."""
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    held = HfDeepSpeedConfig(dict(config))  # noqa: F841 -- transformers holds it by a weak reference
    try:
        yield
    finally:
        unset_hf_deepspeed_config()


def release(engine: Engine) -> None:
    """Let go of the engine's hooks and memory, so that an evaluation or another engine may follow."""
    engine.destroy()
    reset_zero_globals()


def _leave() -> None:
    """At the process's end: leave the process group, and give gloo's threads the time to come to rest.

    They let go of a collective's tensors when it has long returned. One that does so while Python ends finds no Python
    any more, and the process aborts (pytorch#179291); destroying a group that DeepSpeed holds does not wait for them.
    """
    if torch.distributed.is_initialized():
        threaded = torch.distributed.get_backend() == "gloo"
        torch.distributed.destroy_process_group()
        if threaded:
            time.sleep(SECONDS_TO_REST)
