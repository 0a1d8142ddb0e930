"""Orders on a real Ray cluster of two nodes on this machine: light tasks for what may happen, and a real trial."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cofitune.config.load import load_config
from cofitune.config.schema import Config, Model
from cofitune.errors import UserError
from cofitune.executors.local import local_executor
from cofitune.executors.ray import executor as module
from cofitune.executors.ray.cluster import Node, nodes_that_hold
from cofitune.executors.ray.executor import Demand, RayExecutor, choose_demand, ray_executor
from cofitune.executors.ray.node import RemoteTrial, Report, run_errand
from cofitune.launch.launcher import Ranks
from cofitune.recipes.trial.executor import Measured, TrialRequest, TrialResult
from cofitune.search.measured import CurvePoint
from tests.helpers import run_command, write_jsonl

pytestmark = pytest.mark.processes

NODE = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 80 * 2**20}
TWO_CORES = NODE | {"num_cpus": 2}


def patiently(get_node: Callable[[str, str], Any]) -> Callable[[str, str], Any]:
    """Ray asks without a pause whether a node is up, and gives up after half a minute: too little on a busy machine."""

    def ask(gcs_address: str, node_id: str) -> Any:
        end = time.monotonic() + 300
        while True:
            try:
                return get_node(gcs_address, node_id)
            except RuntimeError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)

    return ask


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes with one core each, on the loopback device, without a dashboard."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # keeps the driver, too, on the loopback device
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    import ray
    from ray._private import services
    from ray.cluster_utils import Cluster

    soon = {"health_check_period_ms": 500, "health_check_failure_threshold": 3, "health_check_initial_delay_ms": 0}
    head = {**NODE, "include_dashboard": False, "_system_config": soon}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(services, "get_node", patiently(services.get_node))
        made = Cluster(True, head_node_args=head)
        made.second = made.add_node(**NODE)
        made.wait_for_nodes()
        yield made
        ray.shutdown()
        made.shutdown()


class KeptConnection:
    """Ray, which a search that ends does not let go of: its workers, seconds to start each, serve the next test."""

    def __init__(self, ray: Any) -> None:
        self.ray = ray

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ray, name)

    def shutdown(self) -> None:
        """Stay."""


@pytest.fixture
def kept(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The cluster, and all tests that ask for it on one connection to it."""
    import ray

    join = module.join_cluster

    def join_once(address: str) -> KeptConnection:
        return KeptConnection(ray if ray.is_initialized() else join(address))

    monkeypatch.setattr(module, "join_cluster", join_once)
    return cluster


@pytest.fixture
def apart(cluster: Any) -> Any:
    """The cluster, to which nobody is connected."""
    import ray

    ray.shutdown()
    return cluster


def request(folder: Path, name: str, stop_step: int | None = None) -> TrialRequest:
    own = folder / "trials" / name
    own.mkdir(parents=True, exist_ok=True)
    return TrialRequest(name, Config(model=Model(name="x"), output_dir=str(own)), own, stop_step=stop_step)


def run(cluster: Any, work: Any, *requests: TrialRequest, output: list[str] | None = None) -> dict[str, TrialResult]:
    with ray_executor(Demand(), cluster.address, say=([] if output is None else output).append, work=work) as execute:
        return {result.request.id: result for result in execute(requests)}


def test_as_many_trials_run_as_the_cluster_holds_and_files_come_back(apart: Any, tmp_path: Path) -> None:
    def work(errand: RemoteTrial) -> Report:
        meeting = tmp_path / "meeting"
        meeting.mkdir(exist_ok=True)
        (meeting / errand.id).touch()
        end = time.monotonic() + 300
        while len(list(meeting.iterdir())) < 2:
            assert time.monotonic() < end, "nobody came: they run one after the other"
            time.sleep(0.05)
        files = {"eval/scores.json": b'{"at": "/there/eval"}', "eval/cache/key/more.jsonl": b"2"}
        measured = {"seconds": {"train": 1.5}, "curve": [{"steps": 4, "loss": 2.0, "drift": 0.1}]}
        return Report("host", "/there", measured, files | {f"eval/{k[5:]}": v for k, v in errand.files.items()})

    one, other = request(tmp_path, "one"), request(tmp_path, "other")
    cached = one.folder / "eval" / "cache" / "key" / "answers.jsonl"
    cached.parent.mkdir(parents=True)
    cached.write_text("the base's")
    results = run(apart, work, one, other)
    curve = (CurvePoint(4, 2.0, 0.1),)
    assert results == {r.id: TrialResult(r, None, {"train": 1.5}, curve) for r in (one, other)}
    assert (one.folder / "eval/scores.json").read_text() == f'{{"at": "{one.folder}/eval"}}', "the driver's folder"
    assert cached.read_text() == "the base's" and (other.folder / "eval/cache/key/more.jsonl").read_text() == "2"


def test_a_trial_that_fails_is_an_outcome_and_the_others_go_on(kept: Any, tmp_path: Path) -> None:
    def work(errand: RemoteTrial) -> Report:
        if errand.id == "bug":
            raise ValueError("a bug of ours")
        return Report("host", "/there", {"error": "out of memory"} if errand.id == "full" else {})

    results = run(kept, work, *(request(tmp_path, name) for name in ("bug", "full", "good")))
    assert results["bug"].error == "on the cluster: ValueError: a bug of ours"
    assert results["full"].error == "out of memory"
    assert results["good"].error is None


def test_a_trial_whose_worker_was_killed_runs_again_and_at_most_so_often(
    kept: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(errand: RemoteTrial) -> Report:
        tries = tmp_path / errand.id
        with tries.open("a") as file:
            file.write("x")
        if errand.id == "always" or tries.stat().st_size == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return Report("host", "/there")

    monkeypatch.setattr(module, "RETRIES", 1)
    output: list[str] = []
    results = run(kept, work, request(tmp_path / "run", "once"), request(tmp_path / "run", "always"), output=output)
    assert results["once"].error is None and (tmp_path / "once").read_text() == "xx"
    assert results["always"].error == "the cluster lost it 2 times; at last worker crashed"
    assert (tmp_path / "always").read_text() == "xx"
    assert sorted(output) == [
        f"trial {name}: the cluster lost it (worker crashed); it runs again, 1 of at most 1 times"
        for name in ("always", "once")
    ]


def test_a_paused_trial_resumes_where_its_state_lies_and_leaves_nothing(kept: Any, tmp_path: Path) -> None:
    def work(errand: RemoteTrial) -> Report:
        import ray

        from cofitune.executors.ray.node import search_folder

        state = search_folder(errand.search) / errand.id
        state.mkdir(parents=True, exist_ok=True)
        (state / "until").touch()
        node = ray.get_runtime_context().get_node_id()
        began = "anew" if errand.begin else "from its state"
        return Report("host", str(state), {}, {"eval/log": f"{began} {node} {state}".encode()})

    first, last = request(tmp_path, "a", stop_step=2), request(tmp_path, "a")
    busy = [request(tmp_path, name) for name in ("b", "c", "d")]
    with ray_executor(Demand(), kept.address, work=work) as execute:
        list(execute([first]))
        began, node, _ = (first.folder / "eval/log").read_text().split(" ")
        assert began == "anew"
        list(execute([*busy, last]))
        assert (last.folder / "eval/log").read_text().startswith(f"from its state {node} ")
        list(execute([request(tmp_path, "dropped", stop_step=1)]))
        assert (tmp_path / "trials/dropped/eval/log").read_text().endswith(f" {tmp_path}/trials/dropped"), (
            "named as here"
        )
        assert len(list(Path(tempfile.gettempdir()).glob("cofitune-*/dropped/until"))) == 1
    assert not list(Path(tempfile.gettempdir()).glob("cofitune-*/dropped")), "the search removes what it dropped"


def test_what_is_running_ends_when_the_search_does(kept: Any, tmp_path: Path) -> None:
    def work(errand: RemoteTrial) -> Report:
        if errand.id == "short":
            return Report("host", "/there")
        (tmp_path / f"{errand.id} began").touch()
        try:
            for _ in range(6000):
                time.sleep(0.05)
        finally:
            (tmp_path / f"{errand.id} ended").touch()
        return Report("host", "/there")

    with ray_executor(Demand(), kept.address, work=work) as execute:
        results = execute([request(tmp_path / "run", name) for name in ("short", "long", "queued", "queued too")])
        assert next(results).request.id == "short"
        wait_for(tmp_path / "long began")
        started = time.monotonic()
        results.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 200, "it does not wait for what it ends"
    assert (tmp_path / "long ended").exists()


SEARCH = """
import signal, sys, time
from pathlib import Path
from cofitune.config.schema import Config, Model
from cofitune.executors.ray.executor import Demand, RayExecutor, ray_executor
from cofitune.recipes.trial.executor import TrialRequest

folder = Path(sys.argv[2])

def work(errand):
    (folder / "began").touch()
    try:
        for _ in range(6000):
            time.sleep(0.05)
    finally:
        (folder / "ended").touch()

signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as in the command line
with ray_executor(Demand(), sys.argv[1], work=work) as execute:
    list(execute([TrialRequest("a", Config(model=Model(name="x"), output_dir="x"), folder / "run" / "a")]))
"""


@pytest.mark.interpreter  # Ray's driver has threads that know of no fork
def test_a_signal_to_the_search_ends_its_tasks_and_has_its_own_exit_code(apart: Any, tmp_path: Path) -> None:
    (tmp_path / "search.py").write_text(SEARCH)
    command = [sys.executable, str(tmp_path / "search.py"), apart.address, str(tmp_path)]
    with subprocess.Popen(command) as search:
        wait_for(tmp_path / "began")
        search.terminate()
        assert search.wait(300) == 128 + signal.SIGTERM
    assert (tmp_path / "ended").exists()


def test_a_trial_is_measured_on_a_node(kept: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(errand: RemoteTrial) -> Measured:
        if errand.ranks == 2:
            raise UserError("no memory")
        return Measured(1.0, float(errand.begin), 3.0)

    monkeypatch.setattr(module, "measure_errand", measure)
    asked = request(tmp_path, "a")
    with ray_executor(Demand(), kept.address) as on_ray:
        assert on_ray.measure(asked) == Measured(1.0, 1.0, 3.0)
    with (
        pytest.raises(UserError, match="could be measured on the cluster: .*no memory"),
        ray_executor(Demand(2, cpus=1), kept.address) as on_ray,
    ):
        on_ray.measure(asked)


def test_another_version_on_a_node_is_told_before_anything_runs(
    kept: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cofitune.executors.ray.node.__version__", "0.0")  # here: the nodes have the real one
    with pytest.raises(
        UserError, match=r"not every node can take trials:\n.*127\.0\.0\.1\): has cofitune .*here it is 0\.0"
    ):
        run(kept, None, request(tmp_path, "a"))


def test_a_cluster_that_could_never_hold_a_trial_is_refused(kept: Any, tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"gpus_per_trial: 1: no node of the cluster has a GPU"),
        ray_executor(Demand(gpus=1), kept.address) as execute,
    ):
        list(execute([request(tmp_path, "a")]))


def test_a_real_trial_equals_the_local_executors_also_in_two_parts(
    apart: Any, tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # sums round alike
    words = ("contract", "seller", "tenant", "notice", "landlord", "buyer")
    law = [{"instruction": f"Say {word}", "output": f"The {word} is void."} for word in words]
    write_jsonl(tmp_path / "law.jsonl", law)
    (tmp_path / "c.yaml").write_text(f"""
model: {{name: {tiny_model_folder}, dtype: float32}}
data: {{train: {tmp_path}/law.jsonl, max_length: 64}}
region: {{layers: 1-2, modules: [up_proj, down_proj]}}
train: {{max_steps: 4, learning_rate: 1e-2, per_device_train_batch_size: 2, gradient_accumulation_steps: 1}}
eval:
  speciality: [{{path: {tmp_path}/law.jsonl, kind: generate, metric: f1, max_new_tokens: 8}}]
  versatility:
    gen_kn: [{{path: {tmp_path}/law.jsonl, name: general, kind: generate, metric: rouge_l, max_new_tokens: 8}}]
output_dir: {tmp_path}
""")
    config = load_config(tmp_path / "c.yaml")

    def part(name: str, stop_step: int | None) -> TrialRequest:
        return TrialRequest(
            name, config.model_copy(update={"output_dir": str(tmp_path / name)}), tmp_path / name, stop_step=stop_step
        )

    with local_executor(Ranks(1, (), ("--num-processes", "1"))) as execute:
        assert [result.error for result in execute([part("here", None)])] == [None]
    with ray_executor(Demand(), apart.address) as on_ray:
        for stop_step in (2, None):
            assert [result.error for result in on_ray([part("there", stop_step)])] == [None]
            assert len((tmp_path / "there/train/metrics.jsonl").read_text().splitlines()) == (stop_step or 4)
    here, there = (left(tmp_path / name) for name in ("here", "there"))
    assert here == there
    assert len(here["weights"]) == 64 and len(here["losses"]) == 4 and len(here["answers"]) >= 2
    assert "step 4/4" in (tmp_path / "there/trial.log").read_text()
    assert not list(tmp_path.rglob("*.safetensors")) and not (tmp_path / "there/train/checkpoints").exists()


def left(folder: Path) -> dict[str, Any]:
    """What a trial's scores depend on: the hash of its weights, its losses, its answers, its scores."""
    run = json.loads((folder / "eval/scores.json").read_text())["models"]["run"]
    scores = {"unified": run["unified"], **run["categories"], **{t: s["raw"] for t, s in run["tasks"].items()}}
    lines = (folder / "train/metrics.jsonl").read_text().splitlines()
    answers = {path.name: path.read_text() for path in (folder / "eval/samples/run").glob("*.jsonl")}
    losses = [json.loads(line)["loss"] for line in lines]
    return {"weights": run["delta_sha256"], "losses": losses, "answers": answers, "scores": scores}


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "auto", "no address"])
def test_a_cluster_that_does_not_answer_is_told_at_once(
    apart: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    started = time.monotonic()
    with (
        pytest.raises(UserError, match=r"search\.ray\.address: .*: no Ray cluster answers \(.*\); `ray start` makes"),
        ray_executor(Demand(), address.format(port=port)) as execute,
    ):
        list(execute([request(tmp_path, "a")]))
    assert time.monotonic() - started < 60, "Ray itself would call for ever"


def test_without_ray_the_message_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[ray\]'"), ray_executor(Demand()) as execute:
        list(execute([request(tmp_path, "a")]))


@pytest.mark.parametrize("then", ["nobody", "another", "another with other versions"])
def test_a_search_that_lost_its_last_node_waits_for_one_but_not_for_ever(
    kept: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LOOKS", 0.5)
    monkeypatch.setattr(module, "SECONDS_WITHOUT_NODES", 9 if then == "nobody" else 120)
    nodes = [kept.add_node(**TWO_CORES)]
    output: list[str] = []

    def work(errand: RemoteTrial) -> Report:
        (tmp_path / f"began on {os.getpid()}").touch()
        time.sleep(300 if len(list(tmp_path.glob("began on *"))) == 1 else 0)
        return Report("host", "/there")

    def say(text: str) -> None:
        output.append(text)
        if "waiting up to" in text and then != "nobody":
            if "other versions" in then:
                monkeypatch.setattr("cofitune.executors.ray.node.__version__", "0.0")  # here: the node has the real one
            nodes.append(kept.add_node(**TWO_CORES))

    def kill() -> None:
        wait_for(tmp_path, "began on *")
        kept.remove_node(nodes.pop(), allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with ray_executor(Demand(cpus=2), kept.address, say=say, work=work) as execute:
            if then == "another":
                (result,) = execute([request(tmp_path / "run", "a")])
                assert result.error is None
            else:
                message = "none came in 0.15 minutes. What was done is kept" if then == "nobody" else "has cofitune"
                with pytest.raises(UserError, match=message):
                    list(execute([request(tmp_path / "run", "a")]))
    finally:
        killer.join()
        for node in nodes:
            kept.remove_node(node)
    again, waits = sorted(output, key=lambda text: "waiting up to" in text)  # on a busy machine either comes first
    assert "it runs again, 1 of at most 3 times" in again
    assert "no node of the cluster has them" in waits and "waiting up to" in waits


def test_a_trial_on_a_node_that_leaves_without_its_versions_runs_again(
    kept: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stays, joins = kept.add_node(**TWO_CORES), kept.add_node(**TWO_CORES)
    staying, leaving, left = stays.node_id, joins.node_id, tmp_path / "left"
    look, check = module.nodes_that_hold, module.check_versions
    looks: list[int] = []

    def look_before_it_joined(nodes: Any, gpus: int, cpus: int) -> Any:
        looks.append(len(nodes))
        able = look(nodes, gpus, cpus)
        return able if len(looks) > 1 else [node for node in able if node["NodeID"] == staying]

    def check_too_late(ray: Any, nodes: Any, joining: bool = False) -> set[str]:
        if joining and not left.exists():
            wait_for(tmp_path, f"* began on {leaving}")
            kept.remove_node(joins, allow_graceful=False)
            left.touch()
        return check(ray, nodes, joining)

    def work(errand: RemoteTrial) -> Report:
        import ray

        node = ray.get_runtime_context().get_node_id()
        (tmp_path / f"{errand.id} began on {node}").touch()
        end = time.monotonic() + 300
        while node == staying and not left.exists() and time.monotonic() < end:
            time.sleep(0.05)
        return Report("host", "/there")

    monkeypatch.setattr(module, "nodes_that_hold", look_before_it_joined)
    monkeypatch.setattr(module, "check_versions", check_too_late)
    output: list[str] = []
    try:
        with ray_executor(Demand(cpus=2), kept.address, say=output.append, work=work) as execute:
            results = list(execute([request(tmp_path / "run", "a"), request(tmp_path / "run", "b")]))
    finally:
        for node in (stays,) if left.exists() else (stays, joins):
            kept.remove_node(node)
    assert [result.error for result in results] == [None, None]
    assert len(list(tmp_path.glob("* began on *"))) == 3, "one trial was on the node that left"
    assert len(output) == 1 and "node gone before it told its versions" in output[0]


def test_a_node_that_dies_in_the_middle_loses_no_trial(kept: Any, tmp_path: Path) -> None:
    """The last test on this cluster: one of its nodes is gone afterwards."""
    second = kept.second.node_id

    def work(errand: RemoteTrial) -> Report:
        import ray

        node = ray.get_runtime_context().get_node_id()
        (tmp_path / f"{errand.id} began on {node}").touch()
        end = time.monotonic() + 300
        while len(list(tmp_path.glob("* began on *"))) < 2 and time.monotonic() < end:
            time.sleep(0.05)  # so that each node has one
        time.sleep(300 if node == second else 0)
        return Report(node, "/there")

    def kill() -> None:
        wait_for(tmp_path, f"* began on {second}")
        kept.remove_node(kept.second, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    output: list[str] = []
    results = run(kept, work, request(tmp_path / "run", "a"), request(tmp_path / "run", "b"), output=output)
    killer.join()
    assert [result.error for result in results.values()] == [None, None]
    assert len(list(tmp_path.glob("* began on *"))) == 3
    assert len(output) == 1 and "it runs again, 1 of at most 3 times" in output[0], output


def wait_for(folder: Path, pattern: str | None = None) -> None:
    end = time.monotonic() + 300
    while not (any(folder.glob(pattern)) if pattern else folder.exists()):
        assert time.monotonic() < end, f"{folder} {pattern or ''} does not come"
        time.sleep(0.05)


def test_the_nodes_that_can_hold_a_trial_are_told_with_what_they_have() -> None:
    def node(name: str, gpus: int, cpus: int) -> Node:
        resources = {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})
        address = "10.0.0.1"
        return Node(NodeID=name, NodeManagerHostname=name, NodeManagerAddress=address, Alive=True, Resources=resources)

    head, four, eight = node("head", 0, 4), node("four", 4, 32), node("eight", 8, 64)
    assert nodes_that_hold([head, four, eight], 4, 4) == [four, eight]
    assert nodes_that_hold([head, four], 0, 4) == [head, four]
    with pytest.raises(UserError, match=r"for 8 GPUs and 8 CPU cores.*head \(10\.0\.0\.1\) has 0 GPUs, 4 cores; four"):
        nodes_that_hold([head, four], 8, 8)


def test_each_call_has_a_folder_of_its_own_on_the_nodes() -> None:
    """A dry run beside the search removes only what is its own."""
    one, other = (RayExecutor(Demand(), "auto", print, run_errand) for _ in range(2))
    assert one._search != other._search
    assert one._search.startswith("cofitune-")


def test_the_command_line_and_the_config_agree_on_the_ranks() -> None:
    assert choose_demand(None, None, None, None) == Demand(1, None, None)
    assert choose_demand(None, None, 8, 16) == Demand(8, 8, 16)
    assert choose_demand(2, None, None, None) == Demand(2, None, None)
    assert choose_demand(2, None, 0, None) == Demand(2, 0, None)
    with pytest.raises(UserError, match="gpus_per_trial: 1, but each trial has 2 ranks"):
        choose_demand(2, None, 1, None)
    with pytest.raises(UserError, match="--hostfile"):
        choose_demand(None, Path("hosts"), None, None)


def test_the_command_takes_the_cluster_that_the_config_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw: dict[str, Any] = {}
    monkeypatch.setattr("cofitune.recipes.search.recipe.search", lambda config, **options: raw.update(options))
    (tmp_path / "c.yaml").write_text(
        "model: {name: x}\noutput_dir: run\nsearch: {executor: ray, ray: {address: a:1, gpus_per_trial: 4}}\n"
    )
    assert run_command(monkeypatch, "search", str(tmp_path / "c.yaml")) == 0
    assert isinstance(raw["execute"], RayExecutor) and raw["measure"] == raw["execute"].measure
    assert raw["ranks"] == 4 and raw["at_once"] is None
