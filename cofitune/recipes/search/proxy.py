"""The proxy of a search: gradient statistics of its data, taken once (`gradient_statistics.py`), and what they say."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cofitune.config.schema import Config
from cofitune.data.sources import open_source
from cofitune.files import read_json, write_checked_json
from cofitune.model.region import Region
from cofitune.recipes.from_config import data_sources
from cofitune.recipes.search.gradient_statistics import ITEMS, MICRO_BATCH
from cofitune.recipes.search.plan import SearchPlan
from cofitune.recipes.search.trial_config import base_rate, trial_rate
from cofitune.search.proxy import Statistics, statistics_from_json

StartProxy = Callable[[Config, Path], None]  # runs `take_statistics` in processes of its own


@dataclass(frozen=True)
class Proxy:
    """What the gradients say of a region.

    Attributes:
        weight: of speciality in the objective.
    """

    statistics: Statistics
    plan: SearchPlan
    weight: float

    def proxy_score(self, region: Region) -> float:
        """High is good."""
        factor = trial_rate(self.plan, region) / base_rate(self.plan)
        return self.statistics.proxy_score(region, self.weight, factor)


def make_proxy(plan: SearchPlan, start_proxy: StartProxy) -> Proxy | None:
    """Take the statistics, or find them in `proxy.json` if they are of the same model and data; None without a proxy.

    Raises:
        UserError: they cannot be taken, or the file is damaged.
    """
    if plan.config.search.proxy == "none":
        return None
    path = plan.folder / "proxy.json"
    known = known_statistics(plan)
    if known is None:
        fresh = plan.folder / ".proxy.json"
        started = time.monotonic()
        start_proxy(plan.config, fresh)
        seconds = round(time.monotonic() - started, 1)  # what the proxy costs, its process's start included
        known = {
            "identity": _identity(plan),
            "seconds": seconds,
            **read_json(fresh, "file of gradient statistics"),
        }
        write_checked_json(path, known)
        fresh.unlink()
    # losses and the two other objectives name no weight: a region must do both there
    weighs = plan.measure.kind == "score" and plan.config.search.objective == "unified"
    weight = plan.measure.tasks.speciality_weight if weighs else 0.5
    return Proxy(statistics_from_json(known, str(path)), plan, weight)


def known_statistics(plan: SearchPlan) -> dict[str, object] | None:
    """What `proxy.json` holds, if it is of this model and data; None: there is nothing yet.

    Raises:
        ArtifactError: the file is damaged.
    """
    path = plan.folder / "proxy.json"
    known = read_json(path, "file of gradient statistics") if path.exists() else {}
    return known if known.get("identity") == _identity(plan) else None


def _identity(plan: SearchPlan) -> dict[str, object]:
    """All that the statistics depend on, by content."""
    importance = plan.config.importance
    general = [open_source(source) for source in data_sources(importance.data)]
    return {
        "model": plan.identity["model"],
        "data": plan.identity["data"],
        "general": [{"format": one.source.format, "sha256": one.sha256} for one in general],
        "max_items": importance.max_items,
        "items": ITEMS,
        "micro_batch": MICRO_BATCH,
    }
