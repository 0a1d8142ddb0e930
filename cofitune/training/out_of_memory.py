"""When memory runs out: which settings would make room for this run, by how much, and what each costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from cofitune.errors import UserError
from cofitune.files import gib
from cofitune.training.memory import Footprint

WORTH_SAYING = 0.02  # of a rank's memory
# what the CPU's allocator and the drivers say in a plain RuntimeError
WORDS = (
    "can't allocate memory", "not enough memory", "out of memory", "CUDNN_STATUS_ALLOC_FAILED",
    "can't start new thread",  # whose stack finds no place
)  # fmt: skip
GPU_WORDS = ("CUDA", "CUDNN", "HIP")


def ways_out(run: Footprint, on_gpu: bool) -> list[str]:
    """Settings that would take less of a device's memory, the least costly first, each with what it saves.

    Args:
        on_gpu: whether the device is a GPU; else the ranks train in the host's memory.
    """
    settings = run.settings
    parts = next((n for n in range(2, settings.micro_batch + 1) if settings.micro_batch % n == 0), 1)
    less, more = settings.micro_batch // parts, settings.accumulation * parts
    length, sharing = run.max_length // 2, settings.accumulation % 2 == 0
    ways: list[tuple[str, Footprint]] = []

    def way(message: str, possible: bool, *, then: Footprint | None = None, **changed: object) -> None:
        if possible:
            ways.append((message, then or replace(run, settings=replace(settings, **changed))))  # type: ignore[arg-type]

    way(
        f"train.per_device_train_batch_size: {less} with train.gradient_accumulation_steps: {more} (the same training)",
        settings.micro_batch > 1,
        micro_batch=less,
    )
    way(
        "train.gradient_checkpointing: true (the same training, slower)",
        run.checkpointed < run.depth and run.anatomy.can_recompute,
        then=replace(run, checkpointed=run.depth),
    )
    way("deepspeed.zero_stage: 3 (the same training)", settings.zero_stage < 3 and run.world_size > 1, zero_stage=3)
    way(
        "deepspeed.offload_optimizer: cpu (the same training, slower)",
        on_gpu and settings.offload_optimizer == "none",
        offload_optimizer="cpu",
    )
    way(
        "deepspeed.offload_param: cpu (the same training, much slower)",
        on_gpu and settings.offload_param == "none" and settings.zero_stage == 3,
        offload_param="cpu",
    )
    way("model.dtype: bfloat16", on_gpu and settings.dtype == torch.float32, dtype=torch.bfloat16)
    way(f"data.max_length: {length} (cuts longer items)", length > 1, then=replace(run, max_length=length))
    way(
        "twice as many ranks, with "
        + (
            f"train.gradient_accumulation_steps: {settings.accumulation // 2} (the same training)"
            if sharing
            else "twice the items in an optimizer step"
        ),
        settings.zero_stage == 3,
        then=replace(run, world_size=2 * run.world_size),
    )
    saved = [(message, run.memory.device - then.memory.device) for message, then in ways]
    return [f"{message}: about {gib(b)} less" for message, b in saved if b > WORTH_SAYING * run.memory.device]


def ways_out_of_host(run: Footprint) -> list[str]:
    """Settings that would take less of the memory beside the GPUs: what is offloaded there, given back to them."""
    ways = []
    for name in ("offload_param", "offload_optimizer"):
        if getattr(run.settings, name) == "cpu":
            then = replace(run, settings=replace(run.settings, **{name: "none"})).memory  # type: ignore[arg-type]
            saved, taken = run.memory.host_offloaded - then.host_offloaded, then.device - run.memory.device
            ways.append(
                f"deepspeed.{name}: none (the same training, faster): about {gib(saved)} less, and {gib(taken)} more "
                "on each GPU"
            )
    return ways


@contextmanager
def explaining_out_of_memory(run: Footprint) -> Iterator[None]:
    """Turn an allocation that failed into one message that says which settings to change.

    Raises:
        UserError: memory ran out inside.
    """

    def explain(error: Exception, output: str) -> str:
        on_gpu = is_on_gpu(error)
        memory = run.memory
        if torch.cuda.is_available() and not on_gpu:
            ways = ways_out_of_host(run)
            takes = f"{gib(memory.host_loading)} while the weights load, then {gib(memory.host_offloaded)} offloaded"
        else:
            ways, takes = ways_out(run, on_gpu), f"{gib(memory.device)} a rank"
        return (
            f"out of memory on the {'GPU' if on_gpu else 'host'}: {output}\n"
            f"this run was estimated to take {takes}; what would take less:\n"
            + "\n".join(f"  - {way}" for way in ways or ["a machine with more memory: no setting would help much"])
        )

    with telling_out_of_memory(explain):
        yield


@contextmanager
def telling_out_of_memory(explain: Callable[[Exception, str], str]) -> Iterator[None]:
    """Turn an allocation that failed into the message that `explain` makes of the error and of its first line.

    Raises:
        UserError: memory ran out inside.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        output = (str(error).strip().splitlines() or ["MemoryError"])[0].strip()
        raise UserError(explain(error, output)) from error


def is_on_gpu(error: BaseException) -> bool:
    """Whether an allocation that failed was one of a GPU's memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in GPU_WORDS)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in WORDS)
