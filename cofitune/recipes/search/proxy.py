"""The proxy of a search: gradient statistics of its data, taken once in a process of their own, and what they say."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cofitune.config.schema import Config
from cofitune.data.batches import Batch, collate
from cofitune.data.chat import set_template
from cofitune.data.encoded import Encoding, Examples, encode_sources
from cofitune.data.sources import Source, open_source
from cofitune.distributed import device
from cofitune.errors import ArtifactError
from cofitune.files import read_json, write_checked_json
from cofitune.model.load import load_tokenizer
from cofitune.model.region import Region
from cofitune.recipes.from_config import base_anatomy, base_config, chat_template, data_sources, load_base
from cofitune.recipes.search.plan import SearchPlan
from cofitune.recipes.search.trial_config import base_rate, trial_rate
from cofitune.search.proxy import Statistics, first_norm, gradient_norms, squared_norm, statistics_from_json

ITEMS = 64  # of each of the two sets of data, spread evenly over it: about what a short trial trains on
MICRO_BATCH = 8  # items whose gradient is taken as one for the gain; the harm takes items one by one
StartProxy = Callable[[Config, Path], None]  # runs `take_statistics` in a process of its own


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
        factor = trial_rate(self.plan, region) / base_rate(self.plan.config)
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
    if not isinstance(known, dict):
        raise ArtifactError(f"{path}: these gradient statistics are damaged; delete the file")
    return known if known.get("identity") == _identity(plan) else None


def take_statistics(config: Config, path: Path) -> None:
    """Load the base, run one pass over items of both sets, and write the statistics.

    Raises:
        UserError: the model or the data cannot be used.
    """
    model_config = base_config(config.model)
    anatomy = base_anatomy(config.model, model_config)
    tokenizer = load_tokenizer(config.model.name, config.model.revision, config.model.trust_remote_code)
    set_template(tokenizer, chat_template(config.data))
    train_on = config.data.train_on
    speciality = _read(config, data_sources(config.data.train), tokenizer, train_on, None)
    general = _read(config, data_sources(config.importance.data), tokenizer, "response", config.importance.max_items)
    model = load_base(config.model).to(device())
    pad = tokenizer.pad_token_id
    gain = gradient_norms(model, anatomy, _micro_batches(speciality, MICRO_BATCH, pad), first_norm)
    harm = gradient_norms(model, anatomy, _micro_batches(general, 1, pad), squared_norm)
    write_checked_json(path, asdict(Statistics(gain, harm)))


def _read(config: Config, sources: list[Source], tokenizer: object, train_on: str, max_items: int | None) -> Examples:
    encoding = Encoding(config.data.max_length, train_on, config.data.on_bad_item)
    return Examples.chain(one.examples for one in encode_sources(sources, tokenizer, encoding, max_items))


def _micro_batches(examples: Examples, size: int, pad_token_id: int) -> Iterator[Batch]:
    """Items spread evenly over the data, sorted by length so that little is padded."""
    chosen = np.unique(np.linspace(0, len(examples) - 1, min(ITEMS, len(examples))).round().astype(int))
    order = sorted((int(i) for i in chosen), key=lambda i: int(examples.lengths[i]))
    for start in range(0, len(order), size):
        yield collate([examples[i] for i in order[start : start + size]], pad_token_id)


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
