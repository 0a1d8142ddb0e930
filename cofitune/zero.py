"""Where DeepSpeed keeps things. The only file that knows its internals: gather a parameter, find a shard's place.

Written for deepspeed 0.19; `flats` is checked against the whole parameters by the tests under every stage.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine as Engine

STAGE_3 = "DeepSpeedZeroOptimizer_Stage3"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Shard:
    """A piece of a parameter inside one of the optimizer's flat fp32 tensors on this rank.

    Attributes:
        name: the parameter's name in the model.
        shape: the whole parameter's shape.
        start: first element, counted in the whole parameter laid out row by row.
        offset: first element, counted in the flat tensor.
        numel: elements on this rank.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    offset: int
    numel: int


@dataclass(frozen=True)
class Flat:
    """A flat fp32 tensor that the inner optimizer steps on: on this rank, the master weights of its shards."""

    tensor: Tensor
    shards: list[Shard]


def skip_cpu_communication_op() -> None:
    """Let CPU ranks talk through gloo alone, before `init_distributed`.

    DeepSpeed would otherwise compile an all-reduce through shared memory at its first start: a minute or more, with a
    C++ compiler, for a speed-up that only CPU training on several ranks would feel.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def skip_muon_compilation() -> None:
    """Load DeepSpeed's Muon uncompiled, before `initialize` loads it to see whether an optimizer is one.

    It would be handed to `torch.compile` as it loads, which loads torch's whole compiler: a second of the start of each
    rank, for an optimizer that nobody can choose here.
    """
    from deepspeed.runtime import compiler

    own = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = own


def skip_unread_messages() -> None:
    """Let stage 3 format no message about its arguments: it is printed nowhere, and holds every parameter's values."""
    from deepspeed.runtime.zero import parameter_offload, stage3

    for module in (parameter_offload, stage3):
        vars(module)["locals"] = dict  # what the message is made of


def skip_profiler_ranges() -> None:
    """Let DeepSpeed open no ranges for NVIDIA's profiler where there is no GPU; it does at every call of a module."""
    from deepspeed.utils import nvtx

    if not torch.cuda.is_available():
        nvtx.enable_nvtx = False


def reset_zero_globals() -> None:
    """Let the next engine of this process begin as its first one did.

    Of stage 3, DeepSpeed counts the weights that stay whole (`stage3_model_persistence_threshold`) over all models that
    there ever were, its stack of running modules keeps the last model, and it knows one division of the ranks for
    second copies of weights (hpZ).
    """
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    reset_linear()
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # an engine with hpZ makes its own, one without must find none
    Init.num_persisted_parameters = Init.num_persisted_elements = 0
    parameter_offload.FWD_MODULE_STACK.clear()


def reset_linear() -> None:
    """Give torch its own linear function back, which stage 3 replaces for the whole process.

    DeepSpeed's keeps its input for the backward pass also where the weight is frozen, and with it so does whatever
    follows in this process.
    """
    from deepspeed.runtime.zero.linear import zero3_linear_wrap
    from deepspeed.runtime.zero.partition_parameters import Init

    own = getattr(Init, "linear_bk", None)  # there once stage 3 has replaced it
    if own is not None and nn.functional.linear is zero3_linear_wrap:
        nn.functional.linear = own


def free_engine(engine: Engine) -> None:
    """Give back the memory of an engine that is destroyed, with its model, which nobody will use again.

    Under stage 3 neither would ever be collected: DeepSpeed makes two autograd functions a module, whose classes Python
    keeps, and from them leads a way to the optimizer with its states and to every parameter.
    """
    if type(engine.optimizer).__name__ != STAGE_3:
        return
    for parameter in engine.module.parameters():
        vars(parameter).clear()  # all of it is DeepSpeed's
        parameter.data, parameter.grad = parameter.data.new_empty(0), None
    inner = inner_optimizer(engine)
    inner.state.clear()
    inner.param_groups.clear()
    vars(engine.optimizer).clear()
    engine.optimizer = None


@contextmanager
def gathered(parameter: nn.Parameter) -> Iterator[Tensor]:
    """Give the whole parameter for reading, whatever the sharding. Every rank must enter."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter.data
    else:
        yield parameter.data


def restore_backward_counters(model: nn.Module, output: Tensor) -> None:
    """Where several forward passes come before a backward pass, let ZeRO-3 see the end of each one's backward.

    In each module it counts the inputs whose gradients are still to come, and shards the module's weights again when it
    has counted down to 0. Every forward pass begins that count again, so that of two passes the first one's backward
    would count on below 0 and leave the whole model gathered. Nothing is done to a model that is not sharded.

    Args:
        output: of the pass that has just ended. When its gradient comes, those of later passes are through: autograd
            runs the newest nodes first.
    """
    counts = [(m, m.ds_grads_remaining) for m in model.modules() if "ds_grads_remaining" in m.__dict__]

    def restore(_: Tensor) -> None:
        for module, count in counts:
            module.ds_grads_remaining = count

    if counts:
        output.register_hook(restore)


def gathered_weights(model: nn.Module) -> int:
    """Weights of a ZeRO-3 model that lie whole on this rank at the moment."""
    parameters: list[Any] = list(model.parameters())  # with what DeepSpeed has put on them
    return sum(p.ds_numel for p in parameters if p.ds_status.name == "AVAILABLE")


def register_external_parameters(module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Have ZeRO-3 gather these for the module's forward and backward, which reads them though they are not its own."""
    import deepspeed

    for parameter in parameters:
        deepspeed.zero.register_external_parameter(module, parameter)


def hold_until_gradients(model: nn.Module) -> None:
    """Let ZeRO-3 keep trained tensors of three dimensions (experts) gathered until their gradients have been taken.

    DeepSpeed releases a module's parameters when the gradients of its inputs are there. Where no input needs one, that
    is at once, and torch then has no parameter to lay the gradient out by ("size of tensor a (0) must match"). So one
    input of such a module gets a gradient; the backward pass still ends there.
    """

    def begin_here(module: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...] | None:
        tensors = [(index, value) for index, value in enumerate(inputs) if isinstance(value, Tensor)]
        if not torch.is_grad_enabled() or any(tensor.requires_grad for _, tensor in tensors):
            return None
        for index, tensor in tensors:
            if tensor.is_floating_point():
                return (*inputs[:index], tensor.detach().requires_grad_(), *inputs[index + 1 :])
        return None

    for name, module in model.named_modules():
        if any(p.requires_grad and len(getattr(p, "ds_shape", p.shape)) > 2 for p in module.parameters(recurse=False)):
            module.register_forward_pre_hook(begin_here)
            # some families' experts DeepSpeed gathers and releases with the block around them ("leaf modules")
            model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(begin_here)


def keep_signatures(model: nn.Module) -> None:
    """Let torch read the signatures of ZeRO-3's autograd functions once, not at every call.

    DeepSpeed calls two of them in each module of each forward pass. torch binds their arguments by a signature that it
    works out anew each time.
    """
    from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3

    functions: list[Any] = [LinearFunctionForZeroStage3]
    for module in model.modules():
        functions += [own for name in ("pre_bwd_fn", "post_bwd_fn") if (own := vars(module).get(name)) is not None]
    for function in functions:
        function.forward.__signature__ = inspect.signature(function.forward)


def inner_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """The optimizer that steps on the fp32 shards, before they are copied to the model's precision."""
    inner: torch.optim.Optimizer = engine.basic_optimizer
    return inner


def flats(engine: Engine) -> list[Flat]:
    """The flat fp32 tensors of this rank, whatever the ZeRO stage, offload and sub-groups.

    Raises:
        RuntimeError: an optimizer class that this file does not know (a DeepSpeed newer than it).
    """
    names = {id(p): name for name, p in engine.module.named_parameters()}
    optimizer = engine.optimizer
    kind = type(optimizer).__name__
    if kind == STAGE_3:
        return _stage3_flats(optimizer, names)
    if kind == "DeepSpeedZeroOptimizer":
        return _stage12_flats(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, names)
    if kind == "BF16_Optimizer":  # stage 1 in bfloat16
        return _stage12_flats(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, names)
    raise RuntimeError(f"DeepSpeed's optimizer {kind} keeps its fp32 weights in a place that we do not know")


def shards(engine: Engine) -> dict[int, list[Shard]]:
    """Map the id of each flat fp32 tensor that the inner optimizer steps on to the shards inside it.

    Raises:
        RuntimeError: an optimizer class that this file does not know (a DeepSpeed newer than it).
    """
    return {id(flat.tensor): flat.shards for flat in flats(engine)}


def moments(engine: Engine, flat: Flat) -> dict[str, Tensor | float]:
    """AdamW's state of a flat tensor: exp_avg and exp_avg_sq [flat.numel], and step; empty before the first step."""
    state: dict[str, Tensor | float] = inner_optimizer(engine).state[flat.tensor]
    return state


def init_adam_state(engine: Engine, step: int) -> None:
    """Give every flat tensor AdamW's state after `step` steps, its moments zeros for the caller to fill."""
    inner = inner_optimizer(engine)
    for flat in flats(engine):
        # a step of its own for each: sub-groups that share one object would count it up together
        where = flat.tensor.device if inner.defaults.get("fused") else None  # as torch begins it: fused reads it there
        counted = torch.tensor(float(step), device=where) if isinstance(inner, torch.optim.AdamW) else step
        zeros = {key: torch.zeros_like(flat.tensor.data) for key in MOMENTS}
        inner.state[flat.tensor] = {"step": counted, **zeros}


def copy_masters_to_model(engine: Engine) -> None:
    """Copy the fp32 weights into the model's precision and share them, as DeepSpeed does after a step. Collective."""
    optimizer = engine.optimizer
    if type(optimizer).__name__ != STAGE_3:
        optimizer.update_lp_params()
        return
    optimizer._partition_all_parameters()
    for index in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(index)
    optimizer._post_step(set())  # small weights are kept whole on every rank
    optimizer.invalidate_secondary_tensor()  # a node's second copy, if there is one, is of the weights before


def go_to_step(engine: Engine, step: int) -> None:
    """Set a fresh engine's counters and its learning rate to those after `step` optimizer steps."""
    engine.global_steps = step
    engine.global_samples = step * engine.train_batch_size()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch expects an optimizer step before each
        for _ in range(step):
            engine.lr_scheduler.step()


def _stage3_flats(optimizer: Any, names: dict[int, str]) -> list[Flat]:
    """Stage 3 cuts each parameter into `world` equal pieces, the last ones padded, a rank's in a row."""
    rank = torch.distributed.get_rank(optimizer.dp_process_group)
    results = []
    for index, group in enumerate(optimizer.fp16_groups):
        pieces = []
        for parameter in group:
            _, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = rank * length
            numel = min(length, parameter.ds_numel - start)
            if numel > 0:
                pieces.append(Shard(names[id(parameter)], tuple(parameter.ds_shape), start, offset, numel))
        results.append(Flat(optimizer.fp32_partitioned_groups_flat[index], pieces))
    return results


def _stage12_flats(groups: list[Any], tensors: list[Tensor], names: dict[int, str]) -> list[Flat]:
    """Stages 1 and 2 lay all parameters in a row and cut the row; `_hp_mapping` says what fell to this rank."""
    results = []
    for group, tensor in zip(groups, tensors, strict=True):
        pieces = []
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:
                whole, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
                shape = tuple(parameter.shape)
                pieces.append(Shard(names[id(parameter)], shape, whole.start, flat.start, flat.numel))
        results.append(Flat(tensor, pieces))
    return results
