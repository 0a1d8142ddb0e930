"""What `deepspeed.raw` takes: DeepSpeed's keys, of which it ignores unknown ones without a word, and their kinds."""

from __future__ import annotations

from collections.abc import Mapping

from cofitune.errors import did_you_mean

ZERO_KEYS = (  # of its section zero_optimization, offloading and retired names left out
    "allgather_bucket_size", "allgather_partitions", "allgather_sequential", "contiguous_gradients",
    "ignore_unused_parameters", "leaf_module", "log_trace_cache_warnings", "max_live_parameters", "max_reuse_distance",
    "memory_efficient_linear",
    "model_persistence_threshold", "module_granularity_threshold", "overlap_comm", "param_persistence_threshold",
    "prefetch_bucket_size", "reduce_bucket_size", "reduce_scatter", "round_robin_gradients",
    "stage3_allgather_sequential", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold", "stage3_module_granularity_threshold", "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size", "stage3_use_all_reduce_for_fetch_params", "sub_group_size",
    "use_all_reduce_for_fetch_params", "use_multi_rank_bucket_allreduce", "zero_hpz_partition_size",
    "zero_quantized_gradients", "zero_quantized_nontrainable_weights", "zero_quantized_weights",
)  # fmt: skip
OWNED_KEYS = {
    "train_batch_size": "train.per_device_train_batch_size",
    "train_micro_batch_size_per_gpu": "train.per_device_train_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.learning_rate, weight_decay, adam_betas and adam_epsilon",
    "scheduler": "train.lr_scheduler_type and warmup_ratio",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "data_types": "model.dtype",
    "tensorboard": "train.report_to (DeepSpeed's engine would draw the loss as it is scaled for the backward pass)",
    "wandb": "train.report_to (DeepSpeed's engine would draw the loss as it is scaled for the backward pass)",
    "csv_monitor": "train/metrics.jsonl, which is always written",
    "zero_optimization.stage": "deepspeed.zero_stage",
    "zero_optimization.offload_optimizer": "deepspeed.offload_optimizer",
    "zero_optimization.offload_param": "deepspeed.offload_param",
}
NO_EFFECT = {  # keys that DeepSpeed takes and that would change nothing in a training of ours
    "compile": "the engine compiles where its compile() is called, and the modules here are hooked into too often",
    "activation_checkpointing": "layers are checkpointed by transformers: train.gradient_checkpointing",
    "aio": "it is for offloading to NVMe, which is not offered",
    "seq_parallel_communication_data_type": "sequences are not split over ranks",
    "zero_optimization.gather_16bit_weights_on_model_save": "DeepSpeed saves nothing here: the delta has whole tensors",
    "zero_optimization.load_from_fp32_weights": "DeepSpeed loads nothing here: checkpoints are fp32",
}
FLAG, WHOLE, NUMBER, TEXT, NAMES = "true or false", "a whole number", "a number above 0", "a text", "a list of names"
PRECISION = "fp32, fp16 or bf16"
# what DeepSpeed reads besides the keys that other sections of ours own; it would take most values of any kind, and fail
# where it needs them
RAW_KINDS: dict[str, str | Mapping[str, str]] = {
    "comms_logger": {"enabled": FLAG, "prof_all": FLAG, "prof_ops": NAMES, "verbose": FLAG, "debug": FLAG},
    "communication_data_type": PRECISION,
    "dump_state": FLAG,
    "flops_profiler": {
        "enabled": FLAG, "recompute_fwd_factor": NUMBER, "profile_step": WHOLE, "module_depth": WHOLE,
        "top_modules": WHOLE, "detailed": FLAG, "output_file": TEXT,
    },
    "gradient_predivide_factor": NUMBER,
    "memory_breakdown": FLAG,
    "prescale_gradients": FLAG,
    "steps_per_print": WHOLE,
    "wall_clock_breakdown": FLAG,
    "zero_optimization": dict.fromkeys(ZERO_KEYS, ""),  # DeepSpeed checks their kinds, before a model loads
}  # fmt: skip


def check_raw(raw: Mapping[str, object]) -> None:
    """Refuse keys that DeepSpeed does not know, that other settings own or that have no effect, and wrong values.

    Raises:
        ValueError: it names the first such key.
    """
    _check_section("", raw, RAW_KINDS)
    for name, kinds in RAW_KINDS.items():
        if name in raw and not isinstance(kinds, str):
            section = raw[name]
            if not isinstance(section, dict):
                raise ValueError(f"{name} must be a mapping of DeepSpeed's keys, not {section!r:.40}")
            _check_section(f"{name}.", section, kinds)


def _check_section(place: str, section: Mapping[str, object], kinds: Mapping[str, str | Mapping[str, str]]) -> None:
    for name, value in section.items():
        key, kind = f"{place}{name}", kinds.get(name)
        if key in OWNED_KEYS:
            raise ValueError(f"'{key}' is set by {OWNED_KEYS[key]}")
        if key in NO_EFFECT:
            raise ValueError(f"'{key}' would have no effect: {NO_EFFECT[key]}; leave it out")
        if kind is None:
            near = did_you_mean(name, kinds)
            raise ValueError(f"DeepSpeed knows no key '{key}'{near} (accepted: {', '.join(kinds)})")
        if isinstance(kind, str) and kind and not _is_of(kind, value):
            raise ValueError(f"'{key}' must be {kind}, not {value!r:.40}")


def _is_of(kind: str, value: object) -> bool:
    if kind in (WHOLE, NUMBER):
        types = int if kind == WHOLE else int | float
        return isinstance(value, types) and not isinstance(value, bool) and (kind == WHOLE or value > 0)
    if kind == NAMES:
        return isinstance(value, list) and all(isinstance(name, str) for name in value)
    if kind == PRECISION:
        return value in ("fp32", "fp16", "bf16")
    return isinstance(value, bool if kind == FLAG else str)
