"""The configs that scripts/bench/grid and compare write are configs, and what grid counts with is right."""

from __future__ import annotations

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
@pytest.mark.parametrize("measure", ["loss", "score"])
@pytest.mark.parametrize("modules", [(), ("up+down",), ("mha", "ffn")])
def test_grid_writes_configs_of_one_space(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measure: str, modules: tuple[str, ...]
) -> None:
    arguments = typed(bench, tmp_path, monkeypatch, *(("--modules", *modules) if modules else ()))
    count, tree = bench.number_of_regions(arguments.modules), bench.tree_levels(arguments.modules)
    regions = []
    for name, levels, beam in (("grid", bench.grid_levels(arguments.modules), count), ("tree", tree, 1)):
        config = load_config(bench.write_config(arguments, name, measure, levels, beam=beam))
        assert [task.title for task in config.search.eval.speciality] == ["law"]  # type: ignore[union-attr]
        asked = [Level(level.layers or (), level.modules or ()) for level in config.search.levels]  # type: ignore[union-attr]
        planned = plan(asked, NUM_LAYERS, beam)
        regions.append({region for level in planned for region in level.candidates})
        most = sum(level.most for level in planned)
        assert most == count if name == "grid" else modules or most < bench.TARGETS["tree"] * count
    assert regions[1] <= regions[0], "what the tree tries is in the grid"
    load_config(bench.write_config(arguments, "fast", measure, tree, proxy="prune", halving=arguments.halving))


@pytest.mark.parametrize("bench", ["grid"], indirect=True)
def test_grid_trains_alike_under_both_measures(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = typed(bench, tmp_path, monkeypatch)
    configs = [
        load_config(bench.write_config(arguments, m, m, bench.grid_levels(arguments.modules)))
        for m in ("loss", "score")
    ]
    trainings = [config.train.model_dump(exclude={"drift_data"}) for config in configs]
    assert trainings[0] == trainings[1] and configs[0].data == configs[1].data
    answers = load_config(bench.write_rehearsal_config(arguments))
    assert configs[0].train.drift_data == str(Path(answers.output_dir or "") / "rehearsal")
    rehearsing = typed(bench, tmp_path, monkeypatch, "--rehearse")
    config = load_config(bench.write_config(rehearsing, "loss", "loss", bench.grid_levels(arguments.modules)))
    assert config.train.rehearsal and config.train.rehearsal.path == configs[0].train.drift_data
