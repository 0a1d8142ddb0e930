"""What scripts/bench/grid counts with, on stores of trials made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from cofitune.model.region import Region
from cofitune.search.measured import CurvePoint
from cofitune.search.store import open_store
from cofitune.search.trial import BASE, Trial

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"
SEEDS = (1, 2)


@pytest.fixture
def truth(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCH)
    return import_module("grid_truth")


def region(layer: int) -> Region:
    return Region.span(layer, layer, ("up_proj",))


def curve(drift: float, loss: float = 1.0) -> tuple[CurvePoint, ...]:
    """Half of the way after 2 steps, and all of it after 4."""
    return CurvePoint(2, (2.0 + loss) / 2, drift / 2), CurvePoint(4, loss, drift)


def write_store(folder: Path, trials: Sequence[Trial]) -> Path:
    base: dict[str, Any] = {"region": None, "status": "done", "level": 0, "seed": 1, "num_trained": 0, "seconds": 5.0}
    base |= {"curve": (CurvePoint(0, 2.0, 0.0),)} if trials[0].curve else {"unified": 10.0}
    store = open_store(folder / "search", {"train": {"seed": 1}})
    for one in (Trial(id=BASE, **base), *trials):
        store.append(one)
    return folder


def trial(layer: int, seed: int, num_trained: int = 10, seconds: float = 10.0, **figures: Any) -> Trial:
    return Trial(
        id=f"{layer}-{seed}", region=region(layer), status="done", level=1, seed=seed, num_trained=num_trained,
        steps=4, seconds=seconds, **figures,
    )  # fmt: skip


def test_the_correlation_between_seeds_is_that_of_the_drifts(truth: Any, tmp_path: Path) -> None:
    drifts = np.random.default_rng(3).uniform(0.1, 0.5, size=(2, 6))
    made = [trial(n, seed, curve=curve(drifts[i, n])) for i, seed in enumerate(SEEDS) for n in range(6)]
    grid = truth.read_grid(write_store(tmp_path, made), "loss", SEEDS)
    assert grid.common == pytest.approx(1.0) and len(grid.both) == 6
    assert grid.correlation() == pytest.approx(stats.spearmanr(*drifts).statistic)
    assert [r.first for r in grid.truth()] == np.argsort(drifts.mean(axis=0)).tolist()
    deviation = np.sqrt(((drifts - drifts.mean(axis=0)) ** 2).sum() / 6)
    assert grid.judged().deviation == pytest.approx(deviation)
    reach = stats.t.ppf(0.975, 6) * deviation
    means = np.sort(drifts.mean(axis=0))
    assert grid.ties() == (int((means[1:] - means[0] <= reach).sum()), 5)


def test_what_does_not_learn_enough_ranks_behind_by_its_loss(truth: Any, tmp_path: Path) -> None:
    made = [trial(0, 1, curve=curve(0.3)), trial(1, 1, curve=curve(0.0, 1.9)), trial(2, 1, curve=curve(0.1, 1.8))]
    made.append(trial(0, 2, curve=curve(0.2)))
    grid = truth.read_grid(write_store(tmp_path, made), "loss", SEEDS)
    assert [r.first for r in grid.truth()] == [0, 2, 1]
    assert grid.figure(made[1]) is None and grid.both == [region(0)] and grid.correlation() is None
    assert grid.ties() == (0, 0), "those have no figure to compare"


def test_equal_scores_share_a_rank_and_lighter_regions_come_first(truth: Any, tmp_path: Path) -> None:
    made = [trial(n, 1, weights, unified=u) for n, weights, u in ((0, 40, 5.0), (10, 20, 5.0), (9, 20, 5.0))]
    made += [trial(7, 1, 99, unified=6.0), trial(7, 2, unified=1.0, seconds=99.0)]
    grid = truth.read_grid(write_store(tmp_path, made), "score", SEEDS)
    assert [r.first for r in grid.by_seed(2)] == [7] and grid.seconds() == 40.0, "the first seed's alone"
    assert [r.first for r in grid.truth()] == [9, 10, 0, 7]
    ranks = [truth.rank_in(grid.by_seed(1), region(n)) for n in (7, 0, 10, 9, 3)]
    assert ranks == [1, 2, 2, 2, None] and grid.work == (16, 4)


def test_a_folder_without_a_finished_trial_has_no_grid(truth: Any, tmp_path: Path) -> None:
    assert truth.read_grid(tmp_path, "loss", SEEDS) is None
    failed = Trial(
        id="x", region=region(0), status="failed", level=1, seed=1, num_trained=1, seconds=1.0, reason="lost"
    )
    assert truth.read_grid(write_store(tmp_path, [failed]), "score", SEEDS) is None


def test_the_page_sets_the_measures_side_by_side_and_says_what_is_partial(truth: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    grid_report, grid_plot = import_module("grid_report"), import_module("grid_plot")
    by_loss = [
        trial(n, seed, seconds=5.0, curve=curve(0.1 * (n + 1) + 0.001 * seed)) for seed in SEEDS for n in range(6)
    ]
    by_score = [trial(n, 1, unified=float(n)) for n in range(4)]
    results = [
        truth.Results(truth.read_grid(write_store(tmp_path / name, made), name, SEEDS), {"tree": None}, None)
        for name, made in (("loss", by_loss), ("score", by_score))
    ]
    settings = {
        "name": "grid",
        "command": "grid",
        "max_length": 8,
        "steps": 4,
        "items": 6,
        "prompts": 2,
        "rehearse": False,
    }
    page = grid_report.report(results, settings, {"device": "CPU"}, {"tree": 0.4}, 6)
    assert "**Partial**: `score`: 4 of 6 regions, 0 with both seeds." in page and "`loss`:" not in page
    assert "![the two seeds](grid.png)" in page
    assert "| loss | 6 of 6 | +1.00 |" in page and "| score | 0 of 6 | – |" in page
    assert "at least 0.7: met." in page and "0.50 over 4 regions, met" in page
    assert grid_plot.picture(results, "grid").alt == "Rank correlation between the two seeds: loss +1.00; score –."
