"""Trials on a Ray cluster: each request is a task that asks for its GPUs; the store and all folders stay the driver's.

A trial of which Ray has lost the worker or the node runs again, elsewhere if it must. A paused one continues where
its state lies, on the same node: 12 bytes a trained weight are too many to carry along. Where that node is lost, the
trial begins again on another, to the same bits, since a training's result does not depend on its pauses.

Nodes come and go while a search runs: one that joins is asked for its versions before its first trial counts, and where
none is left that could hold a trial, the search waits for one, but not for ever.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cofitune.errors import UserError
from cofitune.executors.ray.cluster import Node, check_versions, join_cluster, last_line, nodes_that_hold, pinned_to
from cofitune.executors.ray.node import (
    HANDED_ON,
    RemoteTrial,
    Report,
    forget_search,
    measure_errand,
    needed_paths,
    read_files,
    run_errand,
    write_files,
)
from cofitune.launch.hostfile import CARRIED
from cofitune.recipes.trial.executor import Measured, TrialRequest, TrialResult

RETRIES = 3  # for a trial whose worker or node was lost
SECONDS_TO_END = 30  # for trials that are ended, before their processes are killed
ATTEMPTS_TO_END = 6
SECONDS_BETWEEN_LOOKS = 30  # at the cluster's nodes, while trials run
SECONDS_WITHOUT_NODES = 900  # that a search waits for one that can hold a trial
Work = Callable[[RemoteTrial], Report]


@dataclass(frozen=True)
class Demand:
    """What a trial asks of one node.

    Attributes:
        ranks: on how many it trains.
        gpus: None: one a rank where the cluster has GPUs, else none.
        cpus: cores; None: one a rank.
    """

    ranks: int = 1
    gpus: int | None = None
    cpus: int | None = None


def choose_demand(num_processes: int | None, hostfile: Path | None, gpus: int | None, cpus: int | None) -> Demand:
    """What the command line and the config's `search.ray` ask for together: a rank a GPU unless told otherwise.

    Raises:
        UserError: they contradict one another.
    """
    if hostfile is not None:
        raise UserError(
            "--hostfile and search.executor: ray: the cluster knows its machines; leave --hostfile out, and say with "
            "--num-processes on how many ranks of a node each trial trains"
        )
    ranks = num_processes or gpus or 1
    if gpus and gpus < ranks:
        raise UserError(f"search.ray.gpus_per_trial: {gpus}, but each trial has {ranks} ranks, which take a GPU each")
    return Demand(ranks, gpus, cpus)


@contextmanager
def ray_executor(
    demand: Demand, address: str = "auto", *, say: Callable[[str], None] = print, work: Work = run_errand
) -> Iterator[RayExecutor]:
    """Run a search's requests on the Ray cluster at `address`; the first request connects to it.

    Args:
        demand: what each trial asks for.
        address: `auto` finds the cluster that this machine belongs to, or that RAY_ADDRESS names.
        say: gets a line when a trial was lost and runs again.
        work: what a task does on its node.

    Raises:
        UserError: (by the requests) ray is not installed, there is no cluster, no node could ever hold a trial, or has
            come back for a quarter of an hour, or a node has other versions than this machine.
    """
    requests = RayExecutor(demand, address, say, work)
    try:
        yield requests
    finally:
        requests.close()


class RayExecutor:
    """What `TrialExecutor` asks for, on a cluster."""

    def __init__(self, demand: Demand, address: str, say: Callable[[str], None], work: Work) -> None:
        self._demand, self._address, self._say, self._work = demand, address, say, work
        self._ray: Any = None
        self._task: Any = None
        self._asks: tuple[int, int] = (0, 0)  # GPUs and cores of a trial
        self._nodes: set[str] = set()  # ids of those that can hold a trial, and have our versions
        self._without_since: float | None = None  # when the last of them was found gone
        # one name for each call: another of the same folder, a dry run perhaps, must not remove what this one paused
        self._search = f"cofitune-{uuid.uuid4().hex[:12]}"
        self._environment: dict[str, str] = {}
        self._state_lies_on: dict[str, str] = {}  # paused trial → node's id

    def __call__(self, requests: Sequence[TrialRequest]) -> Iterator[TrialResult]:
        """Hand all of them to the cluster, which runs as many at once as it can hold."""
        if requests and self._ray is None:
            self._connect()
        tasks = {request.id: self._send(request) for request in requests}
        # Python waits for them, and not Ray, so that a signal is answered as everywhere else
        running = {tasks[request.id].future(): request for request in requests}
        lost: Counter[str] = Counter()
        try:
            while running:
                done = wait(running, SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED).done
                if not done:
                    self._look_at_nodes()
                    continue
                ended = next(iter(done))
                request = running.pop(ended)
                del tasks[request.id]
                result = self._outcome(request, ended)
                if isinstance(result, TrialResult):
                    yield result
                    continue
                lost[request.id] += 1
                if lost[request.id] > RETRIES:
                    yield TrialResult(request, f"the cluster lost it {lost[request.id]} times; at last {result}")
                    continue
                message = f"trial {request.id}: the cluster lost it ({result})"
                self._say(f"{message}; it runs again, {lost[request.id]} of at most {RETRIES} times")
                tasks[request.id] = self._send(request)
                running[tasks[request.id].future()] = request
        finally:
            self._end(list(tasks.values()))

    def measure(self, request: TrialRequest) -> Measured:
        """Take the time of a few steps of a trial, and of a few items, on a node that can hold it.

        Raises:
            UserError: as for requests; or it failed.
        """
        if self._ray is None:
            self._connect()
        try:
            _, measured = self._ray.get(self._send(request, measure_errand))
        except self._ray.exceptions.RayError as error:
            raise UserError(f"no trial could be measured on the cluster: {last_line(error)}") from None
        result: Measured = measured
        return result

    def close(self) -> None:
        """Remove what the search has left on the nodes, and let go of the cluster."""
        if self._ray is None:
            return
        forget = self._ray.remote(num_cpus=0, max_retries=0)(forget_search)
        alive = {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}
        tasks = [forget.options(**pinned_to(node)).remote(self._search) for node in self._nodes if node in alive]
        if tasks:
            self._ray.wait(tasks, num_returns=len(tasks), timeout=SECONDS_TO_END)
        self._ray.shutdown()
        self._ray = None

    def _connect(self) -> None:
        ray = self._ray = join_cluster(self._address)
        nodes = self._living()
        demand = self._demand
        has_gpus = any(node["Resources"].get("GPU") for node in nodes)
        gpus = (demand.ranks if has_gpus else 0) if demand.gpus is None else demand.gpus
        cpus = demand.cpus or demand.ranks
        self._asks = gpus, cpus
        self._nodes = check_versions(ray, nodes_that_hold(nodes, gpus, cpus))
        self._environment = _environment(demand.ranks, gpus, cpus)
        self._task = ray.remote(num_gpus=gpus, num_cpus=cpus, max_retries=0)(_on_node)  # retries are counted here

    def _living(self) -> list[Node]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _look_at_nodes(self) -> None:
        """See who has joined, and whether anybody is left.

        Raises:
            UserError: a node that joined has other versions, or for too long there has been none for a trial.
        """
        nodes, now = self._living(), time.monotonic()
        try:
            able = nodes_that_hold(nodes, *self._asks)
        except UserError as error:
            if self._without_since is None:
                self._without_since = now
                self._say(f"{error}; waiting up to {SECONDS_WITHOUT_NODES / 60:g} minutes for one")
            elif now - self._without_since > SECONDS_WITHOUT_NODES:
                minutes = f"{SECONDS_WITHOUT_NODES / 60:g} minutes"
                raise UserError(
                    f"{error}; none came in {minutes}. What was done is kept: type it again to continue"
                ) from None
            return
        self._without_since = None
        new = [node for node in able if node["NodeID"] not in self._nodes]
        if new:
            self._nodes |= check_versions(self._ray, new, joining=True)

    def _send(self, request: TrialRequest, work: Callable[[RemoteTrial], Any] | None = None) -> Any:
        """Make a request a task of the cluster."""
        node = self._state_lies_on.get(request.id)
        search = request.config.search.model_copy(update={"prefix_cache": "none"})  # each trial has a worker of its own
        travels = replace(request, config=request.config.model_copy(update={"search": search}))
        errand = RemoteTrial(
            search=self._search,
            request=travels.to_json(),
            cwd=str(Path.cwd()),
            needs=needed_paths(request),
            begin=node is None,
            ranks=self._demand.ranks,
            environment=self._environment,
            files=read_files(request.folder, HANDED_ON),
        )
        task = self._task.options(**pinned_to(node, soft=True)) if node else self._task
        return task.remote(work or self._work, errand)

    def _outcome(self, request: TrialRequest, ended: Future[tuple[str, Report]]) -> TrialResult | str:
        """What came of a task; a string says how the cluster lost it."""
        try:
            node, report = ended.result()
        except self._ray.exceptions.RayTaskError as error:
            return TrialResult(request, f"on the cluster: {last_line(error)}")
        except self._ray.exceptions.RayError as error:  # the worker, the node, or what it had brought
            return _kind(error)
        if node not in self._nodes:
            self._look_at_nodes()
        return self._take(request, node, report) if node in self._nodes else "node gone before it told its versions"

    def _take(self, request: TrialRequest, node: str, report: Report) -> TrialResult:
        """Put what came back into the request's folder, which it names instead of the node's."""
        there, here = report.folder, str(request.folder)
        result = TrialResult.from_json(request, report.result)
        write_files(
            request.folder, {name: b.replace(there.encode(), here.encode()) for name, b in report.files.items()}
        )
        if request.stop_step is not None and result.error is None:
            self._state_lies_on[request.id] = node
        else:
            self._state_lies_on.pop(request.id, None)
        return replace(result, error=result.error and result.error.replace(there, here))

    def _end(self, tasks: list[Any]) -> None:
        """End tasks in good request, and after a grace by killing their processes."""
        for attempt in range(ATTEMPTS_TO_END + 1):  # a task that is just beginning may miss Ray's word
            for task in tasks:
                self._ray.cancel(task, force=attempt == ATTEMPTS_TO_END)
            if tasks:
                _, tasks = self._ray.wait(tasks, num_returns=len(tasks), timeout=SECONDS_TO_END / ATTEMPTS_TO_END)


def _on_node(work: Callable[[RemoteTrial], Any], errand: RemoteTrial) -> tuple[str, Any]:
    """The task: on which node it runs, and what came of it."""
    import ray

    return ray.get_runtime_context().get_node_id(), work(errand)


def _environment(ranks: int, gpus: int, cpus: int) -> dict[str, str]:
    """Variables that go along with each trial. Python's own stay the node's."""
    carried = tuple(prefix for prefix in CARRIED if prefix != "PYTHON")
    environment = {name: value for name, value in os.environ.items() if name.startswith(carried)}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cpus // ranks)))  # the same on every node: sums round alike
    return environment if gpus else environment | {"CUDA_VISIBLE_DEVICES": ""}


def _kind(error: BaseException) -> str:
    """A Ray error's name in words: `NodeDiedError` is `node died`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__.removesuffix("Error")).lower()
