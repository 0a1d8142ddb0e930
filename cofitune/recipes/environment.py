"""`cofitune env`: what a bug report should tell: versions, devices and paths; no secrets."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import torch

import cofitune
from cofitune.config.shipped import shipped_folder
from cofitune.files import cache_folder, gib
from cofitune.host_memory import free_memory, usable_memory
from cofitune.recipes.folders import package_version

# only these are shown: the value of another variable may be a key, or hold one
SHOWN = (
    "CUDA_VISIBLE_DEVICES", "COFITUNE_CACHE", "COFITUNE_DATA", "HF_DATASETS_OFFLINE", "HF_HOME", "HF_HUB_CACHE",
    "HF_HUB_OFFLINE", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "RANK",
    "SLURM_JOB_ID", "SLURM_NNODES", "SLURM_NTASKS", "TRANSFORMERS_OFFLINE", "WORLD_SIZE",
)  # fmt: skip
SECRET = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")  # told as set or not


def describe(environ: Mapping[str, str] = os.environ) -> list[tuple[str, str]]:
    """Names and values, in the order in which they are read best."""
    return [*_versions(), *_devices(), *_paths(), *_variables(environ)]


def _versions() -> Iterator[tuple[str, str]]:
    yield "cofitune", cofitune.__version__
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "system", f"{platform.platform()}, {platform.machine()}"
    required = metadata.requires("cofitune") if _is_installed("cofitune") else None
    names = dict.fromkeys(re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in required or ("torch", "transformers"))
    for name in names:
        if name != "cofitune":
            yield name, torch.__version__ if name == "torch" else package_version(name)


def _is_installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


def _devices() -> Iterator[tuple[str, str]]:
    count = torch.cuda.device_count()
    yield "CUDA", f"torch built for {torch.version.cuda}; {count} GPUs" if torch.version.cuda else "torch without CUDA"
    for number in range(count):
        about = torch.cuda.get_device_properties(number)
        bf16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
        yield f"GPU {number}", f"{about.name}, {gib(about.total_memory)}, {bf16}"
    yield "CPU cores", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}"
    yield "memory", f"{gib(free_memory())} free of {gib(usable_memory())}"


def _paths() -> Iterator[tuple[str, str]]:
    yield "package", str(Path(cofitune.__file__).parent)
    yield "configs", str(shipped_folder())
    yield "cache", str(cache_folder())


def _variables(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    yield from ((name, environ[name]) for name in SHOWN if name in environ)
    yield from ((name, "set (not shown)") for name in SECRET if environ.get(name))
