"""A Ray cluster that is there already: joining it, and which of its nodes can take trials."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TypedDict

from cofitune.errors import UserError, install
from cofitune.executors.ray.node import tell_versions

EXTRA = "ray"
SECONDS_TO_CONNECT = 10
SECONDS_TO_ANSWER = 120  # for a node's first word: a fresh worker imports this package


class Node(TypedDict):
    """What Ray tells of a node, as far as it is read here; of resources how much it has of each."""

    NodeID: str
    NodeManagerHostname: str
    NodeManagerAddress: str
    Alive: bool
    Resources: dict[str, float]


def join_cluster(address: str) -> ModuleType:
    """Join the cluster at `address` and return the package `ray`, which is not imported before.

    Raises:
        UserError: ray is not installed, no cluster answers, or it runs another version of Ray or Python.
    """
    ray = _import_ray()
    with _own_sigterm():
        _join(ray, address)
    return ray


def nodes_that_hold(nodes: Sequence[Node], gpus: int, cpus: int) -> list[Node]:
    """Those of a cluster's nodes that can hold a trial at all.

    Raises:
        UserError: there is none.
    """
    able = [n for n in nodes if n["Resources"].get("GPU", 0) >= gpus and n["Resources"].get("CPU", 0) >= cpus]
    if able:
        return able
    if gpus and not any(node["Resources"].get("GPU") for node in nodes):
        raise UserError(
            f"search.ray.gpus_per_trial: {gpus}: no node of the cluster has a GPU ({_list_nodes(nodes)}); 0 trains on "
            "its CPUs, and null where there are no GPUs"
        )
    raise UserError(
        f"search.ray: a trial asks one node for {gpus} GPUs and {cpus} CPU cores, and no node of the cluster has them: "
        f"{_list_nodes(nodes)}; see search.ray.gpus_per_trial, search.ray.cpus_per_trial and --num-processes"
    )


def _import_ray() -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        return import_module("ray")
    except ModuleNotFoundError:
        raise UserError(f"search.executor: ray is not installed: {install(EXTRA)}") from None


def _join(ray: ModuleType, address: str) -> None:
    try:
        _knock(ray, address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        raise UserError(
            f"search.ray.address: {address}: no Ray cluster answers ({_first_line(error)}); `ray start` makes "
            "one, on each of its machines and on this one"
        ) from None
    except RuntimeError as error:  # another Ray or Python than the cluster's
        raise UserError(f"search.ray.address: {address}: {' '.join(str(error).split())}") from None


def _knock(ray: ModuleType, address: str) -> None:
    """See whether anybody answers where Ray will call: it would call for ever.

    Raises:
        ConnectionError: nobody does.
    """
    if address == "auto":
        known = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
        address = os.environ.get("RAY_ADDRESS") or (known.read_text().strip() if known.is_file() else "")
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        return  # what this is, Ray knows better
    if host in ("127.0.0.1", "localhost"):
        host = ray.util.get_node_ip_address()  # as Ray does
    try:
        socket.create_connection((host, int(port)), SECONDS_TO_CONNECT).close()
    except OSError as error:
        raise ConnectionError(f"{host}:{port}: {error.strerror or error}") from None


def check_versions(ray: ModuleType, nodes: Sequence[Node], joining: bool = False) -> set[str]:
    """Ask every node what it would run a trial with: another version's scores cannot be compared.

    Args:
        joining: the search is under way: a node that does not answer, or is gone again, is only left out.

    Returns:
        The ids of those that have the versions of this machine.

    Raises:
        UserError: a node differs from this machine, cannot import this package, or does not answer.
    """
    ask, here = ray.remote(num_cpus=0, max_retries=0)(tell_versions), tell_versions()
    asked = {ask.options(**pinned_to(node["NodeID"])).remote(): node for node in nodes}
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=SECONDS_TO_ANSWER)
    problems = {asked[task]["NodeID"]: f"no answer in {SECONDS_TO_ANSWER} seconds" for task in silent}
    for task in answered:
        node = asked[task]["NodeID"]
        try:
            there = ray.get(task)
        except ray.exceptions.RayError as error:
            problems[node] = last_line(error)
            continue
        different = [f"{name} {there[name]}, here it is {here[name]}" for name in here if there[name] != here[name]]
        if different:
            problems[node] = f"has {', '.join(different)}"
    alike = {node["NodeID"] for node in nodes} - problems.keys()
    if joining:
        living = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - {asked[task]["NodeID"] for task in silent}
        problems = {node: problem for node, problem in problems.items() if node in living}
    if problems:
        messages = [f"{_name(node)}: {problems[node['NodeID']]}" for node in nodes if node["NodeID"] in problems]
        raise UserError("search.executor: ray: not every node can take trials:\n" + "\n".join(messages))
    return alike


def pinned_to(node: str, soft: bool = False) -> dict[str, object]:
    """The option that binds a task to a node; `soft`: to another one where that one is gone."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=soft)}


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's answer to SIGTERM: Ray puts one of its own there, with another exit code."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _name(node: Node) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def _list_nodes(nodes: Sequence[Node]) -> str:
    return "; ".join(
        f"{_name(node)} has {node['Resources'].get('GPU', 0):g} GPUs, {node['Resources'].get('CPU', 0):g} cores"
        for node in nodes
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def last_line(error: BaseException) -> str:
    """What an error of Ray's ends with: after the trace, what was raised on the node."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
