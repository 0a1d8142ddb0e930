"""`eval.batch_size: auto`: the same batches for all that is compared, also by later calls; and memory that runs out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cofitune.evaluation.batch_size import DeviceMemory
from cofitune.ranks import VARIABLES
from cofitune.recipes.evaluate import plan as planning
from cofitune.recipes.evaluate import plan_report
from cofitune.recipes.evaluate.batches import asking_memory
from cofitune.recipes.evaluate.plan import plan_eval
from tests.helpers import write_jsonl
from tests.recipes.evaluate.test_recipe import ALL, Place, record_scoring

pytestmark = pytest.mark.processes


@pytest.fixture
def place(tmp_path: Path, tiny_model_folder: Path) -> Place:
    return Place(tmp_path, tiny_model_folder)


def give_room(patch: pytest.MonkeyPatch, place: Place, items: int) -> None:
    """Let the device hold so many of the largest items beside the weights."""
    plan = plan_eval(place.config())
    needed = asking_memory(plan.config.model, plan.models, plan.tasks)
    total = needed.weights + 2 * items * max(needed.items.values())
    patch.setattr(planning, "device_memory", lambda: DeviceMemory(total, None, True))
    patch.setattr(plan_report, "device_memory", lambda: DeviceMemory(total, needed.weights // 2, True))


def sizes(place: Place) -> set[int]:
    return set(place.scores()["settings"]["batch_size"].values())


def test_later_calls_ask_in_the_batches_of_the_first(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    config = place.config(batch_size="auto")
    place.train(1)
    scored = record_scoring(monkeypatch)
    give_room(monkeypatch, place, 4)
    place.evaluate(config=config)
    chosen = place.scores()["settings"]["batch_size"]
    assert chosen.keys() == set(ALL) and min(chosen.values()) == 4
    assert [tasks for _, tasks in scored] == [ALL, ALL], "base and run"
    give_room(monkeypatch, place, 8)
    place.evaluate(config=config)
    assert len(scored) == 2 and place.scores()["settings"]["batch_size"] == chosen, "more room changes nothing"
    give_room(monkeypatch, place, 1)
    place.evaluate(config=config)
    assert len(scored) == 2 and place.scores()["settings"]["batch_size"] == chosen, "nothing has to be asked"
    place.train(2)
    place.evaluate(config=config)
    assert min(sizes(place)) == 1
    assert scored[2][0] == scored[0][0] and len(scored) == 4, "base and run are asked"
    give_room(monkeypatch, place, 8)
    place.evaluate(config=config, overwrite=True)
    assert len(scored) == 6 and min(sizes(place)) == 8


def test_a_number_and_the_same_number_chosen_are_one(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.evaluate(config=place.config(batch_size=16))
    scored = record_scoring(monkeypatch)
    place.evaluate(config=place.config(batch_size="auto"))
    assert not scored and sizes(place) == {16}, "16 is what a CPU with room gets"
    assert place.scores()["tasks"]["law"]["items"] == 3


def test_a_dry_run_says_what_asking_takes_and_what_would_help(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    give_room(monkeypatch, place, 4)
    place.evaluate(config=place.config(batch_size="auto"), dry_run=True)
    output = place.said.getvalue()
    assert "batches of 4" in output and "as fits" in output
    assert "memory   about " in output and " on each device (weights 0 MiB); free is 0 MiB on this GPU" in output
    assert "less takes eval.batch_size: " in output and "model.dtype: bfloat16" in output


# the limit is set once all libraries are loaded: to what they have mapped, and 300 MiB
LIMITED = """
import resource, sys
from cofitune import cli
from cofitune.recipes.evaluate import recipe
from cofitune.recipes.rehearse import recipe
import cofitune.evaluation.harness.model, lm_eval.evaluator, deepspeed
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 300 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.argv = ["cofitune", *sys.argv[1:]]
cli.main()
"""


def run_limited(command: str, config: dict[str, Any]) -> str:
    """A command with little memory; what it says as it fails."""
    path = Path(config["output_dir"]).parent / "c.yaml"
    path.write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, command, str(path)],
        env={k: v for k, v in os.environ.items() if k not in VARIABLES} | {"MALLOC_ARENA_MAX": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_an_evaluation_that_runs_out_of_memory_says_what_to_set(tmp_path: Path, tiny_model_folder: Path) -> None:
    questions = [{"question": f"Say {n}. " * 40, "choices": ["void", "valid"], "answer": 0} for n in range(1024)]
    path = str(write_jsonl(tmp_path / "know.jsonl", questions))
    config = {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "eval": {"speciality": {"path": path, "kind": "multiple_choice"}, "batch_size": 1024},
        "output_dir": str(tmp_path / "run"),
    }
    output = run_limited("eval", config)
    assert "error: out of memory on the host while 'base' was asked 'know', 1024 items at once: " in output
    assert "  - eval.batch_size: 512 (all models are asked again)\n  - model.dtype: bfloat16" in output


def test_a_rehearsal_that_runs_out_of_memory_says_what_to_set(tmp_path: Path, tiny_model_folder: Path) -> None:
    prompts = [{"prompt": f"Say {n}. " * 40} for n in range(1024)]
    path = str(write_jsonl(tmp_path / "prompts.jsonl", prompts))
    config = {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "rehearsal": {"data": path, "max_new_tokens": 4, "batch_size": 1024, "engine": "transformers"},
        "output_dir": str(tmp_path / "run"),
    }
    output = run_limited("rehearse", config)
    assert "error: out of memory on the host while the base answered, 1024 items at once: " in output
    assert "  - rehearsal.batch_size: 512 (what was answered so far is answered again)" in output
