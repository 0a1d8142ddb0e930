"""The thin loop over DeepSpeed's engine: forward, backward, step, and one record a step."""

from __future__ import annotations

import math
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cofitune.data.batches import Batch, Plan, rank_micro_batches, step_indices
from cofitune.data.chat import Example
from cofitune.distributed import all_reduce_sum
from cofitune.errors import UserError
from cofitune.training.loss import rehearsal_loss, summed_loss
from cofitune.training.prefetch import one_ahead, pinned
from cofitune.training.prefix_cache import Prefix
from cofitune.training.step_counts import StepCounts, count_over_ranks
from cofitune.training.throughput import Meter

if TYPE_CHECKING:
    from cofitune.zero import Engine

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class RehearsalLoss:
    """How rehearsal enters the loss of a step: nll or kl (training/loss.py), and with which weight."""

    kind: str
    weight: float


@dataclass(frozen=True)
class StepRecord:
    """One line of `metrics.jsonl`.

    Attributes:
        step: optimizer step, from 1.
        epoch: passes over the data that are behind, as a fraction.
        loss: the task's mean cross-entropy a supervised token, over all ranks and micro-batches of the step, in nats.
        learning_rate: the rate that this step was taken with.
        grad_norm: global norm of the (masked) gradient before clipping.
        supervised_tokens: tokens that carried the task's loss, over all ranks.
        tokens: all real tokens, over all ranks.
        seconds: wall time of the step.
        tokens_per_second: real tokens, over all ranks.
        padded_share: the share of the positions that went through the model and were padding.
        mfu: model FLOPs utilisation in [0, 1] (training/throughput.py); None on a device whose peak is not known.
        peak_gpu_bytes: the most memory that tensors have taken on rank 0's GPU so far; 0 on a CPU.
        peak_host_bytes: the most memory that rank 0's process has held so far.
        kept_share: layer → the share of its update (or gradient) that the soft mask left; None where none was read.
        rehearsal_loss: the rehearsal's mean loss a rehearsed token (training/loss.py), in nats; None without rehearsal.
        rehearsal_tokens: tokens that carried it, over all ranks.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    supervised_tokens: int
    tokens: int
    seconds: float
    tokens_per_second: float
    padded_share: float
    mfu: float | None
    peak_gpu_bytes: int
    peak_host_bytes: int
    kept_share: dict[str, float] | None = None
    rehearsal_loss: float | None = None
    rehearsal_tokens: int = 0

    def as_dict(self) -> dict[str, object]:
        """The record as JSON takes it."""
        return asdict(self)


@dataclass(frozen=True)
class FitSettings:
    """Which steps a training takes, in plain values.

    Attributes:
        schedule: how an epoch's examples are shared out over steps, ranks and micro-batches.
        seed: of the order of the examples.
        start_step: optimizer steps that were taken before; their examples are passed over.
        stop_step: the step after which to pause, as if there were no more; None: the last one.
        rehearsal: which loss the schedule's rehearsal examples have; None where there are none.
        lengths: tokens of each example; None: a rank finds them out by reading them all.
    """

    schedule: Plan
    seed: int
    pad_token_id: int
    start_step: int = 0
    stop_step: int | None = None
    rehearsal: RehearsalLoss | None = None
    lengths: Sequence[int] | None = None


def fit(
    engine: Engine,
    examples: Sequence[Example],
    settings: FitSettings,
    on_step: Callable[[StepRecord, int], None],
    *,
    prefix: Prefix | None = None,
    meter: Meter | None = None,
    asked: Callable[[], int] = lambda: 0,
) -> int:
    """Train until `settings.schedule.num_steps` optimizer steps are taken. Every rank must call with the same values.

    The loss of a step is defined in training/loss.py: sums over tokens divided by their global counts.

    Args:
        on_step: gets a step's record, and the signal after which the ranks will stop here, or 0.
        prefix: keeps the frozen prefix's activations, and gives them back once all ranks have those of a micro-batch.
        meter: knows what a step needs of the devices.
        asked: the signal (SIGINT or SIGTERM) by which this rank was asked to stop, or 0. One rank is enough.

    Returns:
        The signal that ended the training early, or 0.

    Raises:
        UserError: the loss or the gradient is no longer finite; `on_step` is not told of such a step.
    """
    schedule = settings.schedule
    read = partial(_read, examples, settings, torch.distributed.get_rank())
    engine.train()

    started = time.perf_counter()
    for work, batches in one_ahead(_work(settings), read):
        step = work.step
        # over all ranks the tokens that the step's loss is divided by
        counts = count_over_ranks(batches, schedule.accumulation, prefix, engine.device)
        learning_rate = engine.get_lr()[0]  # before the step: the schedule moves on with it
        # forward and backward of each micro-batch; the last one takes the optimizer's step
        sums = _take_step(engine, _losses(batches, counts, settings), prefix)
        # one reduction for the losses and for the signals: every rank must learn of a stop in the same step
        loss_sum, rehearsal_sum, stop_signal = _agree(sums, asked())
        record = StepRecord(
            step=step,
            epoch=work.examples_seen / schedule.num_examples,
            loss=loss_sum / max(1, counts.supervised),
            learning_rate=learning_rate,
            grad_norm=float(engine.get_global_grad_norm() or 0.0),
            rehearsal_loss=rehearsal_sum / max(1, counts.rehearsed) if settings.rehearsal else None,
            **counts.figures(time.perf_counter() - started, meter),
            **_peak_memory(engine.device),
        )
        # a diverged step must reach neither metrics.jsonl nor a checkpoint
        _check_finite(record, engine.was_step_applied())
        stopped_by = stop_signal if step < schedule.num_steps else 0
        on_step(record, stopped_by)
        if stopped_by or step == settings.stop_step:
            return stopped_by
        started = time.perf_counter()
    return 0


@dataclass(frozen=True)
class _Work:
    """A step, its examples' indices, and the task's examples that are behind once it is taken."""

    step: int
    indices: list[int]
    examples_seen: int


def _read(examples: Sequence[Example], settings: FitSettings, rank: int, work: _Work) -> list[Batch]:
    """A rank's micro-batches of a step."""
    batches = rank_micro_batches(
        examples, work.indices, settings.schedule, rank, settings.pad_token_id, lengths=settings.lengths
    )
    return [pinned(batch) for batch in batches]


def _work(settings: FitSettings) -> Iterator[_Work]:
    """The steps from the first to take to the last."""
    schedule, seen = settings.schedule, 0
    for step, indices in enumerate(step_indices(schedule, settings.seed), start=1):
        # the order is drawn anew from the seed in every call, so that a resumed training finds its place by counting
        seen += sum(schedule.rehearsal is None or index < schedule.rehearsal.first for index in indices)
        if step > settings.start_step:
            yield _Work(step, indices, seen)
        if step == settings.stop_step:
            return


def _losses(batches: Sequence[Batch], counts: StepCounts, settings: FitSettings) -> list[_Part]:
    """The step's micro-batches by their loss, each with what its sum of nats is multiplied by.

    DeepSpeed averages over ranks and divides by the accumulation; world × micro-batches takes that back.
    """
    schedule, rehearsal = settings.schedule, settings.rehearsal
    scale = schedule.world_size * len(batches)
    work = list(zip(batches, counts.missing, strict=True))
    parts = [_Part(work[: schedule.accumulation], scale / max(1, counts.supervised))]
    if rehearsal:
        weight = rehearsal.weight * scale / max(1, counts.rehearsed)
        parts.append(_Part(work[schedule.accumulation :], weight, rehearsal.kind))
    return parts


@dataclass(frozen=True)
class _Part:
    """A step's micro-batches of one loss, each with what the prefix cache lacks of it on all ranks together.

    Attributes:
        weight: what the sum of the loss is multiplied by.
        rehearsal: nll or kl, else None.
    """

    batches: Sequence[tuple[Batch, Sequence[int]]]
    weight: float
    rehearsal: str | None = None


def _take_step(engine: Engine, parts: Sequence[_Part], prefix: Prefix | None) -> Tensor:
    """Forward and backward of each micro-batch, and with the last the optimizer's step.

    Returns:
        The task's loss and the rehearsal's, each summed over this rank's tokens, unscaled, in float64 [2].
    """
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for number, part in enumerate(parts):
        for batch, missing in part.batches:
            inputs = {k: v.to(engine.device, non_blocking=True) for k, v in batch.items()}
            # what is missing is summed over the ranks: under ZeRO-3 all must go one way at a time
            with prefix.around(inputs, missing) if prefix else nullcontext():
                loss = (
                    summed_loss(engine, inputs)
                    if part.rehearsal is None
                    else rehearsal_loss(engine, inputs, part.rehearsal)
                )
            if not loss.requires_grad:
                raise UserError("region: none of the trained tensors takes part in the loss; choose other ones")
            engine.backward(loss * part.weight)
            engine.step()
            total[number] += loss.detach().double()
    return total


def _peak_memory(device: torch.device) -> dict[str, Any]:
    """The most memory so far, as a StepRecord tells it."""
    on_gpu = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {
        "peak_gpu_bytes": on_gpu,
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _check_finite(record: StepRecord, applied: bool) -> None:
    """DeepSpeed leaves out a step whose gradient overflowed, and says so only by `applied`."""
    if not math.isfinite(record.loss):
        what = f"the loss is {record.loss}"
    elif record.rehearsal_loss is not None and not math.isfinite(record.rehearsal_loss):
        what = f"the rehearsal loss is {record.rehearsal_loss}"
    elif not (math.isfinite(record.grad_norm) and applied):
        what = "the gradient is not finite"
    else:
        return
    raise UserError(f"{what} in step {record.step}: training diverged; lower train.learning_rate")


def _agree(total: Tensor, signum: int) -> tuple[float, float, int]:
    """In one reduction: the ranks' summed losses [2], and a signal that any of them was given, or 0."""
    flags = torch.tensor([float(signum == s) for s in STOP_SIGNALS], dtype=total.dtype, device=total.device)
    task, rehearsal, *ranks = all_reduce_sum(torch.cat([total, flags])).tolist()
    return task, rehearsal, next((int(s) for s, count in zip(STOP_SIGNALS, ranks, strict=True) if count), 0)
