"""The cases that two real ranks and one plain PyTorch process both compute, and the worker that runs them on a rank."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from cofitune.data.batches import Plan, collate, plan_steps
from cofitune.data.chat import IGNORED, Example
from cofitune.importance_file import unit_counts
from cofitune.model.anatomy import Anatomy, anatomy_of
from cofitune.model.region import Region, freeze_outside, resolve_region
from cofitune.softmask.columns import build_column_factors
from cofitune.softmask.factors import Factor, build_factors
from cofitune.training.engine import EngineSettings
from tests.helpers import freeze_imports

VOCAB, LAYERS, STEPS, WORLD, MICRO, ACCUMULATION, SEED = 64, 4, 5, 2, 2, 2, 5
VALIDATION = 5  # items: at the second forward there is one for two ranks
M = TypeVar("M", bound=PreTrainedModel)
ALL_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Case:
    """One way to train; `name` also names its file."""

    name: str
    mask: str = "none"
    zero_stage: int = 3
    modules: tuple[str, ...] = ("up_proj", "down_proj")
    checkpointing: bool = False
    bias: bool = False
    sharded_loading: bool = False
    offload: bool = False
    bf16: bool = False
    raw_sub_group: int | None = None
    max_grad_norm: float = 1.0
    accumulation: int = ACCUMULATION
    prefix_cache: bool = False
    optimizer: str = "adamw"
    experts: bool = False
    axis: str = "rows"

    def row(self) -> str:
        """The case as the first columns of a table."""
        offload = "offload" if self.offload else "device"
        checkpointing = "checkpoints" if self.checkpointing else "activations"
        kept = "prefix" if self.prefix_cache else ""
        return (
            f"{self.name:26}  {self.zero_stage}  {offload:7}  x{self.accumulation}  {checkpointing:11}  "
            f"{self.mask:8}  {kept:6}"
        )


def _matrix() -> tuple[Case, ...]:
    """Every ZeRO stage × offload × mask; accumulation and checkpointing alternate over them."""
    cases = []
    for number, (stage, offload, mask) in enumerate(product((1, 2, 3), (False, True), ("none", "gradient", "update"))):
        name = f"stage_{stage}_{'offload' if offload else 'device'}_{mask}"
        accumulation, checkpointing = 1 + number % 2, number % 4 < 2
        cases.append(Case(name, mask, stage, ALL_MODULES, checkpointing, offload=offload, accumulation=accumulation))
    return tuple(cases)


CASES = (
    *_matrix(),
    Case("plain"),
    Case("gradient", "gradient", modules=ALL_MODULES),
    Case("update", "update", modules=ALL_MODULES),
    Case("update_bias", "update", modules=ALL_MODULES, bias=True),
    Case("update_sub_groups", "update", modules=ALL_MODULES, raw_sub_group=700),
    Case("update_no_clip", "update", max_grad_norm=0.0),
    Case("update_sharded_loading", "update", sharded_loading=True),
    Case("update_bf16", "update", modules=ALL_MODULES, bf16=True),
    Case("update_bf16_stage_2", "update", zero_stage=2, modules=ALL_MODULES, bf16=True),
    Case("update_checkpointed", "update", checkpointing=True),
    Case("prefix_stage_1", "update", zero_stage=1, prefix_cache=True),
    Case("prefix_stage_2", "gradient", zero_stage=2, prefix_cache=True, checkpointing=True),
    Case("prefix_stage_3", "update", prefix_cache=True, checkpointing=True),
    Case("prefix_stage_3_offload", "none", prefix_cache=True, offload=True, accumulation=1),
    Case("prefix_sharded_loading", "update", prefix_cache=True, sharded_loading=True),
    Case("columns_stage_1", "update", zero_stage=1, modules=ALL_MODULES, axis="columns"),
    Case("columns_stage_2", "update", zero_stage=2, modules=ALL_MODULES, axis="columns", bias=True),
    Case("columns_stage_3", "update", modules=ALL_MODULES, axis="columns", raw_sub_group=700),
    Case("columns_gradient", "gradient", modules=ALL_MODULES, axis="columns", checkpointing=True),
    Case("experts_stage_2", "update", zero_stage=2, modules=("o_proj", "experts"), experts=True),
    Case("experts_stage_3", "update", modules=("o_proj", "experts"), experts=True, checkpointing=True),
    Case("experts_gradient", "gradient", modules=("experts",), experts=True, accumulation=1),
)


def tiny_model(bias: bool = False) -> LlamaForCausalLM:
    """Grouped queries (4 heads, 2 key/value heads) and no square weight among up, down, k, v."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=52,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attention_bias=bias,
        mlp_bias=bias,
    )
    return _away_from_zero(LlamaForCausalLM(config))


def tiny_mixture() -> Qwen3MoeForCausalLM:
    """Four experts in each layer, of which a token passes through two."""
    torch.manual_seed(SEED)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=52,
        moe_intermediate_size=20,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return _away_from_zero(Qwen3MoeForCausalLM(config))


def model_of(case: Case) -> Any:
    """The model of a case."""
    return tiny_mixture() if case.experts else tiny_model(case.bias)


def _away_from_zero(model: M) -> M:
    """So that weight decay shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def tiny_examples() -> list[Example]:
    """Thirteen items and prompts of unequal length; eight items fill a step, so every other step is short."""
    generator = torch.Generator().manual_seed(SEED)
    examples = []
    for _ in range(13):
        length = int(torch.randint(6, 22, (1,), generator=generator))
        prompt = int(torch.randint(2, 5, (1,), generator=generator))
        ids = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        examples.append(Example(ids, [IGNORED] * prompt + ids[prompt:]))
    return examples


def region_of(case: Case) -> Region:
    """Two middle layers, so that frozen layers lie on both sides."""
    return resolve_region("25%-75%", case.modules, LAYERS, (*ALL_MODULES, "experts"))


def importance_of(anatomy: Anatomy, axis: str = "rows") -> dict[str, Tensor]:
    """A distinct importance for every unit; unit 1 of every kind has exactly 1 and must not move in update mode."""
    generator = torch.Generator().manual_seed(SEED)
    counts = unit_counts(anatomy, axis)
    importance = {kind: torch.rand(LAYERS, units, generator=generator) for kind, units in counts.items()}
    for values in importance.values():
        values[:, 1] = 1.0
    return importance


def factors_of(case: Case, anatomy: Anatomy) -> dict[str, Factor]:
    """The soft mask of a case."""
    if case.mask == "none":
        return {}
    build = build_column_factors if case.axis == "columns" else build_factors
    return build(importance_of(anatomy, case.axis), region_of(case), case.modules, anatomy)


def plan_of(case: Case) -> Plan:
    """Five steps: more than one pass, whose last step is short."""
    return plan_steps(13, MICRO, case.accumulation, WORLD, 1, STEPS)


def settings_of(case: Case) -> EngineSettings:
    """Weight decay large enough that forgetting to mask it would show."""
    raw = {"zero_optimization": {"sub_group_size": case.raw_sub_group}} if case.raw_sub_group else {}
    return EngineSettings(
        zero_stage=case.zero_stage,
        offload_optimizer="cpu" if case.offload else "none",
        offload_param="cpu" if case.offload and case.zero_stage == 3 else "none",
        raw=raw,
        dtype=torch.bfloat16 if case.bf16 else torch.float32,
        micro_batch=MICRO,
        accumulation=case.accumulation,
        learning_rate=5e-3,
        weight_decay=0.3,
        adam_betas=(0.9, 0.95),
        adam_epsilon=1e-8,
        max_grad_norm=case.max_grad_norm,
        lr_scheduler_type="cosine",
        warmup_ratio=0.2,
        num_steps=STEPS,
        optimizer=case.optimizer,
    )


def start_case(case: Case, folder: Path, settings: EngineSettings) -> tuple[Any, list[str], Any]:
    """Load, freeze, mask and wrap a case's model through the product's own path: model, trained names, engine."""
    from cofitune.model.load import load_model
    from cofitune.softmask.gradient import mask_gradients
    from cofitune.softmask.update import mask_updates
    from cofitune.training import engine as engines
    from cofitune.zero import inner_optimizer, shards

    if case.sharded_loading:
        engines.SHARDED_LOADING_FROM = 1
        with engines.sharded_loading(10**6, settings, WORLD):
            model = load_model(str(folder / "model"), torch.float32)
    else:
        model = model_of(case).to(settings.dtype)
    anatomy = anatomy_of(model)
    region = region_of(case)
    names = region.parameter_names(anatomy)
    freeze_outside(model, set(names))
    if case.checkpointing:
        engines.checkpoint_layers(model, anatomy.layout.layers, region.first)
    factors = factors_of(case, anatomy)
    if case.mask == "gradient":
        mask_gradients(model, factors)
    engine = engines.start_engine(model, settings)
    if case.mask == "update":
        in_pieces = 512 if settings.zero_stage < 3 else None
        mask_updates(inner_optimizer(engine), shards(engine), factors, elements=in_pieces)
    return model, names, engine


def run_case(case: Case, folder: Path) -> None:
    """Train one case on this rank; rank 0 writes every parameter."""
    from cofitune.files import write_json, write_tensors
    from cofitune.training.delta import collect
    from cofitune.training.hashing import hash_parameters
    from cofitune.training.layer_input import check_replay
    from cofitune.training.loop import FitSettings, StepRecord, fit
    from cofitune.training.loss import summed_loss
    from cofitune.training.prefix_cache import PrefixCache, PrefixPlan
    from cofitune.training.validation import validate

    model, names, engine = start_case(case, folder, settings_of(case))
    frozen = [n for n, _ in model.named_parameters() if n not in set(names)]
    before = hash_parameters(model, frozen)
    losses: list[float] = []
    examples, ran = tiny_examples(), []
    lengths = [len(e.input_ids) for e in examples]
    anatomy, first, dtype = anatomy_of(model), region_of(case).first, settings_of(case).dtype
    kept = PrefixPlan(anatomy.layout.layers, first, lengths, anatomy.hidden_size, dtype, folder)
    prefix = PrefixCache(model, kept) if case.prefix_cache else None
    if prefix and prefix.highest:
        item = collate(examples[:1], 0)
        check_replay(engine, prefix.highest, lambda: summed_loss(engine, item), "train.prefix_cache")
    model.model.layers[0].register_forward_hook(lambda layer, *_: ran.append(1) if layer.training else None)

    def on_step(record: StepRecord, _: int) -> None:
        losses.append(record.loss)
        if record.step == 4:  # in the middle: what follows must not notice
            validate(engine, examples[:VALIDATION], MICRO, 0, record.step)

    fit(engine, examples, FitSettings(plan_of(case), SEED, 0), on_step, prefix=prefix)
    validation = validate(engine, examples[:VALIDATION], MICRO, 0, STEPS)
    frozen_forwards = len(ran)
    after = hash_parameters(model, frozen)
    engine.eval()
    with torch.no_grad():
        logits = engine(input_ids=torch.arange(20)[None]).logits
    tensors = collect(model, [n for n, _ in model.named_parameters()])
    if torch.distributed.get_rank() == 0:
        write_tensors(folder / f"{case.name}.safetensors", tensors)
        write_tensors(folder / f"{case.name}.logits.safetensors", {"logits": logits.contiguous()})
        message = {"losses": losses, "before": before, "after": after, "frozen_forwards": frozen_forwards}
        message["validation"] = validation.as_dict()
        write_json(folder / f"{case.name}.json", message)
    engine.destroy()


def main() -> None:
    """What every rank runs: all cases in one start."""
    from cofitune.training.engine import start_distributed

    torch.set_num_threads(1)
    start_distributed()
    freeze_imports()
    for case in CASES:
        run_case(case, Path(sys.argv[1]))
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
