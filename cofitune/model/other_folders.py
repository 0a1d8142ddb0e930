"""A model's name that is no model for transformers: what else the folder is, or that there is none."""

from __future__ import annotations

from pathlib import Path

LFS = b"version https://git-lfs"
PULL = "it is a Git LFS pointer and not the file itself; fetch it with `git lfs pull`, or `hf download`"
SIGNS = {  # files below a folder, the first that there are → what the folder is
    "train/manifest.json": "it is a run; name its base, or the folder that `cofitune export` writes of it",
    "delta.safetensors": "it is a run's training; name its base, or the folder that `cofitune export` writes of it",
    "model_index.json": "it is a diffusers pipeline, and no language model",
    "snapshots/*/config.json": "it is a folder of the hub's cache; name the hub model, or the folder below snapshots/",
    "*/config.json": "folders below it hold models; name one of them",
    "params.json": "its weights lie as their makers wrote them (params.json); take the model's files for transformers",
    "*.gguf": "it holds GGUF, for llama.cpp; take the model's files for transformers",
    "*.distcp": "it is a checkpoint in parts; gather it into a model first, with the tools of its training",
    "global_step*": "it is a checkpoint of DeepSpeed; gather it first (its zero_to_fp32.py)",
    "*.safetensors": "its weights lie there alone; the model's config.json and tokenizer belong beside them",
}


def what_else(folder: Path) -> str:
    """What a folder without a config.json is, as far as its files tell."""
    found = next((text for pattern, text in SIGNS.items() if any(folder.glob(pattern))), "")
    return found or ("it is empty" if not any(folder.iterdir()) else "name the folder that holds it")


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file only says where Git LFS keeps its content: a clone without git-lfs leaves such files."""
    try:
        with file.open("rb") as opened:
            return opened.read(len(LFS)) == LFS
    except OSError:
        return False


def is_missing_folder(name: str) -> bool:
    """Whether a model's name can only be a folder's, and there is none: the hub would be asked in vain, and again."""
    return not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1)
