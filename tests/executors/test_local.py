"""Orders on real workers, with the tiny model: what a trial leaves, and that none depends on what ran before it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import yaml

from cofitune.config.load import load_config
from cofitune.config.schema import Config, Model
from cofitune.executors import local as workers
from cofitune.executors.local import _Worker, local_executor, measure_trial
from cofitune.files import exclusive
from cofitune.launch.hostfile import Host
from cofitune.launch.launcher import Ranks
from cofitune.recipes.trial.executor import TrialRequest, TrialResult
from tests.helpers import children_of, read_jsonl, write_jsonl

pytestmark = pytest.mark.processes

ONE, TWO = (Ranks(n, (), ("--num-processes", str(n))) for n in (1, 2))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> dict[str, Any]:
    """A trial's config, the region and the folder left out."""
    folder = tmp_path_factory.mktemp("items")
    words = ("contract", "seller", "tenant", "notice", "landlord", "buyer", "reason", "lease", "court")
    law = [{"instruction": f"Say {w}{' please' * (i % 3)}", "output": f"The {w} is void."} for i, w in enumerate(words)]
    choice = [{"question": f"Which {w}?", "choices": ["Paris", "Rome"], "answer": i % 2} for i, w in enumerate(words)]
    for name, items in (("law", law), ("choice", choice)):
        write_jsonl(folder / f"{name}.jsonl", items)
    return {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"train": f"{folder}/law.jsonl", "max_length": 64},
        "train": {
            "max_steps": 4, "learning_rate": 1e-2, "warmup_ratio": 0, "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1, "save_steps": None,
        },
        "eval": {
            "batch_size": 4,
            "speciality": [
                {"path": f"{folder}/law.jsonl", "kind": "generate", "metric": "f1", "max_new_tokens": 8},
                {"path": f"{folder}/law.jsonl", "kind": "loss", "name": "law loss"},
            ],
            "versatility": {"gen_kn": [{"path": f"{folder}/choice.jsonl", "kind": "multiple_choice"}]},
        },
        "softmask": {"apply_to": "none"},
    }  # fmt: skip


def request(
    settings: dict[str, Any], folder: Path, layers: str, stop_step: int | None = None, **train: Any
) -> TrialRequest:
    """A trial of these layers' up and down projections, with settings of `train` of its own."""
    text = json.loads(json.dumps(settings))
    text |= {"region": {"layers": layers, "modules": ["up_proj", "down_proj"]}, "output_dir": str(folder)}
    text["train"] |= train
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(text))
    return TrialRequest(folder.name, load_config(path), folder, stop_step=stop_step)


def left(folder: Path) -> dict[str, Any]:
    """All that a trial's scores depend on: its weights by their hash, the losses of its steps, its answers."""
    scores = json.loads((folder / "eval" / "scores.json").read_text())
    metrics = read_jsonl(folder / "train" / "metrics.jsonl")
    files = sorted((folder / "eval" / "samples").rglob("*.jsonl"))
    run = scores["models"]["run"]
    return {
        "weights": run["delta_sha256"],
        "unified": run["unified"],
        "steps": [(m["step"], m["loss"], m["grad_norm"]) for m in metrics],
        "answers": {str(path.relative_to(folder)): path.read_text() for path in files},
    }


def run_all(ranks: Ranks, requests: list[TrialRequest]) -> list[TrialResult]:
    with local_executor(ranks) as execute:
        return list(execute(requests))


def test_no_trial_depends_on_earlier_ones_in_its_worker_or_a_failed_one(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep(1)\n")  # as long as imports would take
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    first, other, again, after = (
        request(settings, tmp_path / name, layers)
        for name, layers in (("first", "1-2"), ("other", "2-3"), ("again", "1-2"), ("after", "1-2"))
    )
    diverges = request(settings, tmp_path / "diverges", "1-2", learning_rate=1e30)
    results = run_all(ONE, [first, other, again, diverges, after])
    assert [o.request.id for o in results] == ["first", "other", "again", "diverges", "after"]
    assert [o.error is None for o in results] == [True, True, True, False, True]
    assert "training diverged" in str(results[3].error) and f"(exit 2; {tmp_path}/diverges/trial.log)" in str(
        results[3].error
    )
    alone = left(first.folder)
    assert len(alone["steps"]) == 4 and len(alone["answers"]) == 6
    assert left(again.folder) == alone and left(after.folder) == alone
    assert left(other.folder)["weights"] != alone["weights"]
    assert not list(tmp_path.rglob("*.safetensors")), "no weights are written"
    seconds = [o.seconds for o in results]
    assert all(set(s) == {"start", "train", "evaluate", "other"} for s in seconds)
    assert seconds[0]["start"] > 1 and seconds[4]["start"] > 1, "a worker starts with the first request, and anew"
    assert max(seconds[1]["start"], seconds[2]["start"]) < 0.5 and seconds[0]["other"] < seconds[0]["start"]
    assert "step 4/4" in (other.folder / "trial.log").read_text()


def test_two_ranks_share_a_trial_and_go_on_where_it_paused(settings: dict[str, Any], tmp_path: Path) -> None:
    whole, other = request(settings, tmp_path / "whole", "1-2"), request(settings, tmp_path / "other", "0-1")
    paused, later = (request(settings, tmp_path / "paused", "1-2", stop_step) for stop_step in (2, None))
    with local_executor(TWO) as execute:
        assert [o.error for o in execute([whole, paused])] == [None, None]
        half = left(paused.folder)
        assert [step for step, *_ in half["steps"]] == [1, 2]
        assert [p.name for p in (paused.folder / "train" / "checkpoints").iterdir()] == ["step-000002"]
        assert [o.error for o in execute([other, later])] == [None, None]
    assert left(paused.folder) == left(whole.folder)
    assert half["steps"] == left(whole.folder)["steps"][:2] and half["weights"] != left(whole.folder)["weights"]
    assert not list(tmp_path.rglob("*.safetensors")), "the checkpoint goes when the trial ends"


def test_a_measured_trial_leaves_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    asked = request(settings, tmp_path / "trial", "1-2")
    measured = measure_trial(asked, ONE)
    assert measured.seconds_to_start > measured.seconds_a_step > 0 and measured.seconds_to_evaluate > 0
    assert not asked.folder.exists()


def fake_worker(script: str, monkeypatch: pytest.MonkeyPatch) -> _Worker:
    """A worker whose process runs this script instead, which finds where the search is to be called."""
    start = subprocess.Popen
    called = 'import json, os, socket, sys, time\nhost, port, password = os.environ["COFITUNE_WORKER"].rsplit(":", 2)\n'

    def start_script(command: list[str], **options: Any) -> Any:
        return start([sys.executable, "-c", called + script], **options)

    monkeypatch.setattr(subprocess, "Popen", start_script)
    return _Worker(ONE)


CALL = """
line = socket.create_connection((host, int(port)))
line.sendall(json.dumps(password).encode() + b"\\n")
line.recv(1000)
"""


def test_a_launcher_that_lost_a_rank_gets_the_time_to_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "SECONDS_TO_END", 0.4)
    worker = fake_worker(CALL + "line.close()\ntime.sleep(2)\nprint('rank 0: out of memory')", monkeypatch)
    try:
        worker.wait_until_ready()
        assert worker.ask({"do": "trial"}) is None
        assert worker.last_words(tmp_path / "trial.log") == f"rank 0: out of memory (exit 0; {tmp_path}/trial.log)"
    finally:
        worker.end()


def test_a_stranger_who_says_nothing_does_not_keep_the_worker_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "SECONDS_TO_SAY_WHO", 0.3)
    stranger = "stranger = socket.create_connection((host, int(port)))\n"
    worker = fake_worker(stranger + CALL + "line.sendall(b'{\"done\": 1}\\n')", monkeypatch)
    try:
        worker.wait_until_ready()
        assert worker.ask({"do": "trial"}) == {"done": 1}
    finally:
        worker.end()


def test_a_worker_that_has_ended_is_not_waited_for_though_its_line_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = fake_worker(CALL + "if os.fork() == 0:\n    time.sleep(30)\nos._exit(1)", monkeypatch)
    try:
        worker.wait_until_ready()
        began = time.monotonic()
        assert worker.ask({"do": "trial"}) is None
        assert time.monotonic() - began < 20
    finally:
        worker.end()
        os.killpg(worker._process.pid, signal.SIGKILL)  # who held the line


def test_on_several_hosts_a_trial_is_measured_where_all_of_them_see_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []

    class Fake:
        def __init__(self, ranks: Ranks) -> None:
            """Starts nothing."""

        def wait_until_ready(self) -> None:
            """Is ready."""

        def ask(self, request: dict[str, Any]) -> dict[str, float]:
            folders.append(Path(request["request"]["folder"]))
            return {"seconds_to_start": 1.0, "seconds_a_step": 2.0, "seconds_to_evaluate": 3.0}

        def end(self) -> None:
            """Has nothing to end."""

    monkeypatch.setattr(workers, "_Worker", Fake)
    config = Config(model=Model(name="x"), output_dir=str(tmp_path / "run" / "trials" / "measured"))
    several: tuple[Host, ...] = (Host("one", 1), Host("two", 1))
    for hosts in (several[:0], several):
        assert measure_trial(TrialRequest("measured", config, config.run), Ranks(2, hosts, ())).seconds_a_step == 2.0
    alone, shared = folders
    assert shared.parent == tmp_path and alone.parent != tmp_path
    assert not shared.exists() and not list(tmp_path.iterdir())


SEARCH = """
import signal, sys, time
from pathlib import Path
from cofitune.config.load import load_config
from cofitune.files import exclusive
from cofitune.launch.launcher import Ranks
from cofitune.recipes.trial.executor import TrialRequest
from cofitune.executors.local import local_executor

folder, ranks = Path(sys.argv[1]), sys.argv[2]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
asked = TrialRequest("trial", load_config(folder.with_suffix(".yaml")), folder)
with exclusive(folder.parent / "search", "search"):
    with local_executor(Ranks(int(ranks), (), ("--num-processes", ranks))) as execute:
        print([result.error for result in execute([asked])], flush=True)
"""


@pytest.mark.parametrize(("ranks", "signum"), [(2, signal.SIGKILL), (1, signal.SIGTERM)])
def test_a_search_that_is_ended_leaves_no_worker_behind(
    ranks: int, signum: signal.Signals, settings: dict[str, Any], tmp_path: Path
) -> None:
    asked = request(settings, tmp_path / "trial", "1-2", max_steps=100_000)
    search = subprocess.Popen([sys.executable, "-c", SEARCH, str(asked.folder), str(ranks)])
    wait_for((asked.folder / "train" / "metrics.jsonl").is_file, 90)
    workers = children_of(search.pid)
    assert len(workers) >= ranks
    search.send_signal(signum)
    assert search.wait(timeout=300) == (143 if signum == signal.SIGTERM else -signal.SIGKILL)
    wait_for(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in workers), 20)
    with exclusive(tmp_path / "search", "search"):  # which the worker held, too, as long as it was there
        pass


def test_a_worker_that_is_killed_is_told_of(settings: dict[str, Any], tmp_path: Path) -> None:
    long = request(settings, tmp_path / "long", "1-2", max_steps=100_000)
    others = set(children_of(os.getpid()))

    def kill() -> None:
        wait_for((long.folder / "train" / "metrics.jsonl").is_file, 90)
        for process in set(children_of(os.getpid())) - others:
            process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    (result,) = run_all(ONE, [long])
    killer.join()
    assert result.error == (
        f"was killed from outside, as the system does when the machine's memory is full ({long.folder}/trial.log)"
    )


def wait_for(holds: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came so far"
        time.sleep(0.05)
