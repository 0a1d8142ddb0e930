"""The configs that scripts/bench/grid and compare write are configs, and what grid counts with is right."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cofitune.config.load import load_config
from cofitune.search.space import Level, plan

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"
NUM_LAYERS = 30  # of the model that the grid is for


@pytest.fixture
def bench(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    return import_module(request.param)


def typed(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    """What the script makes of a command line; all it needs is in `tmp_path`."""
    places = [f"--{name}={tmp_path / name}" for name in ("data", "model", "work", "out")]
    monkeypatch.setattr(sys, "argv", [bench.__name__, *places, *words])
    return bench.parse()


@pytest.mark.parametrize("bench", ["compare"], indirect=True)
@pytest.mark.parametrize("speciality", ["law", "math", "finance", "cag"])
def test_compare_writes_a_config(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speciality: str
) -> None:
    arguments = typed(bench, tmp_path, monkeypatch, f"--speciality={speciality}", "--seeds=2")
    config = load_config(bench.write_config(arguments))
    assert set(config.compare.methods) == set(bench.RATES) and len(config.compare.seeds) == 2
    assert [Path(task.path or "").parent.name for task in config.eval.speciality] == [speciality]


@pytest.mark.parametrize("bench", ["grid"], indirect=True)
def test_grid_writes_configs_of_one_space(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = typed(bench, tmp_path, monkeypatch)
    regions = []
    for name, levels, beam in (("grid", bench.GRID, bench.ALL_REGIONS), ("tree", bench.TREE, 1)):
        config = load_config(bench.write_config(arguments, name, levels, 1234, beam=beam))
        assert [task.title for task in config.search.eval.speciality] == ["law"]  # type: ignore[union-attr]
        asked = [Level(level.layers or (), level.modules or ()) for level in config.search.levels]  # type: ignore[union-attr]
        planned = plan(asked, NUM_LAYERS, beam)
        regions.append({region for level in planned for region in level.candidates})
        most = sum(level.most for level in planned)
        assert most == bench.ALL_REGIONS if name == "grid" else most < bench.TARGETS["tree"] * bench.ALL_REGIONS
    assert regions[1] <= regions[0], "what the tree tries is in the grid"
    load_config(bench.write_config(arguments, "fast", bench.TREE, 1, proxy="prune", halving=arguments.halving))


@pytest.mark.parametrize("bench", ["grid"], indirect=True)
def test_equal_scores_share_a_rank_and_stand_as_the_search_orders_them(bench: ModuleType, tmp_path: Path) -> None:
    def trial(name: str, layers: str, unified: float, weights: int, status: str = "done") -> dict[str, Any]:
        region = {"layers": layers, "modules": ["up_proj"]}
        return {
            "id": name, "region": region, "unified": unified, "num_trained": weights, "status": status, "seconds": 10.0
        }  # fmt: skip

    trials = [
        trial("heavy", "0-3", 5.0, 40),
        trial("late", "10-11", 5.0, 20),
        trial("early", "9-9", 5.0, 20),
        trial("best", "7-7", 6.0, 99),
        trial("broken", "8-8", 9.0, 1, "failed"),
    ]
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "tree.json").write_text(json.dumps({"base": {}, "trials": trials}))
    grid = bench.read_grid(tmp_path)
    assert [t["id"] for t in grid.trials] == ["best", "early", "late", "heavy"]
    assert [grid.rank(name) for name in ("best", "early", "late", "heavy", "broken")] == [1, 2, 2, 2, None]
    assert grid.seconds == 40.0
