"""ZeRO-3 over several nodes: when each node gets a second copy of the weights, and that it trains the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from cofitune.launch.slurm import adopt_task
from cofitune.model.anatomy import read_anatomy
from cofitune.model.region import resolve_region
from cofitune.training.engine import deepspeed_config
from cofitune.training.fit_device import SHARE, choose_hpz_ranks
from cofitune.training.memory import Footprint
from tests.helpers import run_ranks
from tests.training import hpz_cases as cases
from tests.training.test_memory import SETTINGS

ANATOMY = read_anatomy(LlamaConfig(intermediate_size=11008, vocab_size=32000))
REGION = resolve_region("25%-50%", ("up_proj", "down_proj"), 32)
SIXTEEN = Footprint(ANATOMY, REGION, SETTINGS, 16, 512, 24)
HUGE = 2**50


def chosen(node: int = 8, room: int = HUGE, world_size: int = 16, **settings: object) -> int:
    run = replace(SIXTEEN, world_size=world_size, settings=replace(SETTINGS, **settings))  # type: ignore[arg-type]
    return choose_hpz_ranks(run, room, node)


def test_each_of_several_nodes_gets_a_second_copy_where_it_fits() -> None:
    assert chosen() == 8
    assert chosen(world_size=8) == 1, "one node"
    assert chosen(node=1) == 1, "one device a node: nothing would be shared"
    assert chosen(node=6) == 1, "nodes of unequal size"
    assert chosen(zero_stage=2) == 1 and chosen(offload_param="cpu") == 1
    own = {"zero_optimization": {"zero_hpz_partition_size": 4}}
    assert chosen(raw=own) == 1, "the user's own value stands"
    second = replace(SIXTEEN, settings=replace(SETTINGS, hpz_ranks=8)).memory
    assert second.weights - SIXTEEN.memory.weights == ANATOMY.num_parameters * 2 // 8
    assert [chosen(room=int(second.device / SHARE) + more) for more in (-2, 2)] == [1, 8]
    assert replace(SIXTEEN, settings=replace(SETTINGS, raw=own)).memory.weights > second.weights, "is counted, too"


def test_deepspeed_gets_it_under_stage_3_alone() -> None:
    def given(**changes: object) -> object:
        settings = replace(SETTINGS, **changes)  # type: ignore[arg-type]
        return deepspeed_config(settings)["zero_optimization"].get("zero_hpz_partition_size")

    assert given(hpz_ranks=8) == 8
    assert given(hpz_ranks=1) is None and given(hpz_ranks=8, zero_stage=2) is None
    assert given(hpz_ranks=8, raw={"zero_optimization": {"zero_hpz_partition_size": 4}}) == 4


@pytest.mark.parametrize(
    ("counts", "node", "here"),
    [
        ("4(x2)", "1", "4"),
        ("4(x2),3", "2", "3"),
        ("8", "0", "8"),
        ("4(x2)", "2", None),
        ("", "0", None),
        ("?", "0", None),
    ],
)
def test_srun_says_how_many_ranks_a_node_has(counts: str, node: str, here: str | None) -> None:
    step = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": node}
    environment = {**step, "SLURM_STEP_TASKS_PER_NODE": counts}
    adopt_task(environment, at_terminal=False)
    assert environment.get("LOCAL_WORLD_SIZE") == here


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Start four ranks once; they run every case and write what came out."""
    folder = tmp_path_factory.mktemp("hpz")
    run_ranks("training.hpz_cases", folder, ranks=cases.WORLD)
    return folder


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["", "_checkpoints"])
def test_four_ranks_on_two_nodes_train_to_the_bits_of_one_node(four_ranks: Path, kind: str) -> None:
    plain, second = ("plain" + kind, "second" + kind)
    about = {name: json.loads((four_ranks / f"{name}.json").read_text()) for name in (plain, second)}
    assert about[plain]["second"] == 0 and about[second]["second"] > 0, "else the case would prove nothing"
    assert about[plain]["losses"] == about[second]["losses"]
    weights = [load_file(four_ranks / f"{name}.safetensors") for name in (plain, second)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.processes
def test_an_engine_behind_one_with_second_copies_has_none(four_ranks: Path) -> None:
    after = json.loads((four_ranks / "after.json").read_text())
    assert after["second"] == 0
    assert after["losses"] == json.loads((four_ranks / "plain.json").read_text())["losses"]


@pytest.mark.processes
def test_ranks_agree_on_how_many_a_node_has(four_ranks: Path) -> None:
    counts = [json.loads((four_ranks / f"node{rank}.json").read_text()) for rank in range(cases.WORLD)]
    assert counts == [[4, 2, 1, 1]] * cases.WORLD, "one node; two; dealt to nodes in turn; nodes of unequal size"
