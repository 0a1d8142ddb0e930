"""Is a mask worth its cost where training forgets? Every mask against its controls.

    scripts/bench/softmask --retention --data FOLDER [--masks fisher columns] [--hours 1] [--report]

The task is the retention study's: one region of the small model learns ledger lines without rehearsal, which costs it
instruction following. A run trains at a constant rate until the loss of development items falls to `--target`, so that
all runs know the speciality equally well; then it is asked how far it has moved from the base on the base's own
held-out answers (KL divergence, nats a token) and how well it follows instructions. A run that needs fewer steps is not
rewarded for it, nor is a mask for learning slowly.

Importance and the base's answers are made by `cofitune importance` and `cofitune rehearse`; training is a plain PyTorch
loop with the product's data code, factors and masks, one process, so that the base is loaded once. Every finished run
is a line of `--store`; a run whose line is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from command import cofitune
from scipy.stats import t as student
from sides import machine
from softmask_study import FromLayer, below, part_of
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cofitune.data.batches import collate, plan_steps, step_indices
from cofitune.data.chat import IGNORED, set_template
from cofitune.data.encoded import Encoding, encode_sources
from cofitune.data.sources import Source
from cofitune.evaluation.items import EvalTask
from cofitune.evaluation.samples import TaskResult
from cofitune.evaluation.score import ScoreRequest, score_model
from cofitune.evaluation.tasks import load_tasks
from cofitune.importance_file import read_vectors
from cofitune.model.anatomy import Anatomy, anatomy_of
from cofitune.model.load import load_model, load_tokenizer
from cofitune.model.region import Region, freeze_outside, resolve_region
from cofitune.softmask.columns import build_column_factors
from cofitune.softmask.factors import Factor, build_factors, harden, shuffle_units
from cofitune.softmask.update import mask_updates
from cofitune.training.loss import summed_loss
from cofitune.zero import Shard

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / ".cache" / "demo-data"
IMPORTANCES: dict[str, dict[str, Any]] = {  # as cofitune importance makes them: the paper's, the default, SSU's
    "paper": {"estimator": "kl_dropout"},
    "fisher": {},
    "columns": {"estimator": "wanda"},
}
MASKS = {  # mask → the importance behind it, and from where on a unit is frozen (None: a soft mask)
    "paper": ("paper", None),
    "fisher": ("fisher", None),
    "columns": ("columns", None),
    "fisher, hard": ("fisher", 0.5),
    "columns, hard": ("columns", 0.5),  # as SSU
}
NONE, MASK, SHUFFLED, UNIFORM = "none", "the mask", "shuffled", "one factor"
# ranks are what fisher and columns are normalised to: their factors have one mean, so that one control serves them all
SERVED_BY = {name: "paper" if name == "paper" else "fisher" for name in MASKS}
OUTCOMES = {  # title → unit, and whether less is better
    "KL to the base": ("nats a token", True),
    "instruct": ("points", False),
}
LIKE, UNLIKE = "instruct_like", "instruct_unlike"
DEV_ITEMS = 32  # by whose loss a run is stopped


@dataclass(frozen=True)
class Run:
    """One mask or control under one seed, which orders the data and shuffles the mask."""

    mask: str
    control: str
    seed: int


def main() -> None:
    """Make the runs that the store lacks, and write the report anew after each."""
    arguments = parse()
    settings = settings_of(arguments)
    if not arguments.report:
        config = write_config(arguments)
        cofitune("rehearse", config)
        for name in needed(arguments.masks):
            changes, folder = IMPORTANCES[name], arguments.work / f"importance-{name}"
            words = [f"importance.{key}={value}" for key, value in changes.items()]
            cofitune("importance", config, *words, f"output_dir={folder}")
        make_runs(arguments, settings)
    write_report(arguments, settings)


def parse() -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(prog="scripts/bench/softmask --retention", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with replay/, on which importance is computed")
    parser.add_argument("--demo", type=Path, default=DEMO, help="folder of the demo's data (default: %(default)s)")
    parser.add_argument("--model", type=Path, default=REPOSITORY / ".cache" / "SmolLM2-135M-Instruct")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "runs" / "bench-softmask")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "scripts" / "bench" / "results")
    parser.add_argument("--hours", type=float, default=24.0, help="start no run after this long; call it again")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS), help="default: all")
    parser.add_argument("--layers", default="50%-75%", help="of the region (default: %(default)s)")
    parser.add_argument("--modules", nargs="+", default=["up_proj", "down_proj"], help="default: the paper's")
    parser.add_argument("--rate", type=float, default=5e-4, help="constant learning rate (default: %(default)s)")
    parser.add_argument("--target", type=float, default=0.1, help="nats a token of development items at which to stop")
    parser.add_argument("--every", type=int, default=4, help="optimizer steps between two looks (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=240, help="give up after so many (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=96, help="general prompts that the base answers; half held out")
    parser.add_argument("--importance-items", type=int, default=120, help="default: %(default)s")
    parser.add_argument(
        "--part", type=part_of, default=(1, 1), metavar="N/OF", help="2/3: only every third run, from the second on"
    )
    parser.add_argument("--items", type=int, help="items of each instruction task at most; default: all")
    parser.add_argument("--report", action="store_true", help="only write the report anew from the store")
    arguments = parser.parse_args()
    if arguments.data is None and not arguments.report:
        parser.error("name the folder of the data: --data FOLDER")
    arguments.store = arguments.out / "softmask-retention.jsonl"
    return arguments


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What all runs of one table share."""
    names = ("layers", "modules", "rate", "target", "every", "steps", "prompts", "importance_items", "items")
    return {name: getattr(arguments, name) for name in names}


def write_config(arguments: argparse.Namespace) -> Path:
    """The config by which the base answers and importance is computed."""
    config = {
        "model": {"name": str(arguments.model), "dtype": "float32"},
        "data": {"train": str(arguments.demo / "ledger_train.jsonl"), "max_length": 256, "on_bad_item": "drop"},
        "rehearsal": {
            "data": str(arguments.demo / "general_prompts.jsonl"),
            "max_items": arguments.prompts,
            "max_new_tokens": 96,
            "held_out": 0.5,
            "top_k": 64,
        },
        "importance": {
            "data": str(arguments.data / "replay" / "train.jsonl"),
            "max_items": arguments.importance_items,
        },
        "output_dir": str(arguments.work),
    }
    path = Path(arguments.work) / "study.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def needed(masks: Sequence[str]) -> list[str]:
    """The importances behind some masks and their controls."""
    return list(dict.fromkeys(MASKS[name][0] for mask in masks for name in (mask, SERVED_BY[mask])))


def runs_of(masks: Sequence[str], seeds: int) -> list[Run]:
    """Seed by seed: no mask, each mask with its factors dealt to other units, and one factor for all units."""
    rows = [(NONE, NONE)]
    for mask in masks:
        rows += [(mask, MASK), (mask, SHUFFLED), (SERVED_BY[mask], UNIFORM)]
    return [Run(mask, control, seed) for seed in range(seeds) for mask, control in dict.fromkeys(rows)]


class Task:
    """Model, data and questions, ready."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.demo: Path = arguments.demo
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(str(arguments.model))
        set_template(self.tokenizer, "chat")
        self.model: PreTrainedModel = load_model(str(arguments.model), torch.float32).eval()
        self.anatomy: Anatomy = anatomy_of(self.model)
        self.region: Region = resolve_region(arguments.layers, tuple(arguments.modules), self.anatomy.num_layers)
        freeze_outside(self.model, set(self.region.parameter_names(self.anatomy)))
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.base = self.weights()
        self.train = self._examples("ledger_train.jsonl")
        self._inputs: dict[int, Tensor] = {}
        dev = self._examples("ledger_dev.jsonl")[:DEV_ITEMS]
        self.dev = [below(self.model, self.region.first, collate(dev, self._pad))]
        self.importance = {name: _vectors(arguments.work / f"importance-{name}") for name in needed(arguments.masks)}
        drift = EvalTask("drift", "drift", str(arguments.work / "rehearsal"), "drift", "kl")
        (self.drift,) = load_tasks([drift])
        asked = [("instruct.jsonl", LIKE), ("instruct_other.jsonl", UNLIKE)]
        self.questions = load_tasks(
            [
                EvalTask(title, "instruct", str(self.demo / file), "ifeval", "prompt_strict",
                         max_new_tokens=96, limit=arguments.items)
                for file, title in asked
            ]
        )  # fmt: skip

    @property
    def _pad(self) -> int:
        return int(self.tokenizer.pad_token_id)

    def _examples(self, file: str) -> list[Any]:
        (encoded,) = encode_sources([Source(str(self.demo / file))], self.tokenizer, Encoding(max_length=256))
        return list(encoded.examples)

    def weights(self) -> dict[str, Tensor]:
        """A copy of what is trained."""
        return {name: p.detach().clone() for name, p in self.trained.items()}

    @torch.no_grad()
    def put(self, weights: dict[str, Tensor]) -> None:
        """Set what is trained."""
        for name, parameter in self.trained.items():
            parameter.copy_(weights[name])

    def dev_loss(self) -> float:
        """Nats a token of the development items."""
        with torch.no_grad():
            sums = [float(summed_loss(FromLayer(self.model, self.region.first), batch)) for batch in self.dev]
        return sum(sums) / sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in self.dev)

    def ask(self, tasks: Sequence[Any], batch_size: int) -> dict[str, TaskResult]:
        """The product's own evaluation."""
        return score_model(self.model, ScoreRequest(self.tokenizer, tasks, batch_size))

    def batches(self, seed: int, steps: int) -> Any:
        """A batch of 8 items a step, from the region's first layer on: those below never change."""
        plan = plan_steps(len(self.train), 8, 1, 1, 1.0, steps)
        for indices in step_indices(plan, seed):
            batch = collate([self.train[i] for i in indices], self._pad)
            rows = [self._below(i) for i in indices]
            yield {**batch, "input_ids": nn.utils.rnn.pad_sequence(rows, batch_first=True)}

    def _below(self, index: int) -> Tensor:
        """What enters the region's first layer of a training item, [tokens, H]; made once for all runs."""
        if index not in self._inputs:
            batch = below(self.model, self.region.first, collate([self.train[index]], self._pad))
            self._inputs[index] = batch["input_ids"][0]
        return self._inputs[index]


def _vectors(folder: Path) -> dict[str, Tensor]:
    place = folder / "importance"
    return read_vectors(place, json.loads((place / "manifest.json").read_text()))


def make_runs(arguments: argparse.Namespace, settings: dict[str, Any]) -> None:
    """What the store lacks, as far as the hours go."""
    started = time.monotonic()
    stored = {run for run, _ in read_store(arguments.store, settings)}
    part, parts = arguments.part
    wanted = runs_of(arguments.masks, arguments.seeds)[part - 1 :: parts]
    missing = [run for run in wanted if run not in stored]
    if not missing:
        return
    task = Task(arguments)
    arguments.store.parent.mkdir(parents=True, exist_ok=True)
    for run in missing:
        if time.monotonic() - started > arguments.hours * 3600:
            print("the hours are over; call again to go on", flush=True)
            return
        figures = train(task, run, arguments)
        line = {"run": asdict(run), "settings": settings, "machine": machine(), **figures}
        with arguments.store.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        write_report(arguments, settings)
        shown = {key: value for key, value in figures.items() if key not in ("curve", "items")}
        print(run, shown, flush=True)


def train(task: Task, run: Run, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train from the base until the development items' loss falls to the target, then ask."""
    began = time.perf_counter()
    task.put(task.base)
    factors = factors_of(task, run)
    # as under DeepSpeed, the optimizer steps on flat tensors; here each is one whole parameter's own memory
    flats = {name: p.detach().view(-1) for name, p in task.trained.items()}
    optimizer = torch.optim.AdamW(flats.values(), lr=arguments.rate, betas=(0.9, 0.95), weight_decay=0.0)
    shards = {id(flats[n]): [Shard(n, tuple(p.shape), 0, 0, p.numel())] for n, p in task.trained.items()}
    mask = mask_updates(optimizer, shards, factors)
    curve, looked_at = [(0, task.dev_loss())], [task.base]  # the weights of the last two looks
    for step, batch in enumerate(task.batches(run.seed, arguments.steps), start=1):
        supervised = int((batch["labels"][:, 1:] != IGNORED).sum())
        (summed_loss(FromLayer(task.model, task.region.first), batch) / supervised).backward()
        nn.utils.clip_grad_norm_(task.trained.values(), 1.0)
        for name, flat in flats.items():
            gradient = task.trained[name].grad
            flat.grad = None if gradient is None else gradient.view(-1)
        optimizer.step()
        task.model.zero_grad(set_to_none=True)
        if step % arguments.every == 0:
            curve.append((step, task.dev_loss()))
            looked_at = [looked_at[-1], task.weights()]
            if curve[-1][1] <= arguments.target:
                break
    mask.remove()
    divergences = []
    for weights in looked_at:
        task.put(weights)
        divergences.append(task.ask([task.drift], 16)["drift"].raw)
    results = task.ask(task.questions, 32)
    return {
        "steps": curve[-1][0],
        "dev_loss": curve[-1][1],
        "reached": curve[-1][1] <= arguments.target,
        "kl": at_target([loss for _, loss in curve[-2:]], divergences, arguments.target),
        "items": {t: [s.score for s in results[t].samples] for t in (LIKE, UNLIKE)},
        "mean_factor": float(torch.cat([f.values for f in factors.values()]).mean()) if factors else 1.0,
        "curve": curve,
        "seconds": round(time.perf_counter() - began, 1),
    }


def at_target(losses: Sequence[float], divergences: Sequence[float], target: float) -> float:
    """The KL divergence where the loss falls to the target, linear between the last two looks."""
    before, after = losses
    share = min(1.0, max(0.0, (before - target) / (before - after))) if before > after else 1.0
    return divergences[0] + share * (divergences[1] - divergences[0])


def factors_of(task: Task, run: Run) -> dict[str, Factor]:
    """The product's factors; of a control, the importance dealt to other units or each weight's mean everywhere."""
    if run.control == NONE:
        return {}
    name, threshold = MASKS[run.mask]
    importance = task.importance[name]
    if run.control == SHUFFLED:
        importance = shuffle_units(importance, task.anatomy, run.seed)
    if threshold is not None:
        importance = harden(importance, threshold)
    build = build_column_factors if name == "columns" else build_factors
    return build(importance, task.region, task.region.modules, task.anatomy, uniform=run.control == UNIFORM)


def read_store(path: Path, settings: dict[str, Any]) -> list[tuple[Run, dict[str, Any]]]:
    """The runs of these settings."""
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(Run(**line["run"]), line) for line in lines if line["settings"] == settings]


def outcome(line: dict[str, Any], title: str) -> float:
    """One figure of a run: the KL divergence at the target, or the mean score of all instruction items."""
    if title == "instruct":
        scores = [score for items in line["items"].values() for score in items]
        return 100 * statistics.fmean(scores)
    return float(line["kl"])


def difference(own: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]], title: str) -> tuple[float, float]:
    """Mean over seeds of the difference, and half of its 95 % interval (Student's t over the seeds' differences)."""
    both = sorted(own.keys() & other.keys())
    deltas = [outcome(own[seed], title) - outcome(other[seed], title) for seed in both]
    if len(deltas) < 2:
        return statistics.fmean(deltas), float("inf")
    half = float(student.ppf(0.975, len(deltas) - 1)) * statistics.stdev(deltas) / len(deltas) ** 0.5
    return statistics.fmean(deltas), half


def write_report(arguments: argparse.Namespace, settings: dict[str, Any]) -> None:
    """The table, and each question's answer in words."""
    stored = read_store(arguments.store, settings)
    if not stored:
        return
    table: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for run, line in stored:
        table.setdefault((run.mask, run.control), {})[run.seed] = line
    rows = ["| mask | units | seeds | mean factor | steps | loss there | KL to the base | instruct | seconds |",
            "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for (mask, control), lines in table.items():
        of = list(lines.values())
        rows.append(
            f"| {mask} | {control} | {len(of)} | {of[0]['mean_factor']:.2f} | "
            f"{statistics.fmean(x['steps'] for x in of):.0f} | "
            f"{statistics.fmean(x['dev_loss'] for x in of):.3f} | "
            f"{_each([outcome(x, 'KL to the base') for x in of], '.3f')} | "
            f"{_each([outcome(x, 'instruct') for x in of], '.1f')} | {statistics.fmean(x['seconds'] for x in of):.0f} |"
        )
    wanted = runs_of(arguments.masks, arguments.seeds)
    done = {run for run, _ in stored}
    missing = sum(run not in done for run in wanted)
    partial = f"**Partial: {len(wanted) - missing} of {len(wanted)} runs.** " if missing else ""
    text = f"""# Is a mask worth its cost where training forgets?

`{command(arguments, settings)}`

{partial}SmolLM2-135M-Instruct (4-bit GGUF, dequantised to fp32) learns ledger lines, without rehearsal: AdamW at a
constant {settings["rate"]:g}, 8 items a step, layers {settings["layers"]}, {" and ".join(settings["modules"])}.
Each run stops where the loss of {DEV_ITEMS} development items falls to {settings["target"]:g} nats a token, looked at
every {settings["every"]} steps: all know the speciality equally well. Then: the KL divergence from the base on its own
held-out answers to half of {settings["prompts"]} prompts (between the last two looks, at the target), and the share of
instruction prompts followed (IFEval's strict rule). *shuffled*: the mask's own factors on other units; *one factor*:
their mean on every unit, which is a smaller learning rate and nothing else (the same for the masks that are normalised
to ranks). A mask is worth something only where it is ahead of both. Intervals: Student's t over seeds, 95 %.

## In words

{answers(table)}

## Every mask

The seeds' mean, and each seed.

{chr(10).join(rows)}

{machine_text(stored[-1][1]["machine"])}; {sum(line["seconds"] for _, line in stored) / 60:.0f} minutes of runs.
"""
    (arguments.out / "softmask-retention.md").write_text(text, encoding="utf-8")


def answers(table: dict[tuple[str, str], dict[int, dict[str, Any]]]) -> str:
    """Each mask against no mask and against its controls, one sentence an outcome."""
    lines = []
    for mask in MASKS:
        own = table.get((mask, MASK))
        if own is None:
            continue
        others = {"no mask": (NONE, NONE), SHUFFLED: (mask, SHUFFLED), UNIFORM: (SERVED_BY[mask], UNIFORM)}
        for title, (unit, less) in OUTCOMES.items():
            parts = []
            for name, key in others.items():
                other = table.get(key, {})
                if own.keys() & other.keys():
                    mean, half = difference(own, other, title)
                    better = -mean if less else mean
                    seen = "not told apart" if abs(mean) <= half else "**better**" if better > 0 else "**worse**"
                    form = "+.3f" if less else "+.1f"
                    spread = f"± {half:{form[1:]}}" if math.isfinite(half) else "one seed"
                    parts.append(f"to {name} {mean:{form}} ({spread}), {seen}")
            lines.append(f"- {mask}, {title} ({unit}): {'; '.join(parts)}.")
    return "\n".join(lines)


def machine_text(facts: dict[str, Any]) -> str:
    """Where the runs were made."""
    return f"{facts['processor']} ({facts['device']}, torch {facts['torch']}, threads: {facts['threads']})"


def _each(values: Sequence[float], form: str) -> str:
    return f"{statistics.fmean(values):{form}} ({', '.join(f'{value:{form}}' for value in values)})"


def command(arguments: argparse.Namespace, settings: dict[str, Any]) -> str:
    """What makes this report again: what differs from the usual options is named."""
    usual = {"layers": "50%-75%", "modules": ["up_proj", "down_proj"], "rate": 5e-4, "target": 0.1, "every": 4,
             "steps": 240, "prompts": 96, "importance_items": 120, "items": None}  # fmt: skip
    own = {k: v for k, v in settings.items() if v != usual[k]}
    if arguments.masks != list(MASKS):
        own["masks"] = arguments.masks
    if arguments.seeds != 3:
        own["seeds"] = arguments.seeds
    words = [f" --{k.replace('_', '-')} {shlex.join(v) if isinstance(v, list) else v}" for k, v in own.items()]
    return "scripts/bench/softmask --retention --data FOLDER" + "".join(words)


if __name__ == "__main__":
    os.chdir(REPOSITORY)
    main()
