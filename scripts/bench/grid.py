"""Every region of a small space, tried; then what the searches find of it, and for how much: `scripts/bench/grid`.

The grid is `cofitune search` with a beam that expands everything: 7 layer ranges × {all, mha, ffn, up+down}. The tree
search has the same trials and takes them from the grid's store, since a trial's scores do not depend on what ran before
it; its cost is the sum of what its own trials took there. The fast search (proxy, halving) pauses trials on the way, so
it is run for itself. The best five of the grid are then trained a second time, with another seed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from command import cofitune

from cofitune.config.load import load_config
from cofitune.executors.local import local_executor
from cofitune.launch.launcher import Ranks
from cofitune.model.region import Region, region_from_dict
from cofitune.recipes.search.plan import plan_search
from cofitune.recipes.search.trials import Trials
from cofitune.reports.text import region_text
from cofitune.search.level import Job
from cofitune.search.proxy import rank_correlation, statistics_from_json
from cofitune.search.store import open_store

REPOSITORY = Path(__file__).resolve().parents[2]
RANGES = ["bottom1", "bottom2", "middle", "top", "bottom-plus", "middle-plus", "top-plus"]
MODULES = [["mha"], ["ffn"], ["up_proj", "down_proj"]]
GRID = [{"layers": RANGES}, {"modules": MODULES}]
TREE = [
    {"layers": ["bottom-plus", "middle-plus", "top-plus"]},
    {"layers": ["bottom1", "bottom2", "middle", "top"]},
    {"modules": [["mha"], ["ffn"], ["all"]]},
    {"modules": [["up_proj", "down_proj"]]},
]
ALL_REGIONS = len(RANGES) * (1 + len(MODULES))
BEST = 5  # regions that are trained with a second seed
TARGETS = {"tree": 0.40, "fast": 0.20}  # share of the grid's seconds
SEEDS = (1234, 1235)


@dataclass(frozen=True)
class Grid:
    """What the grid's search left.

    Attributes:
        trials: finished trials of tree.json, the best first.
        seconds: of all that was tried, the base's evaluation left out.
        work: optimizer steps of all that was tried, and evaluations.
    """

    base: dict[str, Any]
    trials: list[dict[str, Any]]
    seconds: float
    work: tuple[int, int]

    def rank(self, trial: str) -> int | None:
        """Place of a trial, from 1, equal scores sharing the better; None where the grid has not come to it."""
        scores = {t["id"]: t["unified"] for t in self.trials}
        return 1 + sum(score > scores[trial] for score in scores.values()) if trial in scores else None


def main() -> None:
    """Run what is missing, as far as the time goes, and write the report again."""
    arguments = parse()
    began = time.monotonic()

    def hours_left() -> float:
        return arguments.hours - (time.monotonic() - began) / 3600

    spent = seconds_in(arguments.work / "grid")
    if not arguments.report:
        run_search(arguments, "grid", GRID, beam=ALL_REGIONS, budget_hours=arguments.hours + spent / 3600)
        run_search(arguments, "fast", TREE, proxy="prune", proxy_keep=0.5, halving=arguments.halving)
        hand_on(arguments.work / "grid", arguments.work / "tree")
        run_search(arguments, "tree", TREE)
        second_seed(arguments, hours_left)
    write_results(arguments)


def parse() -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(prog="scripts/bench/grid", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with law, arc_easy, piqa, ifeval, replay")
    parser.add_argument("--model", type=Path, default=REPOSITORY / ".cache" / "SmolLM2-135M-Instruct")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "runs" / "bench-grid", help="where the searches go")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "scripts" / "bench" / "results")
    parser.add_argument("--hours", type=float, default=2.0, help="start no trial of the grid after this long")
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps of a trial, of 8 items each")
    parser.add_argument("--rung", type=int, default=6, help="step at which the fast search thins its trials out")
    parser.add_argument("--items", type=int, default=40, help="items of each task (ifeval: a third of it)")
    parser.add_argument(
        "--max-length", type=int, default=160, help="tokens of a training item; longer ones are dropped"
    )
    parser.add_argument("--report", action="store_true", help="only write the report anew from what there is")
    arguments = parser.parse_args()
    arguments.halving = {"steps": [arguments.rung], "keep": 0.34}
    return arguments


def write_config(arguments: argparse.Namespace, name: str, levels: Sequence[Any], seed: int, **search: Any) -> Path:
    """The config of one search."""
    data, items = arguments.data, arguments.items
    config = {
        "model": {"name": str(arguments.model), "dtype": "float32"},
        "data": {
            "train": str(data / "law" / "train.jsonl"),
            "max_length": arguments.max_length,
            "on_bad_item": "drop",
        },
        "importance": {"data": str(data / "replay" / "train.jsonl")},  # the proxy's general data
        "train": {
            "learning_rate": 4e-4,
            "warmup_ratio": 0,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False,
            "seed": seed,
        },
        "search": {
            "levels": list(levels),
            "train_steps": arguments.steps,
            "limit": None,
            "prefix_cache": "memory",
            "eval": {
                "batch_size": 16,
                "on_bad_item": "drop",
                "speciality": [task(data, "law", items, kind="generate", metric="squad_match", max_new_tokens=12)],
                "versatility": {
                    "gen_kn": [task(data, "arc_easy", items, kind="multiple_choice")],
                    "gen_rs": [task(data, "piqa", items, kind="multiple_choice")],
                    "instruct": [task(data, "ifeval", max(1, items // 3), kind="ifeval", max_new_tokens=64)],
                },
            },
            **search,
        },
        "output_dir": str(arguments.work / name),
    }
    path: Path = arguments.work / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def task(data: Path, name: str, limit: int, **settings: Any) -> dict[str, Any]:
    """One task of the trials' evaluation."""
    return {"path": str(data / name / "test.jsonl"), "name": name, "limit": limit, **settings}


def run_search(arguments: argparse.Namespace, name: str, levels: Sequence[Any], **search: Any) -> None:
    """Type `cofitune search`; a second time it continues, or only prints."""
    path = write_config(arguments, name, levels, SEEDS[0], **search)
    cofitune("search", path)


def hand_on(grid: Path, tree: Path) -> None:
    """Give the tree search the grid's trials: the same regions under the same settings are the same trials."""
    if (tree / "search").exists():
        return
    (tree / "search").mkdir(parents=True)
    for name in ("store.json", "trials.jsonl"):
        shutil.copyfile(grid / "search" / name, tree / "search" / name)
    shutil.copytree(grid / "search" / "items", tree / "search" / "items")


def second_seed(arguments: argparse.Namespace, hours_left: Any) -> None:
    """Train the grid's best regions with another seed, as its trials are; one that is stored is not made again."""
    config = load_config(write_config(arguments, "seed2", GRID, SEEDS[1]))
    plan = plan_search(config)
    plan.folder.mkdir(parents=True, exist_ok=True)
    store = open_store(plan.folder, plan.identity)
    regions = [region_from_dict(t["region"]) for t in read_grid(arguments.work / "grid").trials[:BEST]]
    with local_executor(Ranks(1, (), ("--num-processes", "1"))) as execute:
        trials = Trials(plan, store, execute)
        trials.score_base()
        for region in regions:
            name = store.id_of(region)
            if store.at(name, None) is None and hours_left() > 0:
                for trial in trials.run([Job(name, region, 1, None)]):
                    store.append(trial)
                    trials.drop_weights(trial.id)
                    print(f"seed {SEEDS[1]}: {region_text(region)}: unified {trial.unified}", flush=True)


def read_grid(folder: Path) -> Grid:
    """Read the grid's tree.json."""

    def as_the_search(trial: dict[str, Any]) -> tuple[float, int, tuple[int, ...]]:
        return -trial["unified"], trial["num_trained"], region_from_dict(trial["region"]).layers

    tree = json.loads((folder / "search" / "tree.json").read_text())
    done = [t for t in tree["trials"] if t["status"] == "done"]
    best_first = sorted(done, key=as_the_search)
    seconds = sum(t["seconds"] for t in done)
    return Grid(tree["base"], best_first, seconds, work_of(folder, {t["id"] for t in done}))


def work_of(folder: Path, ids: set[str]) -> tuple[int, int]:
    """Optimizer steps and evaluations of a search's trials, by the store's lines: one a part of a trial."""
    lines = map(json.loads, lines_of(folder / "search" / "trials.jsonl"))
    # a stopped trial's line repeats the one of the part before
    parts = [t for t in lines if t["id"] in ids and t["status"] in ("done", "paused")]
    return sum(t["steps"] - t["start_step"] for t in parts), len(parts)


def seconds_in(folder: Path) -> float:
    """What the trials of a search have taken so far."""
    path = folder / "search" / "trials.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return float(sum(json.loads(line)["seconds"] for line in lines))


def write_results(arguments: argparse.Namespace) -> None:
    """The report and every number of it."""
    grid = read_grid(arguments.work / "grid")
    again = {
        json.dumps(t["region"]): t["unified"]
        for t in map(json.loads, lines_of(arguments.work / "seed2" / "search" / "trials.jsonl"))
        if t["status"] == "done" and t["region"]
    }
    results = {name: read_search(arguments.work / name) for name in TARGETS}
    tied = [t for t in grid.trials[1:] if t["to_winner"] and t["to_winner"]["tied"]]
    text = "\n\n".join(
        [head(arguments, grid), words(grid, results, tied, again), searches(grid, results), table(grid, again)]
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "grid.md").write_text(text + "\n")
    numbers = {"grid": vars(grid), "searches": results, "seed2": again}
    (arguments.out / "grid.json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(text)


def lines_of(path: Path) -> list[str]:
    """A file's lines; none where there is no file."""
    return path.read_text().splitlines() if path.exists() else []


def read_search(folder: Path) -> dict[str, Any] | None:
    """What a search found, and what its trials took; None where it has not ended."""
    path = folder / "search" / "tree.json"
    if not path.exists():
        return None
    tree = json.loads(path.read_text())
    winner = next(t for t in tree["trials"] if t["id"] == tree["winner"])
    proxy = folder / "search" / "proxy.json"
    seconds = sum(t["seconds"] for t in tree["trials"])
    return {
        "winner": winner,
        "trials": len(tree["trials"]),
        "stopped": sum(t["status"] == "stopped" for t in tree["trials"]),
        "pruned": len(tree["not_tried"]["pruned"]),
        "seconds": seconds,
        "work": work_of(folder, {t["id"] for t in tree["trials"]}),
        "proxy_seconds": json.loads(proxy.read_text())["seconds"] if proxy.exists() else 0.0,
        "proxy": json.loads(proxy.read_text()) if proxy.exists() else None,
        "proxy_correlation": (tree["proxy"] or {}).get("rank_correlation"),
    }


def head(arguments: argparse.Namespace, grid: Grid) -> str:
    """What was run."""
    whole = len(grid.trials) == ALL_REGIONS
    state = "" if whole else f" **Partial: {len(grid.trials)} of {ALL_REGIONS} regions.**"
    parts = [t["parts"] for t in grid.trials if t.get("parts")]
    sums = {name: sum(p.get(name, 0.0) for p in parts) for name in ("start", "train", "evaluate", "other")}
    total = sum(sums.values())
    shares = ", ".join(f"{name} {value / total:.1%}" for name, value in sums.items())
    items = arguments.items
    return f"""# Every region of a small space, and what the searches find of it

`scripts/bench/grid --data FOLDER`.{state} SmolLM2-135M-Instruct (4-bit GGUF, dequantised to fp32) learns law items of
at most {arguments.max_length} tokens for {arguments.steps} steps of 8, rate 4e-4, seed {SEEDS[0]}. Speciality: {items}
law items (squad_match); versatility: {items} items of arc_easy, {items} of piqa, {items // 3} of ifeval. The base has
{grid.base["unified"]:.1f} unified. {os.cpu_count()} CPU cores; other jobs may have run beside, so seconds are noisy.
The grid's {len(grid.trials)} trials took {grid.seconds / 60:.0f} minutes: {shares}."""


def words(grid: Grid, results: dict[str, Any], tied: Sequence[Any], again: dict[str, float]) -> str:
    """What it says, in sentences."""
    best = grid.trials[0]
    lines = [
        f"- The best region is **{region_text(region_from_dict(best['region']))}** with {best['unified']:.1f} unified; "
        f"{len(tied)} of the other {len(grid.trials) - 1} cannot be told apart from it (the paired 95 % interval of "
        "the difference over items contains 0)."
    ]
    pairs = [(t["unified"], again[key]) for t in grid.trials if (key := json.dumps(t["region"])) in again]
    if pairs:
        noise = statistics.mean((a - b) ** 2 / 2 for a, b in pairs) ** 0.5
        lines.append(
            f"- Between two training seeds the unified score of {len(pairs)} of the best regions has a standard "
            f"deviation of {noise:.1f} points."
        )
    if len(grid.trials) > 2:
        correlation = rank_correlation([t["num_trained"] for t in grid.trials], [t["unified"] for t in grid.trials])
        lines.append(f"- Rank correlation of the score with the number of trained weights: {correlation:+.2f}.")
    fast = results["fast"]
    if fast and fast["proxy"] and len(grid.trials) > 2:
        gradients = statistics_from_json(fast["proxy"], "proxy.json")
        guesses = [gradients.proxy_score(region_from_dict(t["region"]), 0.5) for t in grid.trials]
        correlation = rank_correlation(guesses, [t["unified"] for t in grid.trials])
        message = (
            f"- Rank correlation of the proxy with the scores of all {len(grid.trials)} regions: {correlation:+.2f}"
        )
        own = fast["proxy_correlation"]
        lines.append(
            f"{message}."
            if own is None
            else f"{message}; with those of the fast search's own finished trials: {own:+.2f}."
        )
    return "## In words\n\n" + "\n".join(lines)


def searches(grid: Grid, results: dict[str, Any]) -> str:
    """What each search found, and for how much of the grid's seconds."""
    rows = [
        "## The searches",
        "",
        "The tree's seconds are those that its trials took inside the grid, whose prefix cache had been filled by "
        "other regions as well; the fast search's are its own run's, its proxy's among them (not among its steps: the "
        "proxy takes gradients of 64 items of either data).",
        "",
        "| search | trials | stopped early | left out by the proxy | finds | unified | rank in the grid | of the grid's"
        " steps | of its evaluations | of its seconds | at most | |",
        "|" + "---|" * 12,
    ]
    for name, one in results.items():
        if one is None:
            rows.append(f"| {name} | not run yet | | | | | | | | | {TARGETS[name]:.0%} | |")
            continue
        share = (one["seconds"] + one["proxy_seconds"]) / grid.seconds
        kept = len(grid.trials) == ALL_REGIONS
        verdict = ("met" if share <= TARGETS[name] else "**missed**") if kept else "partial grid"
        winner = one["winner"]
        steps, evaluations = (part / whole for part, whole in zip(one["work"], grid.work, strict=True))
        rows.append(
            f"| {name} | {one['trials']} | {one['stopped']} | {one['pruned']} | "
            f"{region_text(region_from_dict(winner['region']))} | {winner['unified']:.1f} | "
            f"{grid.rank(winner['id']) or '-'} of {len(grid.trials)} | {steps:.1%} | "
            f"{evaluations:.1%} | {share:.1%} | {TARGETS[name]:.0%} | {verdict} |"
        )
    if fast := results["fast"]:
        trials, proxy = (fast[part] / grid.seconds for part in ("seconds", "proxy_seconds"))
        rows += [
            "",
            f"Of the fast search's {trials + proxy:.2%}, {trials:.2%} are its trials' and {proxy:.2%} the "
            "proxy's pass.",
        ]
    return "\n".join(rows)


def table(grid: Grid, again: dict[str, float]) -> str:
    """Every region, the best first."""
    rows = [
        "## Every region",
        "",
        "Scores 0-100; `to the best`: the difference of the unified score, with the paired 95 % interval over items.",
        "",
        f"| region | weights | speciality | versatility | unified | to the best | seed {SEEDS[1]} | seconds |",
        "|" + "---|" * 8,
    ]
    for t in grid.trials:
        region: Region = region_from_dict(t["region"])
        behind = t["to_winner"]
        message = f"{behind['value']:+.1f} ({behind['low']:+.1f} … {behind['high']:+.1f})" if behind else ""
        second = again.get(json.dumps(t["region"]))
        scores = " | ".join(f"{t[name]:.1f}" for name in ("speciality", "versatility", "unified"))
        rows.append(
            f"| {region_text(region)} | {t['num_trained'] / 1e6:.1f} M | {scores} | {message} | "
            f"{'' if second is None else f'{second:.1f}'} | {t['seconds']:.0f} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
