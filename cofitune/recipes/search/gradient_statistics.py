"""The gradient statistics of a search's proxy: one pass over items of both sets of data, on the ranks of a trial."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from cofitune.config import schema
from cofitune.config.schema import Config
from cofitune.data.batches import Batch, collate
from cofitune.data.chat import Example, set_template
from cofitune.data.encoded import Encoding, Examples, encode_sources
from cofitune.data.sources import Source
from cofitune.distributed import all_reduce_max, check_agreement, device, run_on_rank_zero
from cofitune.files import write_checked_json
from cofitune.importance.estimate import memory_estimate
from cofitune.model.anatomy import Anatomy
from cofitune.model.load import choose_dtype, load_tokenizer
from cofitune.model.region import freeze_outside
from cofitune.model.weight_files import fingerprint
from cofitune.ranks import this_rank
from cofitune.recipes.folders import versions_of_packages
from cofitune.recipes.from_config import base_anatomy, base_config, chat_template, data_sources, load_base
from cofitune.recipes.importance.plan import choose_sharding, device_memory
from cofitune.search.proxy import Norm, PerTensor, Statistics, first_norm, gradient_norms, module_weights, squared_norm
from cofitune.training.engine import release, start_distributed
from cofitune.training.frozen import share_frozen
from cofitune.training.memory import gathered_at_once
from cofitune.training.out_of_memory import telling_out_of_memory
from cofitune.zero import hold_until_gradients

ITEMS = 64  # of each of the two sets of data, spread evenly over it: about what a short trial trains on
MICRO_BATCH = 8  # items whose gradient is taken as one for the gain; the harm takes items one by one


@dataclass(frozen=True)
class Items:
    """The examples of the pass, which rank 0 has chosen: tokens and labels of both sets of data."""

    speciality: list[Example]
    general: list[Example]
    pad_token_id: int

    @property
    def longest(self) -> int:
        """Tokens of the longest one."""
        return max(len(example.input_ids) for example in (*self.speciality, *self.general))


def take_statistics(config: Config | None, path: Path) -> None:
    """Load the base, run one pass over items of both sets, and write the statistics. Every rank must call.

    The ranks share the micro-batches. They share the weights, too, under ZeRO-3, where the config's trainings do
    (`deepspeed.zero_stage: 3`) and, by `auto`, where a rank's device does not hold them whole.

    Args:
        config: on rank 0, which alone reads files but those of the model, and writes.

    Raises:
        UserError: the model or the data cannot be used.
    """
    start_distributed()
    config = run_on_rank_zero(lambda: config)
    if config is None:
        raise RuntimeError("rank 0 has no config")
    model, data, general = config.model, config.data, config.importance
    items = run_on_rank_zero(lambda: _read(model, data, general))
    check_agreement({"model": fingerprint(model.name, model.revision), "packages": versions_of_packages()})
    anatomy = base_anatomy(model, base_config(model))
    sharded = bool(all_reduce_max(int(_is_sharded(config.deepspeed.zero_stage, model.dtype, anatomy, items)), device()))
    with (
        telling_out_of_memory(partial(_explain, config.data.max_length, sharded)),
        _model(model, anatomy, sharded) as loaded,
    ):
        gain = _norms(loaded, anatomy, items.speciality, MICRO_BATCH, items.pad_token_id, first_norm, sharded)
        harm = _norms(loaded, anatomy, items.general, 1, items.pad_token_id, squared_norm, sharded)
    run_on_rank_zero(lambda: write_checked_json(path, asdict(Statistics(gain, harm))))


def _read(model: schema.Model, data: schema.Data, importance: schema.Importance) -> Items:
    base_config(model)  # whose message about a model that is not there is the better one
    tokenizer = load_tokenizer(model.name, model.revision, model.trust_remote_code)
    set_template(tokenizer, chat_template(data))

    def choose(sources: list[Source], train_on: str, max_items: int | None) -> list[Example]:
        encoding = Encoding(data.max_length, train_on, data.on_bad_item)
        encoded = encode_sources(sources, tokenizer, encoding, max_items)
        return _spread(Examples.chain(one.examples for one in encoded))

    speciality = choose(data_sources(data.train), data.train_on, None)
    general = choose(data_sources(importance.data), "response", importance.max_items)
    return Items(speciality, general, int(tokenizer.pad_token_id))


def _spread(examples: Examples) -> list[Example]:
    """Examples spread evenly over the data, sorted by length so that little is padded."""
    chosen = np.unique(np.linspace(0, len(examples) - 1, min(ITEMS, len(examples))).round().astype(int))
    return [examples[i] for i in sorted((int(i) for i in chosen), key=lambda i: int(examples.lengths[i]))]


def _is_sharded(stage: int | str, dtype: str, anatomy: Anatomy, items: Items) -> bool:
    """Whether this rank would have the weights shared."""
    rank = this_rank()
    if rank.world_size == 1 or stage in (1, 2):
        return False
    size = choose_dtype(dtype).itemsize
    whole = memory_estimate(anatomy, size, min(MICRO_BATCH, len(items.speciality)), items.longest, passes=1)
    requested = "zero3" if stage == 3 else "auto"
    return choose_sharding(requested, sum(whole.values()), device_memory(rank), rank.world_size).sharded


@contextmanager
def _model(model: schema.Model, anatomy: Anatomy, sharded: bool) -> Iterator[PreTrainedModel]:
    """The base on this rank's device: whole, or its share of it."""
    if not sharded:
        yield load_base(model, trains=True).to(device())
        return

    def load() -> PreTrainedModel:
        loaded = load_base(model, trains=True)
        freeze_outside(loaded, module_weights(anatomy))
        hold_until_gradients(loaded)
        return loaded

    engine = share_frozen(load, choose_dtype(model.dtype), gathered_at_once(anatomy))
    try:
        yield engine.module
    finally:
        release(engine)


def _norms(
    model: PreTrainedModel,
    anatomy: Anatomy,
    examples: Sequence[Example],
    size: int,
    pad_token_id: int,
    norm: Norm,
    sharded: bool,
) -> PerTensor:
    """`gradient_norms` over every `world_size`-th micro-batch of the examples on each rank."""
    rank = this_rank()
    starts = range(0, len(examples), size)
    own = starts[rank.rank :: rank.world_size]
    most = len(starts[:: rank.world_size])

    def micro_batches() -> Iterator[Batch]:
        for start in own:
            yield collate(examples[start : start + size], pad_token_id)

    return gradient_norms(model, anatomy, micro_batches(), norm, idle=most - len(own) if sharded else 0)


def _explain(max_length: int, sharded: bool, _: Exception, output: str) -> str:
    ways = [
        *([] if sharded else ["deepspeed.zero_stage: 3 on several ranks, which then share the weights"]),
        f"data.max_length: {max_length // 2}, which cuts longer items, in the trials, too",
        "search.proxy: none",
    ]
    return f"out of memory as gradients were taken: {output}; what would take less: {'; or '.join(ways)}"
