"""Who runs the trials of a search: ranks of this call, or a Ray cluster, as the config and the options say."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from cofitune.config import schema
from cofitune.executors import local
from cofitune.executors.ray import executor
from cofitune.launch import command, launcher


def run_with_executor(
    run: Callable[..., object],
    search: schema.Search,
    folder: Path,
    num_processes: int | None,
    hostfile: Path | None,
    say: Callable[[str], None],
) -> None:
    """Call `run`, the recipe `search` with its other arguments, with what executes trials and the proxy's pass.

    Args:
        folder: the search's own.
        say: is told what Ray does.

    Raises:
        UserError: the options ask for ranks that there are not; or as `run`.
    """
    requested = search.ray
    if search.executor == "ray":
        demand = executor.choose_demand(num_processes, hostfile, requested.gpus_per_trial, requested.cpus_per_trial)
        with executor.ray_executor(demand, requested.address, say=say) as on_ray:
            here = partial(command.start_proxy, ranks=launcher.ONE_PROCESS)
            run(execute=on_ray, start_proxy=here, measure=on_ray.measure, at_once=None, ranks=demand.ranks)
        return
    ranks = launcher.choose_ranks(num_processes, hostfile)
    measure, start_proxy = partial(local.measure_trial, ranks=ranks), partial(command.start_proxy, ranks=ranks)
    with local.local_executor(ranks, folder) as execute:
        run(execute=execute, start_proxy=start_proxy, measure=measure, ranks=ranks.count)
