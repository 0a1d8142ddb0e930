"""Short trainings of one region on law under every mask and its controls: what is displaced, learnt and forgotten.

    scripts/bench/softmask --data FOLDER [--further] [--device cuda] [--hours 1] [--report]

Every finished run is one line in `--store` (appended; a run whose line is there is not made again), and the report is
made again from the store after each. A plain PyTorch loop with the product's data code, factors and masks: one process,
the base loaded once and put back between runs, so that SGD can be compared too. The layers below the region never
change, so their output is computed once for every batch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from softmask_report import CONDITIONS, FURTHER, USUAL, Run, is_same_study, write_report
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from cofitune.data.batches import Batch, Plan, collate, plan_steps, rank_micro_batches, step_indices
from cofitune.data.chat import IGNORED, Example, set_template
from cofitune.data.encoded import Encoding, encode_sources
from cofitune.data.sources import Source
from cofitune.files import write_tensors
from cofitune.importance.estimate import EstimatorSettings, estimate
from cofitune.importance.normalize import NORMALIZATIONS
from cofitune.model.anatomy import Anatomy, anatomy_of
from cofitune.model.load import load_model, load_tokenizer
from cofitune.model.region import Region, freeze_outside, resolve_region
from cofitune.model.weight_files import fingerprint
from cofitune.softmask.factors import Factor, build_factors, shuffle_units
from cofitune.softmask.gradient import mask_gradients
from cofitune.softmask.update import mask_updates
from cofitune.training.loss import summed_loss
from cofitune.zero import Shard

GENERAL = {"replay": "replay/train.jsonl", "math": "math/test.jsonl", "user": "user_oriented/test.jsonl"}
REGIONS = {"up+down": ("up_proj", "down_proj"), "all": ("all",)}
SETS = {  # name → estimator, reduction, normalisation
    "kl": ("kl_dropout", "signed", "zscore_tanh"),
    "absolute": ("kl_dropout", "absolute", "rank"),
    "fisher": ("fisher", "squared", "rank"),
}
DECILES = 10


@dataclass(frozen=True)
class Settings:
    """What every run of one study shares; the report never mixes runs of different settings."""

    steps: int
    items_a_step: int
    evaluate_every: int
    test_items: int
    importance_items: int
    longest: int
    layers: str
    adamw_rate: float
    sgd_rate: float


@dataclass(frozen=True)
class Study:
    """The model and the data, ready."""

    model: PreTrainedModel
    anatomy: Anatomy
    pad: int
    first: int
    train: list[Example]
    tests: dict[str, list[Batch]]
    importance: dict[str, dict[str, Tensor]]
    base: dict[str, Tensor]


def main() -> None:
    """Make the runs that the store lacks, in their order of importance, until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=".cache/SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, default=os.environ.get("COFITUNE_DATA"), help="default: $COFITUNE_DATA")
    parser.add_argument("--store", type=Path, default=Path("scripts/bench/results/softmask.jsonl"))
    parser.add_argument("--work", type=Path, default=Path(".cache/softmask"), help="where importance is kept")
    parser.add_argument("--hours", type=float, default=24.0, help="start no run after this long")
    parser.add_argument("--runs", type=int, default=len(CONDITIONS + FURTHER), help="make at most this many")
    parser.add_argument("--further", action="store_true", help="then more seeds, SGD's controls and all modules, too")
    parser.add_argument(
        "--device", default=USUAL["device"], help="cpu or cuda; a study is made on one kind of device throughout"
    )
    parser.add_argument(
        "--part", type=part_of, default=(1, 1), metavar="N/OF", help="2/3: only every third run, from the second on"
    )
    parser.add_argument("--steps", type=int, default=USUAL["steps"])
    parser.add_argument(
        "--test-items", type=int, default=USUAL["test_items"], help="of law; and of general data in all"
    )
    parser.add_argument("--importance-items", type=int, default=USUAL["importance_items"])
    parser.add_argument("--adamw-rate", type=float, default=USUAL["adamw_rate"])
    parser.add_argument("--sgd-rate", type=float, default=USUAL["sgd_rate"], help="0.1 learns slowly, 0.5 is unstable")
    parser.add_argument("--report", action="store_true", help="only write the report anew from the store")
    arguments = parser.parse_args()
    settings = Settings(
        arguments.steps, 8, max(1, arguments.steps // 4), arguments.test_items, arguments.importance_items, 160,
        "25%-50%", arguments.adamw_rate, arguments.sgd_rate,
    )  # fmt: skip
    report = arguments.store.with_suffix(".md")
    if arguments.report:
        write_report(arguments.store, report)
        return
    if arguments.data is None:
        parser.error("name the folder of the data: --data FOLDER, or $COFITUNE_DATA")
    started = time.monotonic()
    torch.manual_seed(0)
    study, facts = prepare(arguments.model, arguments.data, arguments.work, settings, torch.device(arguments.device))
    requested = CONDITIONS + (FURTHER if arguments.further else [])
    part, parts = arguments.part
    missing = [run for run in requested[part - 1 :: parts] if not _stored(arguments.store, run, facts)]
    for run in missing[: arguments.runs]:
        if time.monotonic() - started > arguments.hours * 3600:
            print("the time is up; call again to go on", flush=True)
            break
        figures = train(study, run, settings)
        arguments.store.parent.mkdir(parents=True, exist_ok=True)
        with arguments.store.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"run": asdict(run), "study": facts, **figures}) + "\n")
        write_report(arguments.store, report)
        last = figures["trajectory"][-1]
        message = "  ".join(f"{name} {_mean(last[name]):.3f}" for name in study.tests)
        print(f"{run.title:<50} seed {run.seed}  {message}  {figures['seconds']:.0f} s", flush=True)


def part_of(text: str) -> tuple[int, int]:
    """`2/3` as numbers."""
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text}: 2/3 is the second of three parts")
    return int(part), int(parts)


def prepare(
    name: str, data: Path, work: Path, settings: Settings, device: torch.device
) -> tuple[Study, dict[str, Any]]:
    """Load the model, tokenise the data, estimate (or read) each importance."""
    tokenizer = load_tokenizer(name)
    set_template(tokenizer, "chat")
    model = load_model(name, torch.float32).eval().to(device)
    anatomy = anatomy_of(model)
    first = resolve_region(settings.layers, ("all",), anatomy.num_layers).first
    law = _examples(data / "law/train.jsonl", tokenizer, settings)
    general = {n: _examples(data / path, tokenizer, settings) for n, path in GENERAL.items()}
    each, measured = settings.test_items // len(GENERAL), settings.importance_items // len(GENERAL)
    tests = {"law": _examples(data / "law/test.jsonl", tokenizer, settings)[: settings.test_items]}
    tests |= {n: examples[:each] for n, examples in general.items()}
    apart = [e for examples in general.values() for e in examples[each : each + measured]]
    messages: dict[str, list[Example]] = {"importance": apart, **tests}
    for what, examples in messages.items():
        print(f"{what}: {len(examples)} items, {sum(len(e.input_ids) for e in examples):,} tokens", flush=True)
    pad = tokenizer.pad_token_id
    files = ("law/train.jsonl", "law/test.jsonl", *GENERAL.values())
    digest = hashlib.sha256("".join(hashlib.sha256((data / f).read_bytes()).hexdigest() for f in files).encode())
    facts: dict[str, Any] = {"settings": asdict(settings), "model": fingerprint(name), "data": digest.hexdigest()}
    facts |= {"device": device.type, "machine": _machine(device)}
    importance, facts["reliability"] = _importance(model, apart, pad, work / facts["model"][:12] / device.type)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    batches = {n: _batches(model, first, examples, pad) for n, examples in tests.items()}
    facts["base"] = {n: _losses(model, first, b) for n, b in batches.items()}
    return Study(model, anatomy, pad, first, law, batches, importance, base), facts


def train(study: Study, run: Run, settings: Settings) -> dict[str, Any]:
    """One run from the base: the losses of every test item along the way, and what was displaced in the end."""
    model, started = study.model, time.perf_counter()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(study.base[name])
    region = resolve_region(settings.layers, REGIONS[run.region], study.anatomy.num_layers)
    freeze_outside(model, set(region.parameter_names(study.anatomy)))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    factors = _factors(study, run, region)
    handles = mask_gradients(model, factors) if run.mask == "gradient" else []
    # as under DeepSpeed, the optimizer steps on flat tensors; here each is one whole parameter's own memory
    flats = {name: p.detach().view(-1) for name, p in trained.items()}
    optimizer = _optimizer(run, list(flats.values()), settings)
    if run.mask == "update":
        shards = {id(flats[n]): [Shard(n, tuple(p.shape), 0, 0, p.numel())] for n, p in trained.items()}
        mask_updates(optimizer, shards, factors)
    schedule = get_scheduler("cosine", optimizer, 0, settings.steps)
    plan = plan_steps(len(study.train), settings.items_a_step, 1, 1, 1.0, settings.steps)
    trajectory = []
    for step, batch in enumerate(_train_batches(study, plan, run.seed), start=1):
        supervised = int((batch["labels"][:, 1:] != IGNORED).sum())
        (summed_loss(FromLayer(model, study.first), batch) / supervised).backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        for name, flat in flats.items():
            flat.grad = _gradient(trained[name]).view(-1)
        optimizer.step()
        schedule.step()
        model.zero_grad(set_to_none=True)
        if step % settings.evaluate_every == 0 or step == settings.steps:
            losses = {n: _losses(model, study.first, batches) for n, batches in study.tests.items()}
            trajectory.append({"step": step, **losses})
    for handle in handles:
        handle.remove()
    return {
        "trajectory": trajectory,
        "displacement": _displacement(study, run, region),
        "mean_factor": _mean_factor(factors),
        "seconds": round(time.perf_counter() - started, 1),
    }


class FromLayer:
    """The model from layer `first` up, for batches whose `input_ids` hold that layer's input, [B, T, H]."""

    def __init__(self, model: PreTrainedModel, first: int) -> None:
        self.module, self.first = model, first

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        logits_to_keep: Tensor | int = 0,
        use_cache: bool = False,
    ) -> Any:
        """The model's own output."""
        with _layers(self.module, self.first):
            return self.module(
                inputs_embeds=input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep, use_cache=False
            )

    __call__ = forward


@contextmanager
def _layers(model: PreTrainedModel, first: int) -> Iterator[None]:
    whole = model.model.layers
    model.model.layers = whole[first:]
    try:
        yield
    finally:
        model.model.layers = whole


def below(model: PreTrainedModel, first: int, batch: Batch) -> Batch:
    """The batch with the input of layer `first` in place of its token ids."""
    sent: Batch = {name: value.to(model.device) for name, value in batch.items()}
    caught: list[Tensor] = []
    layer = model.model.layers[first]
    handle = layer.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    with torch.no_grad():
        model.model(input_ids=sent["input_ids"], attention_mask=sent["attention_mask"], use_cache=False)
    handle.remove()
    return {**sent, "input_ids": caught[0]}


def _train_batches(study: Study, plan: Plan, seed: int) -> Iterator[Batch]:
    for indices in step_indices(plan, seed):
        (batch,) = rank_micro_batches(study.train, indices, plan, 0, study.pad)
        yield below(study.model, study.first, batch)


def _batches(model: PreTrainedModel, first: int, examples: list[Example], pad: int) -> list[Batch]:
    return [below(model, first, collate(examples[i : i + 8], pad)) for i in range(0, len(examples), 8)]


@torch.no_grad()
def _losses(model: PreTrainedModel, first: int, batches: list[Batch]) -> list[tuple[float, int]]:
    """For each item its summed loss in nats and its supervised tokens."""
    results = []
    for batch in batches:
        targets = batch["labels"][:, 1:]
        requested = (targets != IGNORED).any(dim=0).nonzero().flatten()
        logits = FromLayer(model, first)(batch["input_ids"], batch["attention_mask"], requested).logits
        losses = cross_entropy(logits.transpose(1, 2), targets[:, requested], ignore_index=IGNORED, reduction="none")
        counts = (targets != IGNORED).sum(dim=1)
        results += [(round(float(s), 5), int(n)) for s, n in zip(losses.sum(dim=1), counts, strict=True)]
    return results


def _mean(losses: list[tuple[float, int]]) -> float:
    return sum(s for s, _ in losses) / sum(n for _, n in losses)


def _examples(path: Path, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> list[Example]:
    """A file's items that are short enough, in a fixed order of chance: some files are sorted by kind."""
    (encoded,) = encode_sources([Source(str(path))], tokenizer, Encoding(max_length=4096))
    examples = encoded.examples
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    return [examples[i] for i in order if examples.lengths[i] <= settings.longest]


def _optimizer(run: Run, flats: list[Tensor], settings: Settings) -> torch.optim.Optimizer:
    if run.optimizer == "SGD":
        return torch.optim.SGD(flats, lr=settings.sgd_rate)
    return torch.optim.AdamW(flats, lr=settings.adamw_rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError("a trained parameter got no gradient")
    return parameter.grad


def _factors(study: Study, run: Run, region: Region) -> dict[str, Factor]:
    """The product's factors; as a control their mean everywhere, or the importance shuffled over a layer's units."""
    if run.mask == "none":
        return {}
    importance = study.importance[run.importance]
    if run.control == "shuffled" and run.region == "all":
        importance = shuffle_units(importance, study.anatomy, run.seed)
    elif run.control == "shuffled":  # FFN units only, where it is as good: stored runs were made with it
        generator = torch.Generator().manual_seed(run.seed)
        importance = {
            kind: torch.stack([row[torch.randperm(len(row), generator=generator)] for row in vector])
            for kind, vector in importance.items()
        }
    factors = build_factors(importance, region, region.modules, study.anatomy)
    if run.control == "uniform":
        factors = {n: replace(f, values=f.values.mean().expand_as(f.values).clone()) for n, f in factors.items()}
    return factors


def _mean_factor(factors: dict[str, Factor]) -> float:
    return float(torch.cat([f.values for f in factors.values()]).mean()) if factors else 1.0


def _displacement(study: Study, run: Run, region: Region) -> list[float]:
    """Mean over units of ‖Δw‖/‖w‖ of the unit's row or column, from the least important tenth to the most."""
    own = build_factors(study.importance[run.importance], region, region.modules, study.anatomy)
    now = dict(study.model.named_parameters())
    tenths: list[list[Tensor]] = [[] for _ in range(DECILES)]
    for name, factor in own.items():
        before, after = (t.detach() if factor.axis == 0 else t.detach().T for t in (study.base[name], now[name]))
        relative = (after - before).norm(dim=1) / before.norm(dim=1)
        order = (1 - factor.values).argsort(stable=True).to(relative.device)
        for number, part in enumerate(order.tensor_split(DECILES)):
            tenths[number].append(relative[part])
    return [float(torch.cat(parts).mean()) for parts in tenths]


def _importance(
    model: PreTrainedModel, examples: list[Example], pad: int, work: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, float]]]:
    """Each set's importance, and how well two halves of the data agree on it (rank correlation of the two)."""
    key = hashlib.sha256(json.dumps([e.input_ids for e in examples]).encode()).hexdigest()[:12]
    results, reliability = {}, {}
    for name, (estimator, reduce, normalize) in SETS.items():
        halves = []
        for half in (0, 1):
            path = work / f"{key}-{name}-{half}.safetensors"
            if not path.is_file():
                batches = [collate(examples[half::2][i : i + 4], pad) for i in range(0, len(examples[half::2]), 4)]
                numbered = [(2 * i + half, b) for i, b in enumerate(batches)]
                scores = estimate(
                    model, numbered, EstimatorSettings(dropout=0.003, seed=1234, estimator=estimator, reduce=reduce)
                )
                weight = scores.tokens if reduce == "signed" else scores.samples
                write_tensors(path, {k: (v * weight).contiguous() for k, v in scores.values.items()})
                print(f"importance {name}, half {half + 1} of 2: estimated", flush=True)
            halves.append(_read(path))
        normal = NORMALIZATIONS[normalize]
        results[name] = {k: normal(halves[0][k] + halves[1][k]).float() for k in halves[0]}
        reliability[name] = {k: _rank_correlation(normal(halves[0][k]), normal(halves[1][k])) for k in halves[0]}
    return results, reliability


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(path))


def _rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's, within each layer, averaged over layers."""
    ranks = [t.argsort(dim=-1).argsort(dim=-1).double() for t in (one, other)]
    centred = [r - r.mean(dim=-1, keepdim=True) for r in ranks]
    norms = centred[0].norm(dim=-1) * centred[1].norm(dim=-1)
    return float(((centred[0] * centred[1]).sum(dim=-1) / norms).mean())


def _stored(store: Path, run: Run, facts: dict[str, Any]) -> bool:
    if not store.is_file():
        return False
    lines = [json.loads(line) for line in store.read_text(encoding="utf-8").splitlines()]
    return any(line["run"] == asdict(run) and is_same_study(line["study"], facts) for line in lines)


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cores"
    return f"{name}, {platform.machine()}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
