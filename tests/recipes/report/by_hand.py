"""A run as the commands leave it, small and made by hand, for the tests of `cofitune report`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from cofitune.evaluation.metrics import METRICS
from cofitune.evaluation.samples import Sample, TaskResult
from cofitune.evaluation.statistics.comparison import Compared, build_scores, changed_items, match_items
from cofitune.evaluation.statistics.matched import Point, match_methods
from cofitune.evaluation.statistics.paired import Bootstrap
from cofitune.importance_file import ATTENTION_HEADS, FFN_NEURONS, FFN_OUTPUTS, write_importance
from cofitune.reports.evaluation.scores import FORMAT

HOSTILE = "<script>window.owned = 1</script><img src=x onerror='window.owned = 1'>\"'&amp; $x^2$"
TASKS = {  # title: category, metric, chance
    "law": ("speciality", "squad_match", 0.0),
    "mmlu": ("gen_kn", "acc", 0.25),
    "a_rather_long_name_of_a_reasoning_task": ("gen_rs", "acc", 0.25),
    "ifeval": ("instruct", "prompt_strict", 0.0),
    "dialogue": ("instruct", "nats_per_token", 0.0),
}
ITEMS = 40
MODULES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
CONFIG = (
    "# cofitune 0.1.0; torch 2.13.0\n# git: abc with uncommitted changes\nmodel: {name: tiny}\noutput_dir: runs/x\n"
)


def make_results(models: dict[str, float]) -> dict[str, dict[str, TaskResult]]:
    """Answers of models, the base first, of which each has learnt the given share of the law items."""
    results: dict[str, dict[str, TaskResult]] = {}
    for number, (model, learnt) in enumerate(models.items()):
        results[model] = {}
        for title, (category, metric, chance) in TASKS.items():
            samples = tuple(_sample(i, title, number, learnt) for i in range(ITEMS))
            raw = sum(s.score for s in samples) / ITEMS
            results[model][title] = TaskResult(title, category, METRICS[metric], raw, chance, samples, 1.5)
    return results


def _sample(index: int, title: str, number: int, learnt: float) -> Sample:
    prompt = f"{HOSTILE} question {index} of {title} " + "and so on " * 30
    if title == "law":
        right = index < learnt * ITEMS
        return Sample(
            index + 1, prompt, ["the buyer", HOSTILE], HOSTILE if right else "no\nidea", None, None, float(right)
        )
    if title == "dialogue":
        return Sample(
            index + 1, prompt, "a reply", None, (-3.0,), None, 2.0 + 0.01 * index + 0.3 * number * (index % 7)
        )
    if title == "ifeval":
        return Sample(index + 1, prompt, None, "an answer", None, None, float((index + 3 * number) % 5 > number))
    pick = 0 if (index * 7 + number) % 11 > 3 + number else 1
    return Sample(index + 1, prompt, 0, None, (-1.0, -2.0), pick, float(pick == 0))


def write_eval(run: Path, models: dict[str, float]) -> dict[str, Any]:
    """eval/: scores.json and the lost and gained items."""
    results = make_results(models)
    about = {
        title: {"category": category, "metric": metric, "items": ITEMS, "sha256": title, "left_out": [],
                "unit": METRICS[metric].unit, "higher_is_better": METRICS[metric].higher_is_better}
        for title, (category, metric, _) in TASKS.items()
    }  # fmt: skip
    scores: dict[str, Any] = {"format": FORMAT, "tasks": about} | build_scores(results, Compared(next(iter(models))))
    for model in scores["models"].values():
        model |= {"path": "tiny", "fingerprint": "f" * 64}
    write(run / "eval/scores.json", scores)
    choices = {t: [("yes", HOSTILE)] * ITEMS if a["metric"] == "acc" else [()] * ITEMS for t, a in about.items()}
    for comparison in scores["comparisons"]:
        for part, items in changed_items(results, comparison, choices).items():
            lines = "".join(json.dumps(item) + "\n" for item in items)
            write(run / "eval/changed" / comparison["model"] / f"{part}.jsonl", lines)
    return scores


def write_train(run: Path, steps: int = 60, finished: bool = True) -> None:
    """train/: the metrics, and where it is finished the manifest."""
    lines = [{"step": 0, "validation_loss": 3.5}]
    for step in range(1, steps + 1):
        figures = {
            "loss": 3.0 / step**0.3,
            "rehearsal_loss": 0.5 + 0.001 * step,
            "learning_rate": 1e-4,
            "seconds": 2.0,
            "tokens_per_second": 500.0,
            "mfu": None,
            "peak_gpu_bytes": 0,
            "peak_host_bytes": 2**30,
            "kept_share": {"1": 0.25, "2": 0.5} if step == steps else None,
        }
        lines.append({"step": step} | figures)
        if step % 20 == 0:
            lines += [{"step": step, "validation_loss": 3.1 / step**0.3}]
            lines += [{"step": step, "drift": 0.002 * step, "kl": 0.001 * step}]
    write(run / "train/metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write(run / "train/config.yaml", CONFIG)
    if not finished:
        return
    names = [f"model.layers.{layer}.{module}.weight" for layer in range(4) for module in MODULES]
    trained = {n: "t" * 64 for n in names if "mlp" in n and n.split(".")[2] in "12"}
    frozen = {
        n: "f" * 64 for n in [*names, "model.layers.0.input_layernorm.weight", "model.norm.weight"] if n not in trained
    }
    write(run / "train/manifest.json", {
        "base": f"models/{HOSTILE}", "base_fingerprint": "b" * 64, "delta_sha256": "d" * 64, "used": {},
        "region": {"layers": "1-2", "modules": ["up_proj", "down_proj"], "match": None, "trained_weights": 1234567,
                   "held_weights": 0, "all_weights": 9876543},
        "softmask": {"apply_to": "update", "modules": ["up_proj"], "strength": 1.0}, "steps": steps, "tokens": 54321,
        "drift": {"max_drift": 0.1, "exceeded": {"step": steps, "drift": 0.002 * steps, "kl": None}},
        "seed": 7, "ranks": 2, "trained_sha256": trained, "frozen_sha256": frozen,
        "data": [{"path": "data/law.jsonl"}], "items": [{"read": 100, "kept": 98, "truncated": 3}],
    })  # fmt: skip


def write_compare(run: Path, methods: dict[str, tuple[float, ...]]) -> None:
    """compare/compare.json: of each method a point for each share of law items that it has learnt; full's first."""
    learnt = {
        f"{m}-{rate}-alpha1": share for m, shares in methods.items() for rate, share in enumerate(shares, start=1)
    }
    results = make_results({"base": 0.1, **learnt})
    places = {name: index for index, name in enumerate(results)}
    points = {
        m: [Point(f"{m}-{r}-alpha1", float(r), 1.0, (places[f"{m}-{r}-alpha1"],)) for r in range(1, len(shares) + 1)]
        for m, shares in methods.items()
    }
    about = {m: {"trained_weights": 4096, "all_weights": 9999, "steps": 60} for m in methods}
    write(run / "compare/compare.json", {
        "format": 1, "reference": next(iter(methods)), "seeds": [1234], "alphas": [1.0], "methods": about, "runs": [],
        "partial": {"runs": 9, "done": 8, "missing": [f"{HOSTILE}-1"]}, "config": {"model": {"name": "tiny"}},
        **match_methods(Bootstrap(match_items(results), 0.5), points, next(iter(methods))),
    })  # fmt: skip


def write_search(run: Path) -> None:
    """search/tree.json: three trials, of which one failed, and a winner."""

    def trial(name: str, parent: str | None, layers: str, modules: list[str], unified: float | None) -> dict[str, Any]:
        scores = dict.fromkeys(("speciality", "versatility", "unified"), unified)
        region = {"layers": layers, "modules": modules} if layers else None
        outcome = {"status": "done", "reason": None} if unified is not None else {"status": "failed", "reason": HOSTILE}
        place = {"id": name, "parent": parent, "region": region, "level": 1}
        return place | scores | outcome | {"num_trained": 4096, "seconds": 61.0}

    trials = [trial("a", None, "0-1", ["up_proj"], 31.25), trial("b", None, "2-3", ["up_proj"], None),
              trial("c", "a", "1", ["up_proj"], 40.5)]  # fmt: skip
    base = trial("base", None, "", [], 30.0)
    write(run / "search/tree.json", {"base": base, "trials": trials, "winner": "c", "reason": "Winner: layer 1."})


def write_importance_of(run: Path) -> None:
    """importance/: random vectors of four layers."""
    generator = torch.Generator().manual_seed(0)
    units = {ATTENTION_HEADS: 4, FFN_NEURONS: 48, FFN_OUTPUTS: 32}
    vectors = {kind: torch.rand(4, count, generator=generator) for kind, count in units.items()}
    made = {
        "base": "tiny",
        "items": 12,
        "tokens": 345,
        "estimator": "kl_dropout",
        "reduce": "signed",
        "normalize": "zscore_tanh",
    }
    write_importance(run / "importance", vectors, vectors, made)


def write(path: Path, content: Any) -> None:
    """A file of text, or of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def write_run(run: Path, learnt: float = 0.8, others: tuple[str, ...] = ()) -> dict[str, Any]:
    """All parts of a run; gives its scores."""
    write_train(run)
    write_search(run)
    write_importance_of(run)
    write_compare(run, {"full": (0.3, 0.9), "lora": (0.5, 0.6), HOSTILE: ()})
    return write_eval(run, {"base": 0.1, "run": learnt, **dict.fromkeys(others, 0.5)})


# what the fixture `by_hand` gives
BY_HAND = SimpleNamespace(
    run=write_run, eval=write_eval, compare=write_compare, train=write_train, search=write_search,
    importance=write_importance_of, file=write, hostile=HOSTILE,
)  # fmt: skip
