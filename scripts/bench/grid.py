"""Every region of a small space, tried with two seeds, and what the searches find of it: `scripts/bench/grid`.

The grid is `cofitune search` with a beam that expands everything: 7 layer ranges × {all, mha, ffn, up+down}, or fewer
(`--modules`); then the same regions are trained with a second seed, in a shuffled order, so that a part of them is a
fair sample. Both are done under each measure (`search.measure`: losses and drift, or the scores of an evaluation): the
rank correlation between the seeds says how far a measure repeats itself. The tree search has the same trials and takes
them from the grid's store, since a trial's figures do not depend on what ran before it. The fast search (proxy,
halving) pauses trials on the way, so it is run for itself, with a fifth of the grid's seconds for its budget.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from command import cofitune
from grid_config import (
    MEASURES,
    MODULES,
    REPOSITORY,
    SEEDS,
    grid_levels,
    number_of_regions,
    tree_levels,
    trees,
    write_config,
    write_rehearsal_config,
)
from grid_plot import picture
from grid_report import report
from grid_truth import Grid, Results, read_grid, read_search, tied_by_items
from sides import dump, machine, typed

from cofitune.config.load import load_config
from cofitune.executors.local import local_executor
from cofitune.files import exclusive
from cofitune.launch.launcher import Ranks
from cofitune.recipes.search.plan import plan_search
from cofitune.recipes.search.trials import Trials
from cofitune.reports.figure import can_draw, write_picture
from cofitune.reports.text import region_text
from cofitune.search.level import Job
from cofitune.search.store import open_store, read_trials

TARGETS = {"tree": 0.40, "up+down-tree": 0.40, "fast": 0.20}  # share of the grid's seconds
HoursLeft = Callable[[], float]


def main() -> None:
    """Run what is missing, as far as the time goes, and write the report again."""
    arguments = parse()
    began = time.monotonic()

    def hours_left() -> float:
        return arguments.hours - (time.monotonic() - began) / 3600

    if not arguments.report:
        if "loss" in arguments.measure or arguments.rehearse:
            cofitune("rehearse", write_rehearsal_config(arguments))
        for measure in arguments.measure:
            try_all(arguments, measure, hours_left)
        for measure in arguments.measure:
            try_fast(arguments, measure, hours_left)
    write_results(arguments)


def parse() -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(prog="scripts/bench/grid", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with law, arc_easy, piqa, ifeval, replay")
    parser.add_argument("--model", type=Path, default=REPOSITORY / ".cache" / "SmolLM2-135M-Instruct")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "runs" / "bench-grid", help="where the searches go")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "scripts" / "bench" / "results")
    parser.add_argument("--measure", nargs="+", choices=MEASURES, default=list(MEASURES), help="default: both, in turn")
    parser.add_argument("--hours", type=float, default=2.0, help="start no trial after this long; call it again")
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps of a trial, of 8 items each")
    parser.add_argument("--rung", type=int, default=6, help="step at which the fast search thins its trials out")
    parser.add_argument("--points", type=int, default=3, help="of a trial's curve under losses (default: %(default)s)")
    parser.add_argument("--modules", nargs="+", choices=MODULES, default=list(MODULES), help="beside all; default: all")
    parser.add_argument("--items", type=int, default=40, help="items of each task (ifeval: a third of it)")
    parser.add_argument(
        "--prompts", type=int, default=120, help="general prompts that the base answers; half for drift"
    )
    parser.add_argument("--rehearse", action="store_true", help="trials rehearse the other half, a fifth of each step")
    parser.add_argument("--max-length", type=int, default=160, help="tokens of a training item; longer: dropped")
    parser.add_argument("--report", action="store_true", help="only write the report anew from what there is")
    arguments = parser.parse_args()
    places = {arguments.data: "FOLDER", arguments.model: "MODEL", arguments.work: "WORK", arguments.out: "OUT"}
    arguments.command = typed("scripts/bench/grid", sys.argv[1:], places)
    arguments.halving = {"steps": [arguments.rung], "keep": 0.34}
    return arguments


def try_all(arguments: argparse.Namespace, measure: str, hours_left: HoursLeft) -> None:
    """Try every region under a measure, let the tree search look, and train all with the second seed."""
    if hours_left() <= 0:
        return
    folder = arguments.work / measure
    spent = seconds_in(folder) / 3600
    levels, regions = grid_levels(arguments.modules), number_of_regions(arguments.modules)
    path = write_config(arguments, measure, measure, levels, beam=regions, budget_hours=spent + hours_left())
    try:
        cofitune("search", path)
    except subprocess.CalledProcessError:
        if hours_left() > 0:
            raise
        print(f"the hours ended before one trial under {measure} was whole")
        return
    grid = read_grid(folder, measure, SEEDS)
    if grid and len(grid.first) == regions:
        for name, tree in trees(arguments.modules).items():
            hand_on(folder, arguments.work / f"{measure}-{name}")
            cofitune("search", write_config(arguments, f"{measure}-{name}", measure, tree))
    if grid:
        train_again(path, grid, hours_left)


def try_fast(arguments: argparse.Namespace, measure: str, hours_left: HoursLeft) -> None:
    """Let the fast search look, with its share of the grid's seconds, once the whole grid is there."""
    grid = read_grid(arguments.work / measure, measure, SEEDS)
    name = f"{measure}-fast"
    is_whole = grid is not None and len(grid.first) == number_of_regions(arguments.modules)
    if grid is None or not is_whole or (arguments.work / name / "search" / "tree.json").exists():
        return
    allowed = (TARGETS["fast"] * grid.seconds() + grid.base.seconds) / 3600  # a search's budget has the base in it
    if hours_left() > allowed - seconds_in(arguments.work / name) / 3600:
        fast: dict[str, Any] = {"proxy": "prune", "proxy_keep": 0.5, "halving": arguments.halving}
        cofitune(
            "search",
            write_config(arguments, name, measure, tree_levels(arguments.modules), budget_hours=allowed, **fast),
        )


def hand_on(grid: Path, tree: Path) -> None:
    """Give the tree search the grid's trials: the same regions under the same settings are the same trials."""
    if (tree / "search").exists():
        return
    (tree / "search").mkdir(parents=True)
    for name in ("store.json", "trials.jsonl"):
        shutil.copyfile(grid / "search" / name, tree / "search" / name)
    if (grid / "search" / "items").exists():
        shutil.copytree(grid / "search" / "items", tree / "search" / "items")


def train_again(path: Path, grid: Grid, hours_left: HoursLeft) -> None:
    """Train the grid's regions with the second seed, as its trials are; one that is stored is not made again."""
    plan = plan_search(load_config(path))
    regions = sorted(grid.first, key=str)
    random.Random(0).shuffle(regions)
    with exclusive(plan.folder, "search"), local_executor(Ranks(1, (), ("--num-processes", "1"))) as execute:
        store = open_store(plan.folder, plan.identity, repair=True)
        trials = Trials(plan, store, execute)
        for number, region in enumerate(regions, start=1):
            name = store.id_of(region, SEEDS[1])
            if store.at(name, None) is not None:
                continue
            if hours_left() <= 0:
                return
            job = Job(name, region, grid.first[region].level, grid.first[region].id, seed=SEEDS[1])
            for trial in trials.run([job]):
                store.append(trial)
                trials.drop_weights(trial.id)
                print(f"seed {SEEDS[1]}, {number} of {len(regions)}: {region_text(region)}: {trial.status}", flush=True)


def seconds_in(folder: Path) -> float:
    """What the trials of a search have taken so far, the base's measurement among them."""
    path = folder / "search" / "trials.jsonl"
    return float(sum(line.seconds for line in read_trials(path))) if path.exists() else 0.0


def read_results(arguments: argparse.Namespace) -> list[Results]:
    """What there is under each measure."""
    results: list[Results] = []
    for measure in arguments.measure:
        folder = arguments.work / measure
        grid = read_grid(folder, measure, SEEDS)
        if grid is not None:
            searches = {name: read_search(arguments.work / f"{measure}-{name}") for name in TARGETS}
            results.append(Results(grid, searches, tied_by_items(folder)))
    return results


def write_results(arguments: argparse.Namespace) -> None:
    """The report, the picture and every number of it."""
    results = read_results(arguments)
    if not results:
        print("not one trial is finished yet; call it again")
        return
    name = "grid-rehearse" if arguments.rehearse else "grid"
    settings: dict[str, Any] = {"name": name} | {
        setting: getattr(arguments, setting)
        for setting in ("command", "max_length", "steps", "points", "items", "prompts", "rehearse")
    }
    text = report(results, settings, machine(), TARGETS, number_of_regions(arguments.modules))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{name}.md").write_text(text)
    numbers: Sequence[dict[str, Any]] = [one.to_json() for one in results]
    (arguments.out / f"{name}.json").write_text(dump({**settings, "machine": machine(), "measures": numbers}))
    if can_draw():
        write_picture(arguments.out, picture(results, name))
    print(text)


if __name__ == "__main__":
    main()
