"""The cache of tokenized items: what is in it, when it is found, who makes it, and that little is in memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cofitune.data import encoded
from cofitune.data.chat import Example, encode
from cofitune.data.encoded import Encoding, Examples, encode_sources
from cofitune.data.read import make_item
from cofitune.data.sources import Source, open_source
from cofitune.errors import DataError, RepairWarning, UserError

WORDS = ["the", "court", "held", "that", "the", "contract", "was", "void"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of each test's own."""
    monkeypatch.setenv("COFITUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "items"


def write(path: Path, items: int, start: int = 0) -> Path:
    rows = [{"instruction": f"Say {n}", "output": " ".join(WORDS[: 1 + n % 8])} for n in range(start, start + items)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def obvious(path: Path, tokenizer: Any) -> list[Example]:
    rows = open_source(Source(str(path))).rows()
    return [encode(make_item(where, row, "auto"), tokenizer) for where, row in rows]


def test_what_comes_back_is_what_was_tokenized(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", 600)  # more than two record batches
    for _ in range(2):  # made, then found
        (one,) = encode_sources([Source(str(path))], tiny_tokenizer, Encoding(64))
        expected = obvious(path, tiny_tokenizer)
        assert list(one.examples) == one.examples[0:600] == expected
        assert one.examples[-1] == expected[-1]
        assert one.examples.lengths.tolist() == [len(e.input_ids) for e in expected]
        assert one.account.read == one.account.kept == len(one.examples) == 600
        assert one.account.tokens == sum(len(e.input_ids) for e in expected)
        assert one.account.supervised == sum(e.num_supervised for e in expected)


def test_sources_follow_one_another(tmp_path: Path, tiny_tokenizer: Any) -> None:
    paths = [write(tmp_path / "a.jsonl", 5), write(tmp_path / "b.jsonl", 300, start=7)]
    both = encode_sources([Source(str(p)) for p in paths], tiny_tokenizer, Encoding(64))
    chained = Examples.chain(one.examples for one in both)
    assert list(chained) == [e for path in paths for e in obvious(path, tiny_tokenizer)]


@pytest.mark.processes
def test_several_workers_give_the_same_in_the_same_order(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", 3000)
    with path.open("a") as file:
        file.write("{broken\n" * 300)
    alone = encode_sources([Source(str(path))], tiny_tokenizer, Encoding(64, on_bad_item="drop"))[0]
    monkeypatch.setattr(encoded, "_num_workers", lambda _: 2)
    monkeypatch.setenv("COFITUNE_CACHE", str(tmp_path / "other"))
    messages: list[tuple[str, int]] = []
    settings = Encoding(64, on_bad_item="drop")
    shared = encode_sources([Source(str(path))], tiny_tokenizer, settings, on_rows=lambda *t: messages.append(t))[0]
    assert messages[0] == (str(path), 256) and messages[-1] == (str(path), 3300)
    assert list(shared.examples) == list(alone.examples)
    assert shared.account == alone.account and shared.account.dropped == 300
    with pytest.raises(DataError, match=r"a\.jsonl:3001: this line is not valid JSON"):
        encode_sources([Source(str(path))], tiny_tokenizer, Encoding(64))


def test_it_is_made_once_and_anew_when_anything_changes(tmp_path: Path, tiny_tokenizer: Any, cache: Path) -> None:
    path = write(tmp_path / "a.jsonl", 3)

    def made(source: Source | None = None, **settings: Any) -> int:
        encode_sources([source or Source(str(path))], tiny_tokenizer, Encoding(**{"max_length": 64, **settings}))
        return len([p for p in cache.iterdir() if p.is_dir()])

    assert made() == made() == made(Source(str(path), weight=0.5)) == 1, "a weight changes no token"
    os.utime(path)
    assert made() == 1, "a later date alone changes nothing"
    assert made(max_length=63) == 2
    assert made(train_on="all") == 3
    assert made(on_bad_item="drop") == 4
    assert made(Source(str(path), format="alpaca")) == 5
    write(path, 4)
    assert made() == 6
    tiny_tokenizer.chat_template += "{# as before #}"
    assert made() == 7
    tiny_tokenizer.add_tokens(["court"])
    assert made() == 8
    tiny_tokenizer.bos_token = "<|im_start|>"
    assert made() == 9
    assert all(p.is_dir() for p in cache.iterdir()), "no lock is left"


def test_a_bad_item_leaves_nothing_behind(tmp_path: Path, tiny_tokenizer: Any, cache: Path) -> None:
    path = write(tmp_path / "a.jsonl", 300)
    with path.open("a") as file:
        file.write("{broken\n")
    with pytest.raises(DataError, match=r"a\.jsonl:301: .*data\.on_bad_item: drop"):
        encode_sources([Source(str(path))], tiny_tokenizer, Encoding(64))
    assert not [p for p in cache.iterdir() if p.is_dir()]
    with pytest.raises(DataError, match=r"not one usable item is left; the first: .*a\.jsonl:1: the prompt alone"):
        encode_sources([Source(str(path))], tiny_tokenizer, Encoding(5, on_bad_item="drop"))
    assert not [p for p in cache.iterdir() if p.is_dir()]
    (one,) = encode_sources([Source(str(path))], tiny_tokenizer, Encoding(64, on_bad_item="drop"))
    again = encode_sources([Source(str(path))], tiny_tokenizer, Encoding(64, on_bad_item="drop"))[0]
    assert one.account == again.account
    assert again.account.reasons == {"not valid JSON": 1} and again.account.read == 301


@pytest.mark.parametrize("name", ["items.arrow", "account.json"])
@pytest.mark.parametrize("damage", ["a bit", "torn", "gone"])
def test_a_damaged_entry_is_made_anew_and_said(
    tmp_path: Path, tiny_tokenizer: Any, cache: Path, name: str, damage: str
) -> None:
    path = write(tmp_path / "a.jsonl", 20)
    (whole,) = encode_sources([Source(str(path))], tiny_tokenizer, Encoding(64))
    expected = whole.examples[:]
    (entry,) = (p for p in cache.iterdir() if p.is_dir())
    content = bytearray((entry / name).read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        (entry / name).unlink()
    else:
        (entry / name).write_bytes(content[: len(content) // 2] if damage == "torn" else content)
    left = entry.with_name(f".{entry.name}.0123abcd.cofitune.tmp")
    left.mkdir()
    with pytest.warns(RepairWarning, match="tokenized items in the cache are damaged and made anew"):
        (again,) = encode_sources([Source(str(path))], tiny_tokenizer, Encoding(64))
    assert again.examples[:] == expected and again.account == whole.account
    assert [p for p in cache.iterdir() if p.is_dir()] == [entry]


@pytest.mark.processes
def test_processes_that_ask_at_once_make_it_once(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", 50)
    context = multiprocessing.get_context("fork")
    barrier, out = context.Barrier(3), context.Queue()

    def ask() -> None:
        made = []
        original = encoded._make

        def slow(*arguments: Any) -> None:
            made.append(1)
            time.sleep(0.5)  # the others ask meanwhile
            original(*arguments)

        monkeypatch.setattr(encoded, "_make", slow)
        barrier.wait()
        (one,) = encode_sources([Source(str(path))], tiny_tokenizer, Encoding(64))
        out.put((len(made), len(one.examples)))

    processes = [context.Process(target=ask) for _ in range(3)]
    for process in processes:
        process.start()
    answers = sorted(out.get(timeout=300) for _ in processes)
    for process in processes:
        process.join()
    assert answers == [(0, 50), (0, 50), (1, 50)]


def test_a_cache_that_cannot_be_written_says_so(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", 3)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COFITUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"the cache .* cannot be written .*COFITUNE_CACHE"):
        encode_sources([Source(str(path))], tiny_tokenizer, Encoding(64))


def test_at_most_takes_from_the_top_of_each_source_in_proportion(tmp_path: Path, tiny_tokenizer: Any) -> None:
    sizes = (90, 9, 1)
    sources = [Source(str(write(tmp_path / f"{n}.jsonl", n))) for n in sizes]

    def taken(at_most: int) -> list[int]:
        return [len(one.examples) for one in encode_sources(sources, tiny_tokenizer, Encoding(64), at_most)]

    assert taken(50) == [45, 4, 1] and taken(20) == [18, 1, 1], "none is left out"
    assert taken(70) == [63, 6, 1] and taken(1000) == list(sizes)
    (one,) = encode_sources(sources[:1], tiny_tokenizer, Encoding(64), 7)
    assert list(one.examples) == obvious(Path(sources[0].path), tiny_tokenizer)[:7]


def test_workers_come_with_the_amount_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    counts = [encoded._num_workers(n) for n in (0, encoded.BYTES_A_WORKER, 3 * encoded.BYTES_A_WORKER, 10**12, None)]
    assert counts == [1, 1, 3, 8, 8]


@pytest.mark.processes
def test_memory_does_not_grow_with_the_data(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenizing and reading five times as much takes hardly more anonymous memory; mapped pages are the system's."""

    def growth(items: int) -> int:
        path = write(tmp_path / f"{items}.jsonl", items)
        context = multiprocessing.get_context("fork")
        out = context.Queue()

        def work() -> None:
            before = _anonymous_bytes()
            peak = before
            original = encoded._encode_chunk

            def watched(*arguments: Any) -> Any:
                nonlocal peak
                peak = max(peak, _anonymous_bytes())
                return original(*arguments)

            monkeypatch.setattr(encoded, "_encode_chunk", watched)
            (one,) = encode_sources([Source(str(path))], tiny_tokenizer, Encoding(64))
            for index in np.random.default_rng(0).permutation(len(one.examples))[:2000]:
                assert one.examples[int(index)].input_ids
            out.put(max(peak, _anonymous_bytes()) - before)

        process = context.Process(target=work)
        process.start()
        grown = int(out.get(timeout=600))
        process.join()
        return grown

    small, large = growth(2_000), growth(10_000)
    assert large < small + 4 * 2**20, f"{small / 2**20:.1f} MiB, then {large / 2**20:.1f} MiB"


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")))
