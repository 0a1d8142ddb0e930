"""vLLM: whether it can answer here, and a model in it. It is one process that takes all GPUs."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from cofitune.errors import UserError
from cofitune.ranks import this_rank

if TYPE_CHECKING:
    from vllm import LLM

LOG_LEVEL = "VLLM_LOGGING_LEVEL"


def is_installed() -> bool:
    """Whether there is a vLLM in this environment."""
    return importlib.util.find_spec("vllm") is not None


def vllm_version() -> str:
    """Its version; builds for CPUs are packages of other names."""
    import vllm

    return str(vllm.__version__)


def is_one_of_several(asked_for_ranks: bool = False) -> bool:
    """Whether several ranks answer: they are to be started, or this process is one of several."""
    return asked_for_ranks or this_rank().world_size > 1


def check_vllm(key: str, asked_for_ranks: bool = False) -> None:
    """Check that vLLM can answer here.

    Args:
        key: of the config, which asks for it.
        asked_for_ranks: whether several ranks are to answer.

    Raises:
        UserError: it is not installed, or several ranks are asked for.
    """
    if not is_installed():
        raise UserError(f"{key}: vllm is not installed here; use transformers, or an environment with vllm")
    if is_one_of_several(asked_for_ranks):
        raise UserError(
            f"{key}: vllm is one process that takes all GPUs: leave out --num-processes and --hostfile, torchrun and "
            "srun; or use transformers, whose ranks share the work"
        )


@contextmanager
def vllm_model(
    name: str, revision: str | None, *, dtype: str, max_length: int | None, trust_remote_code: bool = False
) -> Iterator[LLM]:
    """Load a model into vLLM, on all GPUs, for as long as the context lasts.

    Without a GPU (a build of vLLM for CPUs) nothing is compiled: compiling takes minutes, and saves seconds.

    Args:
        name: folder or hub name.
        max_length: tokens that a prompt and its answer may have; None: as the model's config says.
    """
    os.environ.setdefault(LOG_LEVEL, "ERROR")  # else a page of its log stands among ours
    from vllm import LLM

    model = LLM(
        model=name,
        revision=revision,
        dtype=dtype,
        max_model_len=max_length,
        trust_remote_code=trust_remote_code,
        tensor_parallel_size=max(1, torch.cuda.device_count()),
        enforce_eager=not torch.cuda.is_available(),
    )
    try:
        yield model
    finally:
        model.llm_engine.engine_core.shutdown()  # its process holds the memory that the next model needs
        del model
        gc.collect()
