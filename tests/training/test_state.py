"""Checkpoint and resume: the same bits on the same ranks, the same weights on another number, no trust in damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cofitune.training.engine import start_distributed
from tests.helpers import run_ranks
from tests.training import sharded_cases
from tests.training import state_cases as cases

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks run every case, in one start, and continue with what this process saved; it, with what they saved."""
    folder = tmp_path_factory.mktemp("state")
    sharded_cases.tiny_model().save_pretrained(folder / "model")
    start_distributed()
    cases.run_long(folder, "one", 1)
    run_ranks("training.state_cases", folder)
    cases.run_long(folder, "two_to_one", 1, folder / "two")
    return folder


def _state(folder: Path) -> dict[str, torch.Tensor]:
    """Everything of a checkpoint that training continues from."""
    return {key: t for file in sorted(folder.glob("*.safetensors")) for key, t in load_file(file).items()}


def _same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[k].view(torch.uint8), other[k].view(torch.uint8)) for k in one
    )


@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.name)
def test_what_is_loaded_is_what_was_saved(case, trained: Path) -> None:  # type: ignore[no-untyped-def]
    step = f"step-{cases.SAVED:06d}"
    saved, loaded = (_state(trained / case.name / which / step) for which in ("whole", "loaded"))
    assert _same_bits(saved, loaded)
    assert all(saved[key].dtype == torch.float32 for key in saved if key.startswith("model."))
    moments = [saved[key] for key in saved if key.endswith("/exp_avg")]
    assert moments and all(m.any() for m in moments), "zeros would prove nothing"


@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.name)
def test_a_resumed_training_ends_with_the_bits_of_an_uninterrupted_one(case, trained: Path) -> None:  # type: ignore[no-untyped-def]
    folder = trained / case.name
    whole, resumed = (load_file(folder / f"{which}.safetensors") for which in ("whole", "resumed"))
    assert _same_bits(whole, resumed)
    step = f"step-{cases.STEPS:06d}"
    assert _same_bits(_state(folder / "whole" / step), _state(folder / "resumed" / step))
    saved = _state(folder / "whole" / f"step-{cases.SAVED:06d}")
    name = next(iter(whole))
    assert not torch.equal(saved[f"{name}/master"].to(whole[name].dtype), whole[name]), "it trained on after the save"


@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.name)
def test_the_ranks_pieces_hold_what_whole_tensors_hold(case, trained: Path) -> None:  # type: ignore[no-untyped-def]
    step = f"step-{cases.SAVED:06d}"
    whole, joined, pieces = (trained / case.name / which / step for which in ("whole", "from_pieces", "pieces"))
    assert _same_bits(_state(whole), _state(joined))
    assert {path.name for path in pieces.iterdir()} == {
        "manifest.json", "random.safetensors", "rank-00000-00001.safetensors", "rank-00001-00001.safetensors",
    }  # fmt: skip
    size = sum(path.stat().st_size for path in whole.iterdir())
    assert max(path.stat().st_size for path in pieces.iterdir()) < 0.9 * size


def test_pieces_that_cannot_be_written_leave_nothing(trained: Path) -> None:
    assert not list((trained / "broken" / "full").iterdir())


def test_a_rank_on_a_disk_of_its_own_leaves_the_writing_to_rank_0(trained: Path) -> None:
    first, second = (trained / "broken" / f"disk-{rank}" for rank in range(2))
    assert (first / f"step-{cases.STEPS:06d}" / "state-00001.safetensors").is_file() and not second.exists()


def test_each_rank_checks_its_share_of_the_files(trained: Path) -> None:
    shares = [json.loads((trained / "checks" / f"hashed-{rank}.json").read_text()) for rank in range(2)]
    written = {path.name for path in (trained / "checks" / "both" / f"step-{cases.STEPS:06d}").glob("*.safetensors")}
    assert all(shares) and sorted([*shares[0], *shares[1]]) == sorted(written)


def test_rank_0_reads_for_a_rank_that_has_a_copy_on_its_own_disk(trained: Path) -> None:
    step = f"step-{cases.STEPS:06d}"
    assert _same_bits(*(_state(trained / "checks" / which / step) for which in ("both", "from_own")))


@pytest.mark.parametrize(("uninterrupted", "resumed"), [("two", "two_to_one"), ("one", "one_to_two")])
def test_another_number_of_ranks_goes_on_to_the_same_weights(uninterrupted: str, resumed: str, trained: Path) -> None:
    expected, got = (load_file(trained / f"{which}.safetensors") for which in (uninterrupted, resumed))
    difference = sum(float((got[n] - expected[n]).double().square().sum()) for n in expected) ** 0.5
    norm = sum(float(expected[n].double().square().sum()) for n in expected) ** 0.5
    assert difference <= 1e-6 * norm
