"""A trial's line and its id."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from cofitune.model.region import Region
from cofitune.search.objective import Objective
from cofitune.search.trial import BASE, Trial, trial_from_json, trial_id

IDENTITY = {"model": "abc", "train": {"learning_rate": 4e-5, "seed": 1}, "data": ["d"]}
REGION = Region.span(8, 15, ("up_proj", "down_proj"))
DONE = Trial(
    id="abc",
    region=REGION,
    status="done",
    level=2,
    seed=1234,
    num_trained=721_420_288,
    seconds=12.5,
    parent="p",
    speciality=0.1 + 0.2,
    versatility=None,
    unified=33.3,
    categories={"gen_kn": 1 / 3, "instruct": None},
    intervals={"unified": (-1.5, 1 / 3)},
    train_loss=1.25,
    steps=60,
    start_step=15,
    learning_rate=5e-4,
    parts={"train": 10.0, "evaluate": 2.5},
)
FAILED = Trial("x", REGION, "failed", 1, 1, 5, 0.5, reason="out of memory:\n  »20 GiB«")


@pytest.mark.parametrize(
    "trial", [DONE, FAILED, replace(DONE, status="paused"), replace(DONE, id=BASE, region=None, parent=None)]
)
def test_a_trial_survives_its_line_exactly(trial: Trial) -> None:
    line = trial.to_json()
    assert "\n" not in line
    assert trial_from_json(line) == trial


def test_what_is_not_finite_is_written_as_null() -> None:
    line = replace(DONE, train_loss=math.nan, categories={"gen_kn": math.inf}).to_json()
    read = trial_from_json(line)
    assert read.train_loss is None
    assert read.categories == {"gen_kn": None}
    assert "NaN" not in line and "Infinity" not in line


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "null",
        "{}",
        json.dumps({**json.loads(DONE.to_json()), "extra": 1}),
        json.dumps({**json.loads(DONE.to_json()), "status": "running"}),
        json.dumps({**json.loads(DONE.to_json()), "unified": None}),
        json.dumps({**json.loads(DONE.to_json()), "region": {"first": 1}}),
        json.dumps({**json.loads(DONE.to_json()), "region": 7}),
    ],
)
def test_another_line_is_no_trial(line: str) -> None:
    with pytest.raises(ValueError):
        trial_from_json(line)


@pytest.mark.parametrize("unified", [None, math.nan, math.inf])
def test_a_finished_trial_needs_a_score_that_can_be_ranked(unified: float | None) -> None:
    with pytest.raises(ValueError, match="unified"):
        replace(DONE, unified=unified)


def test_the_id_depends_on_the_region_and_on_every_part_of_the_identity() -> None:
    changed = [
        trial_id(Region.span(8, 14, REGION.modules), IDENTITY),
        trial_id(Region.span(8, 15, ("up_proj",)), IDENTITY),
        trial_id(REGION, {**IDENTITY, "model": "abd"}),
        trial_id(REGION, {**IDENTITY, "train": {"learning_rate": 4e-5, "seed": 2}}),
        trial_id(REGION, {**IDENTITY, "data": ["d", "e"]}),
        trial_id(REGION, IDENTITY),
    ]
    assert len(set(changed)) == len(changed)
    assert trial_id(None, IDENTITY) == BASE


@pytest.mark.processes
def test_the_id_is_the_same_in_another_process_and_in_any_order_of_keys() -> None:
    mine = trial_id(REGION, IDENTITY)
    assert mine == trial_id(REGION, dict(reversed(list(IDENTITY.items()))))
    code = (
        "from cofitune.search.trial import trial_id; from cofitune.model.region import Region; "
        f"print(trial_id(Region.span(8, 15, ('up_proj', 'down_proj')), {IDENTITY!r}))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, timeout=600
    )
    assert other.stdout.strip().splitlines()[-1] == mine


def test_equal_scores_go_by_fewer_weights_then_by_the_lower_first_layer() -> None:
    high = replace(DONE, id="high", region=Region.span(24, 31, ("up_proj",)), num_trained=10, unified=50.0)
    low = replace(high, id="low", region=Region.span(0, 7, ("up_proj",)))
    small = replace(high, id="small", num_trained=9)
    better = replace(high, id="better", num_trained=99, unified=50.001)
    order = [t.id for t in sorted([high, low, small, better], key=Objective().rank)]
    assert order == ["better", "small", "low", "high"]
