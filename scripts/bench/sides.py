"""The sides of a comparison, each the real thing in a process of its own, taking one optimizer step when told to.

`ours` is `cofitune train`'s plan, engine, mask and loop; `full` and `lora` are Hugging Face's Trainer, `lora` with a
PEFT adapter (r = 8) on every linear module of the layers. All take the same items in the same order, a batch a step.
The parent asks for one step of one side at a time, so that the others' work never falls into a measured step.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import shlex
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes.util import find_library
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

START_METHOD = multiprocessing.get_context("spawn")
PATIENCE = 1800  # seconds for one answer


@dataclass(frozen=True)
class Job:
    """One side of a comparison.

    Attributes:
        name: its column.
        kind: ours | full | lora.
        config: a config of cofitune's; all sides take model, data, batch and schedule from it.
        random_length: None: the model's own weights and the config's data; else random weights in the shape of the
            model's config.json, made on the device, and random items of so many tokens.
        ragged: whether the random items' lengths are drawn from half of that to one and a half of it.
        attention_mask: whether ours gives right-padded rows an attention mask, which they do not need.
    """

    name: str
    kind: str
    config: dict[str, Any]
    random_length: int | None = None
    ragged: bool = False
    attention_mask: bool = False


class Side:
    """The parent's hand on one side's process."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._pipe, theirs = START_METHOD.Pipe()
        self._process = START_METHOD.Process(target=_run, args=(job, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.told = self._receive()  # about the loaded model

    def step(self, what: str = "time", *, give_back: bool = False) -> dict[str, Any]:
        """Take one optimizer step: `time`, count its `flops` or what its backward pass has `saved`, or `profile` it.

        Args:
            give_back: then hand what the heap holds but does not use back to the machine, before other sides have their
                turns: four heaps at their fullest were more than 24 GB. A step that follows takes the memory again page
                by page.
        """
        self._pipe.send((what, give_back))
        return self._receive()

    def stop(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()

    def _receive(self) -> dict[str, Any]:
        if not self._pipe.poll(PATIENCE):
            raise SystemExit(f"{self.job.name}: no answer in {PATIENCE} s")
        try:
            answer: dict[str, Any] = self._pipe.recv()
        except EOFError:
            raise SystemExit(f"{self.job.name}: its process died") from None
        if "error" in answer:
            raise SystemExit(f"{self.job.name}:\n{answer['error']}")
        return answer


def a_round(sides: Sequence[Side], number: int, what: str = "time", *, warm: bool = False) -> dict[str, dict[str, Any]]:
    """A turn of each side; another begins each time, so that drift of the machine hits all alike.

    Args:
        warm: take a step before the one that counts: the first one after the heap was handed back takes its memory page
            by page, as no training does.

    Returns:
        Each side's answer, by its name.
    """
    turn = number % len(sides)
    answers = {}
    for side in [*sides[turn:], *sides[:turn]]:
        if warm:
            side.step()
        answers[side.job.name] = side.step(what, give_back=True)
    return {side.job.name: answers[side.job.name] for side in sides}


@dataclass
class Turns:
    """The child's end: `begin` waits until it is told to take a step, `end` says how it went."""

    pipe: Connection
    base: int = 0
    _open: list[Any] = field(default_factory=list)
    _found: dict[str, Any] = field(default_factory=dict)
    _what: str = ""
    _gives_back: bool = False
    _since: tuple[float, float] = (0.0, 0.0)

    def loaded(self, model: Any) -> None:
        """Note the memory that the model alone takes."""
        for parameter in model.parameters():  # a memory-mapped file counts once it was read
            parameter.sum()
        self.base = memory()

    def ready(self, trained: int, model_flops: int | None) -> None:
        """All stands; the first step comes next."""
        reset_peak()
        self.pipe.send({"trained": trained, "model_bytes": self.base, "model_flops": model_flops})

    def begin(self) -> None:
        """Wait for the word; what was asked for besides time is switched on."""
        (self._what, self._gives_back), self._found = self.pipe.recv(), {}
        also = {"flops": [counted], "saved": [saved], "profile": [profiled]}
        self._open = [manager(self._found) for manager in also.get(self._what, [])]
        for manager in self._open:
            manager.__enter__()
        synchronize()
        self._since = time.perf_counter(), time.process_time()

    def end(self, **more: Any) -> None:
        """The step is done."""
        synchronize()
        seconds, busy = time.perf_counter() - self._since[0], time.process_time() - self._since[1]
        for manager in self._open:
            manager.__exit__(None, None, None)
        above = {"memory_above_model": peak() - self.base, "peak_bytes": peak()}
        if self._gives_back:
            give_back()
        self.pipe.send({"seconds": seconds, "cpu_seconds": busy, **above, **self._found, **more})


def give_back() -> None:
    """Have the allocator return its free pages, where it is glibc's."""
    name = find_library("c")
    if name and hasattr(library := ctypes.CDLL(name), "malloc_trim"):
        library.malloc_trim(0)


def _run(job: Job, pipe: Connection) -> None:
    warnings.simplefilter("ignore")  # deprecations inside the libraries
    try:
        (ours if job.kind == "ours" else trainer)(job, Turns(pipe))
    except Exception:  # noqa: BLE001 -- the parent tells it and stops
        pipe.send({"error": traceback.format_exc()})


def prepare(job: Job) -> tuple[Any, Any, Any]:
    """What all sides share: the config, the plan of the training, and the loaded model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from cofitune.config.schema import Config
    from cofitune.recipes.from_config import load_base
    from cofitune.recipes.train.plan import plan_train

    config = Config.model_validate(job.config)
    torch.manual_seed(config.train.seed)
    plan = plan_train(config, 1, dry_run=job.random_length is not None)
    if job.random_length is None:
        return config, plan, load_base(config.model)
    examples = random_examples(plan.steps.num_examples, job.random_length, plan.anatomy.vocab_size, job.ragged)
    plan = replace(plan, data=replace(plan.data, examples=examples))
    described = AutoConfig.from_pretrained(config.model.name)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        kernel = None if config.model.attn_implementation == "auto" else config.model.attn_implementation
        model = AutoModelForCausalLM.from_config(described, dtype=plan.settings.dtype, attn_implementation=kernel)
    return config, plan, model


def random_examples(count: int, length: int, vocabulary: int, ragged: bool = False) -> list[Any]:
    """Items whose every token carries the loss."""
    import torch

    from cofitune.data.chat import Example

    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(length // 2, length + length // 2 + 1, (count,), generator=generator).tolist()
    lengths = drawn if ragged else [length] * count
    rows = [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    return [Example(row, list(row)) for row in rows]


def ours(job: Job, turns: Turns) -> None:
    """`cofitune train` without its proofs and files: the same plan, engine, mask and loop."""
    import deepspeed  # noqa: F401 -- its import's memory belongs to no step
    import torch

    from cofitune.model.region import freeze_outside
    from cofitune.model.varlen import attend_by_conversation
    from cofitune.softmask.update import mask_updates
    from cofitune.training.engine import ELEMENTS_AT_ONCE, checkpoint_layers, start_distributed, start_engine
    from cofitune.training.fused import fuse_operations
    from cofitune.training.loop import FitSettings, fit
    from cofitune.training.prefix_cache import PrefixCache
    from cofitune.zero import inner_optimizer, shards

    start_distributed()
    config, plan, model = prepare(job)
    names = set(plan.region.parameter_names(plan.anatomy))
    freeze_outside(model, names)
    if plan.varlen:
        attend_by_conversation(model)
    turns.loaded(model)
    checkpoint_layers(model, plan.anatomy.layout.layers, plan.region.first, plan.checkpointed)
    fuse_operations(model, plan.anatomy.layout.layers, plan.region.first + plan.checkpointed)
    engine = start_engine(model, plan.settings)
    masked: Callable[[], float] = lambda: 0.0  # noqa: E731
    if config.softmask.apply_to == "update":
        masked = time_the_mask()
        at_once = ELEMENTS_AT_ONCE if plan.settings.zero_stage < 3 else None
        mask_updates(inner_optimizer(engine), shards(engine), random_factors(plan), elements=at_once)
    prefix = PrefixCache(engine.module, plan.prefix) if plan.prefix else None
    if job.attention_mask:
        give_masks()
    turns.ready(plan.region.num_parameters(plan.anatomy), model_flops(job, plan, lambda m: freeze_outside(m, names)))
    turns.begin()

    def on_step(record: Any, _: int) -> None:
        counts = {"tokens": record.tokens, "supervised": record.supervised_tokens, "loss": record.loss}
        turns.end(**counts, mask_seconds=masked())
        turns.begin()

    pad = plan.data.tokenizer.pad_token_id if plan.data.tokenizer else 0
    fit(engine, plan.data.examples, FitSettings(plan.steps, config.train.seed, pad), on_step, prefix=prefix)
    torch.distributed.destroy_process_group()


def trainer(job: Job, turns: Turns) -> None:
    """Hugging Face's Trainer, on all weights or on a LoRA adapter."""
    import torch
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from cofitune.data.batches import collate, count_supervised, step_indices

    config, plan, model = prepare(job)
    turns.loaded(model)
    adapt = add_lora if job.kind == "lora" else lambda whole: whole
    model = adapt(model)
    train, settings, pad = config.train, plan.settings, plan.data.tokenizer.pad_token_id if plan.data.tokenizer else 0
    seen: dict[str, Any] = {}

    class Ordered(Trainer):
        """The real Trainer; only the order of the items is ours, and the loss is overheard."""

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(train_dataset or self.train_dataset)

        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            seen.update(tokens=int(inputs["attention_mask"].sum()), supervised=count_supervised(inputs))
            loss = super().compute_loss(model, inputs, *rest, **named)
            seen["loss"] = (loss[0] if isinstance(loss, tuple) else loss).item()
            return loss

    class Wait(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.end(**seen)

    order = [plan.data.examples[i] for step in step_indices(plan.steps, train.seed) for i in step]
    arguments = TrainingArguments(
        output_dir=str(Path(config.output_dir) / job.name),
        per_device_train_batch_size=train.per_device_train_batch_size,
        gradient_accumulation_steps=1,
        num_train_epochs=1,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_betas[0],
        adam_beta2=train.adam_betas[1],
        max_grad_norm=train.max_grad_norm,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=settings.warmup_steps,
        use_cpu=not torch.cuda.is_available(),
        bf16=str(settings.dtype) == "torch.bfloat16",
        gradient_checkpointing=train.gradient_checkpointing is True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        optim="adamw_torch_fused",  # the Trainer's default
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_drop_last=False,
    )
    runner = Ordered(
        model=model,
        args=arguments,
        train_dataset=order,
        data_collator=partial(collate, pad_token_id=pad),
        callbacks=[Wait()],
    )
    turns.ready(sum(p.numel() for p in model.parameters() if p.requires_grad), model_flops(job, plan, adapt))
    runner.train()


def give_masks() -> None:
    """From now on in this process, right-padded rows get an attention mask."""
    from cofitune.training import loss

    loss.works_without_mask = lambda model: False


def add_lora(model: Any) -> Any:
    """A LoRA adapter of rank 8 on every linear module but the head, PEFT's own defaults otherwise."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))


def model_flops(job: Job, plan: Any, adapt: Callable[[Any], Any]) -> int | None:
    """Operations of one step on random items, nothing recomputed: counted on the meta device, where nothing is run."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if job.random_length is None or job.ragged:
        return None
    described = AutoConfig.from_pretrained(job.config["model"]["name"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(described, dtype=plan.settings.dtype, attn_implementation="sdpa")
        adapted = adapt(model) or model
        ids = torch.zeros(plan.settings.micro_batch, job.random_length, dtype=torch.long)
        mask = torch.ones(len(ids), 1, job.random_length, job.random_length, dtype=torch.bool)
        results: dict[str, Any] = {}
        with counted(results):
            # a mask of four dimensions is taken as it is; of none, transformers would look at the values of positions
            adapted(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().sum().backward()
    return int(results["flops"])


def random_factors(plan: Any) -> dict[str, Any]:
    """A soft mask of random importance on all that is trained: its cost does not depend on the values."""
    import torch

    from cofitune.importance_file import UNIT_KINDS, unit_counts
    from cofitune.softmask.factors import build_factors

    counts = unit_counts(plan.anatomy)
    importance = {kind: torch.rand(plan.anatomy.num_layers, counts[kind]) for kind in UNIT_KINDS}
    return build_factors(importance, plan.region, plan.region.modules, plan.anatomy)


def time_the_mask() -> Callable[[], float]:
    """Time the update mask's two hooks. Returns what gives the seconds of the last step."""
    from cofitune.softmask.update import UpdateMask

    spent: list[float] = []

    def timed(hook: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            synchronize()
            since = time.perf_counter()
            hook(*arguments)
            synchronize()
            spent.append(time.perf_counter() - since)

        return run

    UpdateMask._remember = timed(UpdateMask._remember)  # type: ignore[method-assign]
    UpdateMask._hold_back = timed(UpdateMask._hold_back)  # type: ignore[method-assign]

    def last() -> float:
        total = sum(spent)
        spent.clear()
        return total

    return last


@contextmanager
def counted(result: dict[str, Any]) -> Iterator[None]:
    """Count the floating-point operations inside: every matrix product, attention included."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    # torch's own table lacks the CPU's attention kernel
    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(gradient, query, key, value))

    aten = torch.ops.aten
    kernels = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        yield
    result["flops"] = counter.get_total_flops()


@contextmanager
def saved(result: dict[str, Any]) -> Iterator[None]:
    """Count the bytes that the forward pass keeps for the backward pass, weights left out."""
    import torch

    kept: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        owner = tensor if tensor._base is None else tensor._base  # a linear module keeps its weight transposed
        if not isinstance(owner, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
    result["saved_bytes"] = sum(kept.values())


@contextmanager
def profiled(result: dict[str, Any]) -> Iterator[None]:
    """Name the operators that take the most time inside."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        yield
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    events = profiler.key_averages()
    busy = sum(e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in events)
    result["kernel_seconds"] = busy / 1e6
    result["profile"] = events.table(sort_by=order, row_limit=12, max_name_column_width=48)


def memory() -> int:
    """Bytes that the process holds now: tensors on a GPU; on a CPU the resident set."""
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _status("VmRSS")


def peak() -> int:
    """The most that it has held since `reset_peak`."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def reset_peak() -> None:
    """Begin a new peak. On a CPU the kernel forgets the old one (Documentation/filesystems/proc, clear_refs 5)."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def synchronize() -> None:
    """Wait for the GPU."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def machine() -> dict[str, Any]:
    """Where figures were taken, in words."""
    import os
    import platform
    from importlib import metadata

    import torch

    packages = ("torch", "transformers", "deepspeed", "peft", "accelerate")
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "processor": f"{os.cpu_count()} {platform.machine()} cores",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


def typed(script: str, words: list[str], paths: dict[Path, str]) -> str:
    """The command that was typed, this machine's paths put as words, in whichever form they were given."""

    def named(word: str) -> str:
        option, sign, value = word.rpartition("=")
        return next((f"{option}{sign}{name}" for path, name in paths.items() if Path(value) == path), word)

    return shlex.join([script, *map(named, words)])


def dump(value: Any) -> str:
    """JSON for a file of figures."""
    return json.dumps(value, indent=2) + "\n"
