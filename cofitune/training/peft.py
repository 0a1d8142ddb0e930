"""Adapters, through PEFT: put into a model before DeepSpeed wraps it, merged tensor by tensor when it is trained.

The model stays transformers' own (no wrapper around it), so that the loop, the checkpoints and the collecting of
tensors see an adapter's weights as parameters like any other. The base is frozen and never written to: what is merged
are copies. DeepSpeed's ZeRO-3 is told which of an adapter's parameters are read outside of their own module.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cofitune.distributed import broadcast_from_rank_zero
from cofitune.errors import UserError, install
from cofitune.files import write_json, write_tensors
from cofitune.model.anatomy import Anatomy
from cofitune.model.region import Region
from cofitune.training.delta import collect
from cofitune.zero import gathered, register_external_parameters

if TYPE_CHECKING:
    from peft import PeftConfig

NAME = "default"  # PEFT's name of the one adapter, which its files leave out
MAGNITUDE = "lora_magnitude_vector"  # DoRA's norm of each output
PARAMETERS = {"lora": ("lora_A", "lora_B"), "dora": ("lora_A", "lora_B", MAGNITUDE), "osf": ("osf_svd_params",)}


@dataclass(frozen=True)
class AdapterPlan:
    """An adapter, resolved for one model.

    Attributes:
        kind: lora, dora or osf.
        layers: those that carry it, as a config writes them; empty: all.
        paths: the linear modules that carry it, each by its path below a decoder layer.
        weights: names of those modules' weights, in the model's order: what merging will change.
        r, alpha, dropout: LoRA's rank, scale (alpha / r; rslora: alpha / √r) and dropout.
        effective_rank: OSF's share of singular directions that is kept as it is.
        transposed: whether weights are [in, out].
        num_parameters: weights of the adapter, all of which train.
        targets: the carriers as PEFT is told them, where not by `paths`.
    """

    kind: str
    layers: str
    paths: tuple[str, ...]
    weights: tuple[str, ...]
    r: int
    alpha: float
    dropout: float
    rslora: bool
    effective_rank: float
    transposed: bool
    num_parameters: int
    targets: tuple[str, ...] = ()

    @property
    def needs_whole(self) -> bool:
        """Whether it begins with a decomposition or norms of weights, which are then not sharded as they are read."""
        return self.kind != "lora"

    def inside(self, name: str) -> str:
        """Where a parameter of the base lies while the adapter is in the model."""
        module, _, kind = name.rpartition(".")
        return f"{module}.base_layer.{kind}" if f"{module}.weight" in self.weights else name

    def rank(self, shape: tuple[int, ...]) -> int:
        """Directions of a weight of this shape that train."""
        return self.r if self.kind != "osf" else min(shape) - int(min(shape) * self.effective_rank)

    def carriers(self, layer: int, anatomy: Anatomy) -> list[tuple[int, ...]]:
        """[out, in] of each linear module of a layer that carries it."""
        start = f"{anatomy.layout.layers}.{layer}."
        shapes = [anatomy.shapes[name] for name in self.weights if name.startswith(start)]
        return [shape[::-1] if self.transposed else shape for shape in shapes]

    def as_dict(self) -> dict[str, object]:
        """What a manifest says of it."""
        settings = ("effective_rank",) if self.kind == "osf" else ("r", "alpha", "dropout")
        newer = [name for name in ("layers", "rslora") if getattr(self, name)]  # which earlier versions did not know
        result = asdict(self)
        return {"kind": self.kind, "modules": list(self.paths), **{name: result[name] for name in (*settings, *newer)}}


def adapter_text(adapter: Mapping[str, object]) -> str:
    """What `AdapterPlan.as_dict` says, in words.

    Example:
        >>> adapter_text({"kind": "lora", "modules": ["mlp.up_proj"], "r": 8, "alpha": 16.0, "layers": "2-3"})
        'lora (r 8, alpha 16) on mlp.up_proj of layers 2-3'
    """
    numbers = [f"{k} {v:g}" for k, v in adapter.items() if isinstance(v, int | float) and not isinstance(v, bool)]
    settings = ", ".join([*numbers, *(["rslora"] if adapter.get("rslora") else [])])
    layers = f"layers {adapter['layers']}" if adapter.get("layers") else "all layers"
    modules = adapter["modules"]
    names = ", ".join(modules) if isinstance(modules, list | tuple) else str(modules)
    return f"{adapter['kind']} ({settings}) on {names} of {layers}"


def plan_adapter(
    kind: str,
    region: Region,
    anatomy: Anatomy,
    *,
    r: int,
    alpha: float,
    dropout: float,
    effective_rank: float,
    rslora: bool = False,
) -> AdapterPlan:
    """Resolve which weights carry an adapter, and count its own.

    Args:
        region: what carries it; fused modules carry it together.

    Raises:
        UserError: PEFT is not installed, a part of a fused tensor is named alone, or this kind does not fit the model.
    """
    if find_spec("peft") is None:
        raise UserError(f"adapter: needs the package peft: {install('peft')}")
    layout = anatomy.layout
    for module in region.modules:
        apart = [part for part in layout.parts(module) if part not in region.modules]
        if apart:
            raise UserError(
                f"adapter: {module} lies in one tensor with {', '.join(apart)} in this model, and an "
                "adapter sits beside the whole tensor: name them all, or all-linear"
            )
    if kind == "osf" and layout.transposed:
        raise UserError(f"adapter.kind: osf takes linear modules only, and {anatomy.model_type}'s are Conv1D; use lora")
    weights = tuple(name for name in region.parameter_names(anatomy) if name.endswith(".weight"))
    below = re.compile(re.escape(layout.layers) + r"\.\d+\.(.*)\.weight")
    paths = tuple(dict.fromkeys(below.sub(r"\1", name) for name in weights))
    layers = region.layers_text if len(region.layers) < anatomy.num_layers else ""
    plan = AdapterPlan(
        kind, layers, paths, weights, r, alpha, dropout, rslora, effective_rank, layout.transposed, num_parameters=0
    )
    ends = tuple(f".{path}.weight" for path in paths)
    if any(name.endswith(ends) for name in anatomy.shapes.keys() - set(weights)):  # by its end PEFT would find others
        plan = replace(plan, targets=tuple(name.removesuffix(".weight") for name in weights))
    return replace(plan, num_parameters=sum(_num_parameters(plan, anatomy.shapes[name]) for name in weights))


def insert_adapter(model: nn.Module, plan: AdapterPlan, seed: int) -> str | None:
    """Put the adapter into the model and let it alone require gradients. Every rank must call, before the engine.

    What it begins with is drawn from the seed (LoRA, DoRA) or taken from the weights' singular value decomposition
    (OSF). Rank 0's is given to all: a decomposition is unique up to signs only, and ranks may sit on machines that
    differ.

    Returns:
        A hash of what OSF's adapter begins with, which it goes on being counted from; None for the others.
    """
    from peft import inject_adapter_in_model

    torch.manual_seed(seed)
    inject_adapter_in_model(_peft_config(plan), model, NAME)
    own = set(_own_parameters(model, plan))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in own)
    begins = {n: t for n, t in (*model.named_parameters(), *model.named_buffers()) if n in own or "._osf_" in n}
    for tensor in begins.values():
        broadcast_from_rank_zero(tensor.data)
    for module in _carriers(model, plan).values():
        if plan.kind == "osf":
            register_external_parameters(module, module.osf_svd_params[NAME].parameters())
        if plan.kind == "dora":  # the norm's module reads the weight and the product, which are other modules'
            read = (module.base_layer, module.lora_A[NAME], module.lora_B[NAME])
            register_external_parameters(module.lora_magnitude_vector[NAME], (p for m in read for p in m.parameters()))
    if plan.kind != "osf":
        return None
    digest = hashlib.sha256()
    for name in sorted(begins):
        digest.update(name.encode() + begins[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def merged_weights(model: nn.Module, plan: AdapterPlan) -> dict[str, Tensor]:
    """The weights that carry the adapter with it merged in, as PEFT merges them, by their names in the base.

    One weight and its adapter are gathered at a time, and the model is left as it is. Every rank must call; rank 0 gets
    the tensors, others nothing.
    """
    keep = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    results = {}
    for name, module in _carriers(model, plan).items():
        with ExitStack() as whole, torch.no_grad():
            for parameter in module.parameters():
                whole.enter_context(gathered(parameter))
            if keep:
                weight, delta = module.base_layer.weight, module.get_delta_weight(NAME)
                merged = weight.float() + delta.float()
                if plan.kind == "dora":  # with the norm of the forward pass, in its precision
                    magnitude, turned = module.lora_magnitude_vector[NAME], delta.T if plan.transposed else delta
                    scale = (magnitude.weight / magnitude.get_weight_norm(weight, turned, scaling=1)).float()
                    merged *= scale if plan.transposed else scale[:, None]
                results[name] = merged.to(weight.dtype).cpu().contiguous()
    return results


def write_adapter(folder: Path, model: nn.Module, plan: AdapterPlan, base: str) -> None:
    """Write the adapter in PEFT's own format, `adapter_model.safetensors` and `adapter_config.json`. All ranks call.

    Args:
        base: the base model's name, for PEFT to find it by.
    """
    tensors = collect(model, _own_parameters(model, plan))
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    # as PEFT's own files call them
    named = {f"base_model.model.{n.replace(f'.{NAME}', '')}": tensor for n, tensor in tensors.items()}
    named = {n.removesuffix(".weight") if MAGNITUDE in n else n: tensor for n, tensor in named.items()}
    write_tensors(folder / "adapter_model.safetensors", named)
    config = _peft_config(plan).to_dict() | {"base_model_name_or_path": base, "inference_mode": True}
    write_json(folder / "adapter_config.json", {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()})


def _peft_config(plan: AdapterPlan) -> PeftConfig:
    from peft import LoraConfig, OSFConfig

    targets = list(plan.targets or plan.paths)
    if plan.kind == "osf":
        return OSFConfig(effective_rank=plan.effective_rank, target_modules=targets, task_type="CAUSAL_LM")
    scale: Any = plan.alpha  # PEFT asks for a whole number, and takes any: it is divided by r
    return LoraConfig(
        r=plan.r,
        lora_alpha=scale,
        lora_dropout=plan.dropout,
        use_rslora=plan.rslora,
        use_dora=plan.kind == "dora",
        target_modules=targets,
        fan_in_fan_out=plan.transposed,
        task_type="CAUSAL_LM",
    )


def _num_parameters(plan: AdapterPlan, shape: tuple[int, ...]) -> int:
    """Trained weights beside one weight of this shape."""
    if plan.kind != "osf":
        outputs = shape[1 if plan.transposed else 0]
        return plan.r * sum(shape) + (outputs if plan.kind == "dora" else 0)
    free = plan.rank(shape)
    if free == min(shape):
        raise UserError(
            f"adapter.effective_rank: {plan.effective_rank:g} of {min(shape)} singular directions is none; raise it"
        )
    return free * (sum(shape) + 1)


def _carriers(model: nn.Module, plan: AdapterPlan) -> dict[str, Any]:
    """The modules that carry the adapter, by the names of their weights in the base."""
    return {name: model.get_submodule(name.removesuffix(".weight")) for name in plan.weights}


def _own_parameters(model: nn.Module, plan: AdapterPlan) -> list[str]:
    """The adapter's own parameters, in the model's order."""
    parts = PARAMETERS[plan.kind]
    return [name for name, _ in model.named_parameters() if any(f".{part}." in name for part in parts)]


def base_names(plan: AdapterPlan | None, names: Iterable[str]) -> dict[str, str]:
    """Where each of the base's parameters lies in the model now → its name in the base."""
    return {plan.inside(name) if plan else name: name for name in names}
