"""Tokenized sources: made once, kept in the user's cache under their contents' hash, read through a memory map."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from cofitune.data.chat import IGNORED, Example, LazyExamples, encode_rows
from cofitune.data.encoded_cache import ITEMS, new_entry, read_entry, write_account
from cofitune.data.read import ItemCounts, Row
from cofitune.data.sources import OpenSource, Source, open_source
from cofitune.errors import ArtifactError, DataError, RepairWarning, UserError, WriteError
from cofitune.files import cache_folder, one_at_a_time, sha256_json
from cofitune.orphan import end_with_parent

VERSION = 8  # raised whenever the same item becomes other tokens or labels
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("supervised", pa.list_(pa.bool_())),
        ("begins_item", pa.bool_()),  # the first example of an item
    ]
)
ROWS_AT_ONCE = 256
BYTES_A_WORKER = 16 * 2**20  # less is tokenized sooner than a process starts
MOST_WORKERS = 16
OnRows = Callable[[str, int], None]


@dataclass(frozen=True)
class Encoding:
    """How items become tokens: the fields of the config's section `data`."""

    max_length: int
    train_on: str = "response"
    on_bad_item: str = "error"


class Examples(LazyExamples):
    """Tokenized items in memory-mapped Arrow tables; only what is asked for is read.

    Attributes:
        lengths: tokens of each example, int32 [N].
        begins_item: whether each is the first example of its item, bool [N].
    """

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self.lengths: np.ndarray = pc.list_value_length(table["input_ids"]).to_numpy().astype(np.int32)
        self.begins_item: np.ndarray = table["begins_item"].to_numpy(zero_copy_only=False).astype(bool)

    @classmethod
    def chain(cls, parts: Iterable[Examples]) -> Examples:
        """Several as one, in order; nothing is copied."""
        return cls(pa.concat_tables([part._table for part in parts]))

    def __len__(self) -> int:
        return len(self.lengths)

    def example(self, index: int) -> Example:
        """One of them."""
        ids = self._table["input_ids"][index].values.to_numpy()
        supervised = self._table["supervised"][index].values.to_numpy(zero_copy_only=False)
        return Example(ids.tolist(), np.where(supervised, ids, IGNORED).tolist())


@dataclass(frozen=True)
class Encoded:
    """One tokenized source."""

    opened: OpenSource
    examples: Examples
    account: ItemCounts


def encode_sources(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
    at_most: int | None = None,
    on_rows: OnRows | None = None,
) -> list[Encoded]:
    """Tokenize every source, or find it in the cache.

    Several processes may ask for the same at once: the first makes it, the others wait for it.

    Args:
        tokenizer: with its template set.
        at_most: rows to read in all, from the top of each source in proportion to its size; None: all.
        on_rows: called while this process tokenizes, with the source's path and the rows that are done.

    Raises:
        DataError: a source cannot be found or read, or holds not one usable item; or an item is unusable.
        UserError: the cache folder cannot be written.
    """
    opened = [open_source(source) for source in sources]
    limits = [None] * len(opened) if at_most is None else shares(at_most, opened)
    return [_encode_source(one, tokenizer, encoding, limit, on_rows) for one, limit in zip(opened, limits, strict=True)]


def shares(at_most: int, opened: Sequence[OpenSource]) -> list[int]:
    """Rows of each source: in proportion to its rows, by largest remainders, but one at least."""
    if len(opened) == 1:
        return [at_most]
    rows = [sum(1 for _ in one.rows()) for one in opened]
    requested = max(len(rows), min(at_most, sum(rows)))
    exact = [requested * count / sum(rows) for count in rows]
    shares = [max(1, int(share)) for share in exact]
    while sum(shares) < requested:
        lacks = [share - have for share, have in zip(exact, shares, strict=True)]
        shares[lacks.index(max(lacks))] += 1
    while sum(shares) > requested:  # what a share of none was raised by is the largest's
        shares[shares.index(max(shares))] -= 1
    return shares


def _encode_source(
    opened: OpenSource,
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
    limit: int | None,
    on_rows: OnRows | None,
) -> Encoded:
    folder = cache_folder() / "items" / _key(opened, tokenizer, encoding, limit)
    if (known := _sound(folder)) is None:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with one_at_a_time(folder.with_name(f"{folder.name}.lock")):
                if (known := _sound(folder)) is None:
                    _make(folder, opened, tokenizer, encoding, limit, on_rows)
                    known = read_entry(folder)
        except (OSError, WriteError) as error:
            reason = error.reason if isinstance(error, WriteError) else error.strerror or error
            raise UserError(
                f"the cache {folder.parent} cannot be written ({reason}); name another folder in the variable "
                "COFITUNE_CACHE"
            ) from error
    table, account = known
    return Encoded(opened, Examples(table), account)


def _sound(folder: Path) -> tuple[pa.Table, ItemCounts] | None:
    """An entry of the cache; None where there is none, or it is damaged, which is said."""
    if not folder.is_dir():
        return None
    try:
        return read_entry(folder)
    except ArtifactError as error:
        warnings.warn(f"tokenized items in the cache are damaged and made anew: {error}", RepairWarning, stacklevel=1)
        return None


def _key(opened: OpenSource, tokenizer: PreTrainedTokenizerBase, encoding: Encoding, limit: int | None) -> str:
    """One hash over everything that the tokens and labels depend on, and the path, which messages name."""
    parts = {
        "version": VERSION,
        "source": {**opened.identity(), "format": opened.source.format, "rows": limit},
        "encoding": asdict(encoding),
        "tokenizer": tokenizer_sha256(tokenizer),
    }
    return sha256_json(parts)[:32]


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """One hash over all of a tokenizer, its template set, that tokens and labels depend on."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return sha256_json([tokenizer.chat_template, special, tokenizer.backend_tokenizer.to_str()])


def _make(
    folder: Path,
    opened: OpenSource,
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
    limit: int | None,
    on_rows: OnRows | None,
) -> None:
    """Tokenize into a folder of another name, and put it in place when it is whole."""
    account = ItemCounts()
    with new_entry(folder) as temporary:
        with (temporary / ITEMS).open("wb") as file:
            with pa.ipc.new_stream(file, SCHEMA) as writer:
                for batch, part in _batches(islice(opened.rows(), limit), opened, tokenizer, encoding):
                    writer.write_batch(batch)
                    account.add(part)
                    if on_rows:
                        on_rows(opened.source.path, account.read)
            file.flush()
            os.fsync(file.fileno())
        if account.kept == 0:
            raise DataError(f"{opened.source.path}: not one usable item is left; the first: {account.first_dropped[0]}")
        write_account(temporary, account)


Batch = tuple[pa.RecordBatch, ItemCounts]


def _batches(
    rows: Iterator[tuple[str, Row]], opened: OpenSource, tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> Iterator[Batch]:
    """Tokenize the rows in order, in several processes where there is much to do; few rows are in memory at a time."""
    chunks = iter(lambda: list(islice(rows, ROWS_AT_ONCE)), [])
    setting = (opened.source.format, tokenizer, encoding)
    workers = _num_workers(opened.num_bytes())
    if workers == 1:
        yield from (_encode_chunk(chunk, *setting) for chunk in chunks)
        return
    # forked, so that the tokenizer need not be loaded again; nothing has started a GPU yet
    with ProcessPoolExecutor(workers, get_context("fork"), _start_worker, setting) as pool:
        waiting: deque[Future[Batch]] = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_encode_in_worker, chunk))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _num_workers(num_bytes: int | None) -> int:
    cores = min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    return cores if num_bytes is None else max(1, min(cores, num_bytes // BYTES_A_WORKER))


def _encode_chunk(
    chunk: list[tuple[str, Row]], form: str, tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> Batch:
    account = ItemCounts()
    items = list(encode_rows(chunk, form, tokenizer, **asdict(encoding), account=account))
    examples = [example for item in items for example in item]
    columns = [
        [e.input_ids for e in examples],
        [[label != IGNORED for label in e.labels] for e in examples],
        [place == 0 for item in items for place in range(len(item))],
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    return pa.record_batch(arrays, schema=SCHEMA), account


_setting: tuple[str, PreTrainedTokenizerBase, Encoding] | None = None


def _start_worker(form: str, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> None:
    end_with_parent()
    global _setting  # noqa: PLW0603 -- what a forked worker inherits
    _setting = (form, tokenizer, encoding)


def _encode_in_worker(chunk: list[tuple[str, Row]]) -> Batch:
    if _setting is None:
        raise RuntimeError("the worker was not started")
    return _encode_chunk(chunk, *_setting)
