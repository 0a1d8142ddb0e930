"""Running out of memory: what is proposed, and one message from a training that really does."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig

from cofitune.errors import UserError
from cofitune.model.anatomy import read_anatomy
from cofitune.model.region import resolve_region
from cofitune.ranks import VARIABLES
from cofitune.training.engine import EngineSettings
from cofitune.training.memory import Footprint
from cofitune.training.out_of_memory import explaining_out_of_memory, ways_out
from tests.helpers import write_jsonl

LLAMA_7B = read_anatomy(LlamaConfig(intermediate_size=11008, vocab_size=32000))
SETTINGS = EngineSettings(
    zero_stage=3, offload_optimizer="none", offload_param="none", raw={}, dtype=torch.bfloat16, micro_batch=16,
    accumulation=2, learning_rate=4e-5, weight_decay=0.1, adam_betas=(0.9, 0.95), adam_epsilon=1e-8, max_grad_norm=1.0,
    lr_scheduler_type="cosine", warmup_ratio=0.03, num_steps=10,
)  # fmt: skip
RUN = Footprint(LLAMA_7B, resolve_region("25%-50%", ("up_proj", "down_proj"), 32), SETTINGS, 2, 512, 0)


def names(run: Footprint, on_gpu: bool = True) -> list[str]:
    return [way.split(":")[0].split()[0] for way in ways_out(run, on_gpu)]


def test_what_leaves_the_training_the_same_comes_first() -> None:
    message = ways_out(RUN, on_gpu=True)
    assert message[0].startswith(
        "train.per_device_train_batch_size: 8 with train.gradient_accumulation_steps: 4 (the same training): about "
    )
    assert names(RUN) == [
        "train.per_device_train_batch_size", "train.gradient_checkpointing", "deepspeed.offload_optimizer",
        "deepspeed.offload_param", "data.max_length", "twice",
    ]  # fmt: skip


def test_only_what_this_run_has_not_yet_is_proposed() -> None:
    frugal = replace(SETTINGS, micro_batch=1, offload_optimizer="cpu", offload_param="cpu")
    assert "train.per_device_train_batch_size" not in names(replace(RUN, settings=frugal))
    assert "deepspeed.offload_optimizer" not in names(replace(RUN, settings=frugal))
    assert "train.gradient_checkpointing" not in names(replace(RUN, checkpointed=RUN.depth))
    unable = replace(LLAMA_7B, can_recompute=False)
    assert "train.gradient_checkpointing" not in names(replace(RUN, anatomy=unable)), "it would be refused"
    assert "deepspeed.zero_stage" in names(replace(RUN, settings=replace(SETTINGS, zero_stage=2)))
    one_rank = replace(RUN, settings=replace(SETTINGS, zero_stage=2), world_size=1)
    assert "deepspeed.zero_stage" not in names(one_rank), "one rank has nothing to shard over"
    assert not any(name.startswith("deepspeed.offload") for name in names(RUN, on_gpu=False))


def test_the_words_give_the_savings_of_the_plan() -> None:
    half = replace(RUN, settings=replace(SETTINGS, micro_batch=8, accumulation=4))
    saved = (RUN.memory.device - half.memory.device) / 2**30
    assert ways_out(RUN, on_gpu=True)[0].endswith(f": about {saved:.1f} GiB less")


def test_the_same_training_is_said_of_what_takes_the_same_items_alone() -> None:
    odd = replace(RUN, settings=replace(SETTINGS, micro_batch=9, accumulation=1))
    message = ways_out(odd, on_gpu=True)
    assert message[0].startswith(
        "train.per_device_train_batch_size: 3 with train.gradient_accumulation_steps: 3 (the same"
    )
    assert message[-1].startswith("twice as many ranks, with twice the items in an optimizer step: about")
    assert "with train.gradient_accumulation_steps: 1 (the same training)" in ways_out(RUN, on_gpu=True)[-1]


def test_a_host_without_memory_beside_gpus_is_not_told_to_offload_more(monkeypatch: pytest.MonkeyPatch) -> None:
    offloading = replace(RUN, settings=replace(SETTINGS, offload_optimizer="cpu", offload_param="cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="out of memory on the host") as raised, explaining_out_of_memory(offloading):
        raise MemoryError
    ways = [line for line in str(raised.value).splitlines() if line.startswith("  - ")]
    assert [way.split(" (")[0] for way in ways] == [
        "  - deepspeed.offload_param: none", "  - deepspeed.offload_optimizer: none",
    ]  # fmt: skip
    # 7B in bfloat16; 16 bytes a trained weight
    assert "about 12.6 GiB less" in ways[0] and f"about {721_420_288 * 16 / 2**30:.1f} GiB less" in ways[1]
    with pytest.raises(UserError, match="on the GPU") as raised, explaining_out_of_memory(RUN):
        raise RuntimeError("CUDA error: out of memory")
    assert "train.per_device_train_batch_size" in str(raised.value)


def test_other_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match="ours"), explaining_out_of_memory(RUN):
        raise RuntimeError("ours")


def test_a_gpu_without_memory_is_named() -> None:
    message = r"(?s)out of memory on the GPU: CUDA out of memory.*\n  - train\.per_device"
    with pytest.raises(UserError, match=message), explaining_out_of_memory(RUN):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


# the limit is set once a small training has loaded all libraries and begun their threads, which abort where there is no
# memory for one more: to what is mapped then, and 400 MiB
LIMITED = """
import resource, sys
from cofitune import cli

path = sys.argv[1]
sys.argv = ["cofitune", "train", path, "train.per_device_train_batch_size=8", f"output_dir={path}.small"]
try:
    cli.main()
except SystemExit as end:
    assert not end.code
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 400 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.argv = ["cofitune", "train", path]
cli.main()
"""


@pytest.mark.processes
@pytest.mark.interpreter  # its memory is limited to what it has after its imports
def test_a_training_that_runs_out_of_memory_says_what_to_change(tmp_path: Path, tiny_model_folder: Path) -> None:
    # many items: one tensor more is far larger than what a library allocates for a thread, without which it aborts
    items = [{"instruction": "Say void. " * 40, "output": "void " * 40} for _ in range(1024)]
    write_jsonl(tmp_path / "items.jsonl", items)
    config = {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"train": str(tmp_path / "items.jsonl")},
        "train": {"per_device_train_batch_size": 1024, "max_steps": 1, "gradient_checkpointing": False},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "c.yaml")],
        env={k: v for k, v in os.environ.items() if k not in VARIABLES} | {"MALLOC_ARENA_MAX": "1"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "error: out of memory on the host: " in done.stderr
    assert "train.per_device_train_batch_size: 512 with train.gradient_accumulation_steps: 4" in done.stderr
    assert "Traceback" not in done.stderr
