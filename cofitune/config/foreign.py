"""Configs of other programs: recognised by their keys, and answered with the keys here."""

from __future__ import annotations

from cofitune.config.hints import RENAMES, UNSUPPORTED

# program → keys of which it has the first, and one of the others
MARKS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "DeepSpeed": (
        ("zero_optimization", "train_micro_batch_size_per_gpu", "train_batch_size"),
        ("zero_optimization", "train_micro_batch_size_per_gpu", "train_batch_size"),
    ),
    "LLaMA-Factory": (
        ("model_name_or_path",),
        ("finetuning_type", "cutoff_len", "stage", "template", "dataset_dir", "do_train"),
    ),
    "Axolotl": (
        ("base_model",),
        ("datasets", "sequence_len", "micro_batch_size", "adapter", "load_in_8bit", "load_in_4bit", "val_set_size"),
    ),
    "TRL or transformers": (
        ("model_name_or_path",),
        ("dataset_name", "learning_rate", "per_device_train_batch_size", "output_dir", "num_train_epochs"),
    ),
}
SWIFT = ("train_type", "tuner_type", "sft_type", "torch_dtype", "lora_rank")  # of which ms-swift has one beside `model`
HERE = {"adapter": "adapter: {kind: lora}", "model": "model.name", "checkpointer": "model.name, a Hugging Face folder"}
SHOWN = 12


def recognise(data: dict[str, object], path: str, paths: dict[str, list[str]]) -> str | None:
    """What to say of another program's config; None for what is none.

    Args:
        data: the file as read.
        path: the file's name, for the message.
        paths: the schema's keys → their dotted places.
    """
    program = _program(data)
    if program is None:
        return None
    if program == "DeepSpeed":
        return (
            f"{path}: this is a config of DeepSpeed; put its keys into deepspeed.raw of a cofitune config "
            "(zero_optimization.stage, batch sizes, optimizer and bf16 have keys of their own: deepspeed.zero_stage, "
            "train.*, model.dtype); `cofitune init` writes a config"
        )
    known = {key: _meant(key, paths) for key in data}
    lines = [f"{key} → {meant}" for key, meant in known.items() if meant][:SHOWN]
    return (
        f"{path}: this is a config of {program}; here settings stand in sections, and are called:\n    "
        + "\n    ".join(lines)
        + "\n  `cofitune init --model NAME --data FILE` writes a config to begin with"
    )


def _program(data: dict[str, object]) -> str | None:
    if any(isinstance(section, dict) and "_component_" in section for section in data.values()):
        return "torchtune"
    if isinstance(data.get("model"), str) and _any(data, SWIFT):
        return "ms-swift"
    if "model" in data and "model_name_or_path" not in data and "base_model" not in data:
        return None
    return next((name for name, (first, others) in MARKS.items() if _any(data, first) and _any(data, others)), None)


def _any(data: dict[str, object], keys: tuple[str, ...]) -> bool:
    return any(key in data for key in keys)


def _meant(key: str, paths: dict[str, list[str]]) -> str | None:
    if key in UNSUPPORTED:
        return f"not supported: {UNSUPPORTED[key]}"
    if key in HERE:
        return HERE[key]
    if key in RENAMES:
        return RENAMES[key]
    found = paths.get(key, [])
    return found[0] if found else None
