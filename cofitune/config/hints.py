"""What other programs call a setting, and what to write here instead: for unknown keys, options and whole configs."""

from __future__ import annotations

from collections.abc import Sequence

RENAMES = {  # a key of other programs → ours
    "lr": "train.learning_rate",
    "peak_lr": "train.learning_rate",
    "epochs": "train.num_train_epochs",
    "num_epochs": "train.num_train_epochs",
    "batch_size": "train.per_device_train_batch_size",
    "micro_batch_size": "train.per_device_train_batch_size",
    "train_batch_size": "train.per_device_train_batch_size",
    "train_micro_batch_size_per_gpu": "train.per_device_train_batch_size",
    "grad_accum": "train.gradient_accumulation_steps",
    "grad_accum_steps": "train.gradient_accumulation_steps",
    "accumulate_grad_batches": "train.gradient_accumulation_steps",
    "scheduler": "train.lr_scheduler_type",
    "lr_scheduler": "train.lr_scheduler_type",
    "warmup": "train.warmup_ratio, a share of the steps",
    "warmup_steps": "train.warmup_ratio, a share of the steps",
    "grad_clip": "train.max_grad_norm",
    "gradient_clipping": "train.max_grad_norm",
    "adam_beta1": "train.adam_betas: [0.9, 0.95]",
    "adam_beta2": "train.adam_betas: [0.9, 0.95]",
    "eval_steps": "train.validation_steps",
    "wandb_project": "train.report_to: wandb, and WANDB_PROJECT in the environment",
    "use_wandb": "train.report_to: wandb",
    "resume_from_checkpoint": "the option --resume",
    "model_name": "model.name",
    "model_name_or_path": "model.name",
    "base_model": "model.name",
    "model_path": "model.name",
    "torch_dtype": "model.dtype",
    "precision": "model.dtype",
    "mixed_precision": "model.dtype",
    "bf16": "model.dtype: bfloat16",
    "flash_attention": "model.attn_implementation: flash_attention_2",
    "flash_attn": "model.attn_implementation: flash_attention_2",
    "use_flash_attn": "model.attn_implementation: flash_attention_2",
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "data_path": "data.train",
    "train_file": "data.train",
    "train_data": "data.train",
    "eval_dataset": "data.validation",
    "validation_file": "data.validation",
    "val_data": "data.validation",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "seq_length": "data.max_length",
    "sequence_len": "data.max_length",
    "model_max_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "chat_template": "data.template",
    "train_on_inputs": "data.train_on: all",
    "sample_packing": "data.packing",
    "optim": "train.optimizer, adamw or adamw_8bit",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "use_rslora": "adapter.rslora",
    "use_dora": "adapter.kind: dora",
    "layers_to_transform": "adapter.layers",
    "lora_target": "adapter.target_modules",
    "lora_target_modules": "adapter.target_modules",
    "finetuning_type": "region (part of the model), region: {match: '.*'} (all of it) or adapter: {kind: lora}",
    "train_type": "region (part of the model), region: {match: '.*'} (all of it) or adapter: {kind: lora}",
    "tuner_type": "region (part of the model), region: {match: '.*'} (all of it) or adapter: {kind: lora}",
    "stage": "deepspeed.zero_stage, where ZeRO is meant; all training here is supervised",
    "zero_optimization": "deepspeed.raw.zero_optimization",
    "offload": "deepspeed.offload_optimizer and deepspeed.offload_param",
    "freeze_layers": "region.layers, the layers that do train",
    "freeze": "region, which says what does train",
    "trainable_layers": "region.layers",
    "target_modules": "region.modules, or adapter.target_modules",
    "num_gpus": "the option --num-processes",
    "save_dir": "output_dir",
    "out_dir": "output_dir",
}
QUANTISED = "quantised weights are not trained; deepspeed.zero_stage: 3 with offload_param: cpu saves memory"
CONVERTED = (
    "`cofitune convert NAME --to FOLDER` writes plain weights once, dequantised or with an adapter merged; name that "
    "folder in model.name"
)
UNSUPPORTED = {  # a key of other programs → what is there instead
    "load_in_4bit": QUANTISED,
    "load_in_8bit": QUANTISED,
    "quantization_bit": QUANTISED,
    "fp16": "train in bfloat16 (model.dtype: bfloat16), whose range needs no loss scaling",
    "fsdp": "weights are sharded by DeepSpeed: deepspeed.zero_stage: 3",
    "device_map": "each rank has one device; --num-processes says how many ranks",
    "val_set_size": "nothing is split off by itself; name a file of its own in data.validation",
    "logging_steps": "every step is a line of train/metrics.jsonl; leave it out",
    "group_by_length": "a step's items are dealt to micro-batches by length already; leave it out",
    "dataloader_num_workers": "items are tokenized once, into a memory map; leave it out",
    "neftune_noise_alpha": "there is no noise on embeddings; leave it out",
    "label_smoothing_factor": "the loss is plain cross-entropy; leave it out",
    "push_to_hub": "nothing is uploaded by a training; `cofitune export RUN --to FOLDER --push-to-hub ORG/NAME` does",
    "dequantize": CONVERTED,
    "dequantise": CONVERTED,
    "adapter_name_or_path": CONVERTED,
    "lora_path": CONVERTED,
    "tokenizer": "the model's own tokenizer is used; leave it out",
    "tokenizer_name": "the model's own tokenizer is used; leave it out",
    "ref_model": "training here is supervised: no DPO, no reward model",
    "reward_model": "training here is supervised: no DPO, no reward model",
}
OPTIONS = {  # options of other programs → ours
    "config": "the config is the first argument: cofitune train CONFIG.yaml",
    "config_file": "the config is the first argument: cofitune train CONFIG.yaml",
    "nproc_per_node": "the option is --num-processes",
    "num_processes": "the option is --num-processes",
    "num_gpus": "the option is --num-processes",
    "gpus": "the option is --num-processes",
    "dry_run": "the option is --dry-run",
    "force": "the option is --overwrite",
    "resume_from_checkpoint": "the option is --resume; it finds the newest checkpoint itself",
    "deepspeed": "DeepSpeed's keys stand in the config, under deepspeed.raw",
    "set": "overrides need no option: cofitune train CONFIG.yaml train.learning_rate=1e-4",
}
DTYPES = {"bf16": "bfloat16", "fp32": "float32", "torch.bfloat16": "bfloat16", "torch.float32": "float32"}
HALF = ("fp16", "float16", "half", "torch.float16")


def key_hint(name: str, section: Sequence[str | int], paths: dict[str, list[str]]) -> str | None:
    """What to write instead of an unknown key; None where nothing is known of it.

    Args:
        name: the key alone.
        section: where it was written.
        paths: the schema's keys → their dotted places.
    """
    key = name.lower().replace("-", "_")
    if (*section, key) == ("model", "adapter"):  # the section `adapter` is of what is trained
        return f"not supported: {CONVERTED}"
    if key in UNSUPPORTED:
        return f"not supported: {UNSUPPORTED[key]}"
    if key in RENAMES:
        return f"here it is {RENAMES[key]}"
    found = paths.get(key, [])
    if key != name and found and found[0].split(".")[:-1] == list(section):
        return f"did you mean '{key}'?"
    return f"it stands in another section: {' or '.join(found[:3])}" if found else None


def section_hint(place: Sequence[str | int], given: object) -> str:
    """What to write where a section is meant and a text was given, behind the text; empty where nothing is known."""
    if not isinstance(given, str):
        return ""
    if tuple(place) == ("model",):
        return f"; write model: {{name: {given}}}"
    if tuple(place) == ("deepspeed",):
        return (
            "; a file is not read: put its keys under deepspeed.raw (zero_optimization.stage is deepspeed.zero_stage)"
        )
    if tuple(place) == ("data",):
        return f"; write data: {{train: [{given}]}}"
    if tuple(place) == ("region",):
        return f"; write region: {{layers: {given}}}"
    return ""


def option_hint(name: str, paths: dict[str, list[str]]) -> str | None:
    """What to type instead of an unknown option; None where nothing is known of it."""
    text = name.lstrip("-").partition("=")[0]
    last = text.rsplit(".", maxsplit=1)[-1].replace("-", "_").lower()
    if "." not in text and last in OPTIONS:
        return OPTIONS[last]
    if last in UNSUPPORTED:
        return f"not supported: {UNSUPPORTED[last]}"
    renamed = RENAMES.get(last, "").partition(",")[0].partition(":")[0]
    found = [text] if text in paths.get(last, ()) else [renamed] if renamed else paths.get(last, [])
    if not found or " " in found[0]:
        return None
    return f"a setting of the config is written without dashes: {found[0]}=VALUE"
