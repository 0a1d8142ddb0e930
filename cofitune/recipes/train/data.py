"""The training data of a run: read, tokenized or found in the cache, mixed, perhaps packed; and the account of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from cofitune.config import schema
from cofitune.data.batches import Mixture
from cofitune.data.chat import Example, set_template
from cofitune.data.encoded import Encoded, Encoding, Examples, encode_sources
from cofitune.data.formats import BadItemError
from cofitune.data.packing import Packs, pack_lengths
from cofitune.data.read import ItemCounts, bad_item, make_item
from cofitune.data.sources import OpenSource, open_source
from cofitune.errors import DataError, UserError
from cofitune.model.load import load_tokenizer
from cofitune.model.packing import refuses_packing
from cofitune.ranks import this_rank
from cofitune.recipes.from_config import base_config, chat_template, data_sources
from cofitune.recipes.prerequisites import Prerequisites
from cofitune.reports.console import say
from cofitune.reports.training.plan import print_account
from cofitune.reports.training.progress import show_tokenizing


@dataclass(frozen=True)
class TrainData:
    """What a run trains on.

    Attributes:
        examples: tokenized items, or packs of them; empty where a dry run has no tokenizer.
        lengths: tokens of each example.
        mixture: how often the examples of each source count in an epoch.
        sources: where they come from.
        accounts: what became of each source's items.
        template: chat or plain.
        packed_into: tokens that a pack may have; None where items are not packed.
        validation: the items of data.validation, tokenized, never packed; empty without any, and in such a dry run.
        validation_sources: where they come from.
    """

    examples: Sequence[Example]
    lengths: np.ndarray
    mixture: Mixture
    sources: tuple[OpenSource, ...]
    accounts: tuple[ItemCounts, ...]
    tokenizer: PreTrainedTokenizerBase | None
    template: str
    packed_into: int | None = None
    validation: Sequence[Example] = ()
    validation_sources: tuple[OpenSource, ...] = ()

    @property
    def account(self) -> ItemCounts:
        """All sources' together."""
        return ItemCounts.total(self.accounts)


def read_train_data(
    model: schema.Model, data: schema.Data, general: tuple[schema.Source, ...], needs: Prerequisites
) -> TrainData:
    """Find the sources, load the tokenizer, and tokenize.

    A dry run without a tokenizer counts the items, and tells `needs` what it lacked.

    Args:
        general: the section `importance`'s data, which `data.replay` goes over again unless it names its own.

    Raises:
        UserError: no source is named, one cannot be used, an item is bad, or the model cannot be trained on packs.
    """
    if not data.train:
        raise UserError("data.train: name at least one file of training items")
    if data.packing:
        _check_packing(model)
    again = replayed(data, general)
    sources = data_sources((*data.train, *again))
    replay = (len(again), data.replay.share) if data.replay else None
    try:
        tokenizer = load_tokenizer(model.name, model.revision, model.trust_remote_code)
    except UserError as error:
        needs.lack(error)
        if data.packing:
            needs.missing.append(
                "data.packing: no packs without a tokenizer; the steps are counted as if each held one item"
            )
        opened = [open_source(source) for source in sources]
        accounts = [_count(one, data.on_bad_item) for one in opened]
        return _together(opened, accounts, [], None, data.template, None, replay)
    template = set_template(tokenizer, chat_template(data))
    encoding = Encoding(data.max_length, data.train_on, data.on_bad_item)
    with show_tokenizing(Console(stderr=True, quiet=this_rank().rank != 0)) as on_rows:
        encoded = encode_sources(sources, tokenizer, encoding, on_rows=on_rows)
        held_out = encode_sources(data_sources(data.validation), tokenizer, encoding, on_rows=on_rows)
    packed_into = data.max_length if data.packing else None
    together = _together(
        [e.opened for e in encoded], [e.account for e in encoded], encoded, tokenizer, template, packed_into, replay
    )
    if not held_out:
        return together
    return replace(
        together,
        validation=Examples.chain(e.examples for e in held_out),
        validation_sources=tuple(e.opened for e in held_out),
    )


def _together(
    opened: Sequence[OpenSource],
    accounts: Sequence[ItemCounts],
    encoded: Sequence[Encoded],
    tokenizer: PreTrainedTokenizerBase | None,
    template: str,
    packed_into: int | None,
    replay: tuple[int, float] | None,
) -> TrainData:
    """One data set of all sources; `replay` says how many of them, the last ones, are to be which share of an epoch."""
    examples: Sequence[Example] = []
    lengths, sizes = np.empty(0, dtype=np.int32), [account.kept for account in accounts]
    if encoded:
        chained = Examples.chain(e.examples for e in encoded)
        examples, lengths, sizes = chained, chained.lengths, [len(e.examples) for e in encoded]
        if packed_into:
            packs = [pack_lengths(e.examples.lengths, packed_into) for e in encoded]
            starts = np.cumsum([0, *sizes])
            packed = Packs(chained, [start + p for start, part in zip(starts, packs, strict=False) for p in part])
            examples, lengths, sizes = packed, packed.lengths, [len(part) for part in packs]
    if replay:  # an item counts once, however many examples its responses make
        counted = sizes if packed_into else [account.kept for account in accounts]
        opened = _weigh_replay(opened, counted, *replay)
    items = () if packed_into else tuple(_begins(e.examples) for e in encoded)
    mixture = Mixture(tuple(sizes), tuple(one.source.weight for one in opened), items)
    if mixture.per_epoch == 0:
        raise DataError("data.train: with these weights not one item is left in an epoch; raise them")
    return TrainData(examples, lengths, mixture, tuple(opened), tuple(accounts), tokenizer, template, packed_into)


def replayed(data: schema.Data, general: tuple[schema.Source, ...]) -> tuple[schema.Source, ...]:
    """The general data that is gone over again; none without `data.replay`."""
    return () if data.replay is None else data.replay.data or general


def _check_packing(model: schema.Model) -> None:
    """Raise a UserError where the model would let the conversations of a pack see each other."""
    if reason := refuses_packing(base_config(model), model.has_flash_attention, model.trust_remote_code):
        raise UserError(
            f"data.packing: the conversations of a pack must not see each other, and {reason}; set it to false"
        )


def _begins(examples: Examples) -> tuple[int, ...]:
    """Where items begin, if some of them have several examples."""
    return () if examples.begins_item.all() else tuple(np.flatnonzero(examples.begins_item).tolist())


def _weigh_replay(opened: Sequence[OpenSource], sizes: Sequence[int], count: int, share: float) -> list[OpenSource]:
    """Give the last `count` sources the weight by which their examples are `share` of an epoch's."""
    own, again = list(opened[:-count]), opened[-count:]
    learned = sum(size * one.source.weight for size, one in zip(sizes, own, strict=False))
    weight = learned * share / (1 - share) / sum(sizes[-count:])
    return own + [replace(one, source=replace(one.source, weight=weight)) for one in again]


def _count(opened: OpenSource, on_bad_item: str) -> ItemCounts:
    account = ItemCounts()
    for where, row in opened.rows():
        account.read += 1
        try:
            item = make_item(where, row, opened.source.format)
            account.kept += 1
            account.note_unread(item.unread)
        except BadItemError as error:
            bad_item(error, on_bad_item, account)
    if account.kept == 0:
        raise DataError(f"{opened.source.path}: not one usable item is left")
    return account


def print_data(data: TrainData, console: Console) -> None:
    """Say what was read, what became of it, and what an epoch holds."""
    account, mixture = data.account, data.mixture
    mixed = len(data.sources) > 1 or mixture.weights != (1.0,)
    print_account(console, account)
    if data.examples:
        weighted = list(zip(mixture.weights, data.accounts, strict=True))
        tokens = round(sum(weight * a.tokens for weight, a in weighted))
        supervised = round(sum(weight * a.supervised for weight, a in weighted))
        message = f"{tokens:,} tokens an epoch, {supervised:,} of them carry the loss ({data.template} template)"
        say(console, f"  {'about ' if mixed else ''}{message}")
    if data.validation:
        say(console, f"  {len(data.validation):,} items more for the validation loss")
    if mixed:
        for one, size, weight in zip(data.sources, mixture.sizes, mixture.weights, strict=True):
            what = "packs" if data.packed_into else "items"
            say(console, f"  {one.source.path}: {size:,} {what} × {weight:g} an epoch")
    if data.packed_into:
        fill = account.tokens / (len(data.examples) * data.packed_into)
        say(
            console,
            f"packing: {account.kept:,} items in {len(data.examples):,} packs of at most {data.packed_into} tokens, "
            f"{fill:.1%} full",
        )
