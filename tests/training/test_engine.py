"""What DeepSpeed is told."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cofitune.errors import UserError
from cofitune.training.engine import (
    EngineSettings,
    check_config,
    deepspeed_config,
    release,
    start_distributed,
    start_engine,
)

SETTINGS = EngineSettings(
    zero_stage=3, offload_optimizer="none", offload_param="none", raw={}, dtype=torch.bfloat16, micro_batch=2,
    accumulation=4, learning_rate=1e-4, weight_decay=0.1, adam_betas=(0.9, 0.95), adam_epsilon=1e-8, max_grad_norm=1.0,
    lr_scheduler_type="cosine", warmup_ratio=0.03, num_steps=101,
)  # fmt: skip


def test_bf16_accumulates_gradients_in_fp32() -> None:
    config = deepspeed_config(SETTINGS)
    assert config["bf16"] == {"enabled": True}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "data_types" not in deepspeed_config(replace(SETTINGS, dtype=torch.float32))


def test_raw_is_merged_last_section_by_section() -> None:
    raw = {"zero_optimization": {"sub_group_size": 10}, "wall_clock_breakdown": True}
    config = deepspeed_config(replace(SETTINGS, raw=raw))
    assert config["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 10**8, "sub_group_size": 10}
    assert config["wall_clock_breakdown"] is True


def test_offload_goes_to_the_cpu() -> None:
    zero = deepspeed_config(replace(SETTINGS, offload_optimizer="cpu", offload_param="cpu"))["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "cpu"


def test_the_optimizer_is_torchs_where_a_gpu_comes_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime container sets CUDA_HOME and has no nvcc, by which DeepSpeed would build its own."""
    from torch.utils import cpp_extension

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/usr/local/cuda")
    for offload in ("none", "cpu"):
        params = deepspeed_config(replace(SETTINGS, offload_optimizer=offload))["optimizer"]["params"]
        assert params["torch_adam"] is params["fused"] is True


@pytest.mark.parametrize(("ratio", "steps", "expected"), [(0.03, 101, 3), (0.03, 14, 0), (0, 10, 0), (0.5, 3, 1)])
def test_the_warm_up_is_rounded_down_so_that_every_step_trains(ratio: float, steps: int, expected: int) -> None:
    assert replace(SETTINGS, warmup_ratio=ratio, num_steps=steps).warmup_steps == expected


def test_the_accepted_keys_of_raw_are_deepspeeds_own() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from cofitune.config.deepspeed_raw import OWNED_KEYS, ZERO_KEYS

    fields = DeepSpeedZeroConfig.model_fields
    known = {*fields, *(field.alias for field in fields.values() if field.alias)}
    owned = {key.split(".")[1] for key in OWNED_KEYS if "." in key}
    assert set(ZERO_KEYS) <= known and owned <= known


@pytest.mark.processes
def test_a_value_that_deepspeed_refuses_is_a_users_mistake() -> None:
    start_distributed()
    settings = replace(SETTINGS, dtype=torch.float32, raw={"zero_optimization": {"sub_group_size": "many"}})
    with pytest.raises(UserError, match=r"raw: DeepSpeed refuses zero_optimization.sub_group_size: sub_group_size"):
        check_config(settings)
    with pytest.raises(UserError, match=r"raw: DeepSpeed refuses zero_optimization.sub_group_size: sub_group_size"):
        start_engine(torch.nn.Linear(2, 2), settings)
    settings = replace(settings, raw={"gradient_predivide_factor": 2.0})  # which it finds out once it starts
    with pytest.raises(UserError, match=r"refuses gradient_predivide_factor: .*gradient_predivide_factor != 1.0"):
        start_engine(torch.nn.Linear(2, 2), settings)


@pytest.mark.processes
def test_no_start_loads_torchs_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed has its Muon compiled where it loads, at the first engine of a process."""
    start_distributed()
    for name in [name for name in sys.modules if name.startswith("deepspeed.runtime.zero.muon.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("the compiler loads"))
    release(start_engine(torch.nn.Linear(2, 2), replace(SETTINGS, dtype=torch.float32)))
    assert "deepspeed.runtime.zero.muon.muon_optimizer" in sys.modules


@pytest.mark.processes
def test_a_released_engine_leaves_torchs_linear_as_it_was() -> None:
    """Stage 3 replaces it for the whole process by one that keeps the inputs of frozen weights, too."""
    start_distributed()
    own = torch.nn.functional.linear
    engine = start_engine(torch.nn.Linear(2, 2), replace(SETTINGS, dtype=torch.float32))
    assert torch.nn.functional.linear is not own
    release(engine)
    assert torch.nn.functional.linear is own


@pytest.mark.processes
def test_stage_3_works_no_signature_out_at_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch asks for them twice a module and pass."""
    start_distributed()
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.SiLU(), torch.nn.Linear(2, 2))
    engine = start_engine(model, replace(SETTINGS, dtype=torch.float32, micro_batch=1))
    asked: list[Any] = []
    own = inspect.signature

    def signature(function: Any, **options: Any) -> inspect.Signature:
        if function.__name__ == "forward":
            asked.append(function)
        return own(function, **options)

    monkeypatch.setattr(inspect, "signature", signature)
    engine.backward(engine(torch.ones(1, 2)).sum())
    assert len(asked) >= 2 * len(model)
    for function in asked:
        assert own(function) is own(function), "it is kept"
        assert [*own(function).parameters] == [*function.__code__.co_varnames[: function.__code__.co_argcount]]
    release(engine)


@pytest.mark.processes
@pytest.mark.parametrize("stage", [2, 3])
def test_no_start_puts_weights_into_words(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed words a message of all arguments of stage 3, and prints it nowhere."""
    start_distributed()

    def refuse(*_: object, **__: object) -> str:
        raise AssertionError("a tensor was put into words")

    monkeypatch.setattr(torch.Tensor, "__repr__", refuse)
    release(start_engine(torch.nn.Linear(2, 2), replace(SETTINGS, dtype=torch.float32, zero_stage=stage)))


ENDING = """
import sys, time, weakref
import torch
from cofitune.training.engine import start_distributed

start_distributed()
held = torch.distributed.group.WORLD  # as DeepSpeed does
tensor = torch.ones(1)
gone = weakref.ref(tensor, lambda _: time.sleep(0.1))
work = torch.distributed.all_reduce(tensor, async_op=True)
work.get_future().then(lambda _: time.sleep(0.1))
del tensor, work  # gloo's thread is now the last to hold them
while gone() is not None:
    time.sleep(0.005)
sys.exit(7)
"""


@pytest.mark.processes
@pytest.mark.interpreter  # whose own end is the point
def test_a_process_keeps_its_exit_code_while_gloo_lets_go_of_a_tensor(tmp_path: Path) -> None:
    """Found where a training was stopped by a signal: 134 for 143, once in some hundred times."""
    (tmp_path / "ending.py").write_text(ENDING)
    command = [sys.executable, str(tmp_path / "ending.py")]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 7, ended.stderr
