"""Files of ours of which one bit is flipped: whoever reads them must find it, or read what was written."""

from __future__ import annotations

import random
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cofitune.errors import ArtifactError

Good = Any
CHECKPOINT = {"step": 3, "world_size": 1, "zero_stage": 2, "identity": {"seed": 1}}


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        write: fills a folder.
        read: what a folder holds; None where it found damage and will make it anew.
        files: a glob of those that carry a checksum, or are named by one.
    """

    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    files: str = "*"


def flip(path: Path, rng: random.Random) -> int:
    """Flip one bit of a file; returns which."""
    content = bytearray(path.read_bytes())
    bit = rng.randrange(len(content) * 8)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return bit


def prepare(good: Path) -> None:
    """Write and read a folder of each kind; what that imports takes longer than an input may."""
    for name, kind in KINDS.items():
        kind.write(good / name)
        kind.read(good / name)


def check(good: Path, folder: Path, rng: random.Random) -> None:
    """Flip a bit in a copy of one kind of file, and read it.

    Args:
        good: holds a folder of each kind (`prepare`).

    Raises:
        ArtifactError: the reader has found it.
        AssertionError: it has not, and read something else.
    """
    name = rng.choice(sorted(KINDS))
    kind = KINDS[name]
    shutil.copytree(good / name, folder / name)
    expected = _text(kind.read(folder / name))
    path = rng.choice(sorted(p for p in (folder / name).rglob(kind.files) if p.is_file()))
    bit = flip(path, rng)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = kind.read(folder / name)
    if found is None:
        raise ArtifactError(f"{path.name}: found, and made anew")
    if _text(found) != expected:
        raise AssertionError(f"{name}/{path.name}: bit {bit} changed what was read, and nobody said so")


def _text(value: Any) -> str:
    """All of a value, tensors to the bit."""
    if hasattr(value, "numpy"):
        return f"{value.dtype} {tuple(value.shape)} {value.numpy().tobytes().hex()}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_text(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_text, value)) + "]"
    return repr(value)


def _write_sums(folder: Path) -> None:
    import torch

    from cofitune.importance.partial import save_sums
    from cofitune.importance.sums import Sums

    save_sums(folder / "0-of-1.safetensors", Sums({"a": torch.rand(2, 3).double()}, 10, 4, 2), "mine")


def _read_sums(folder: Path) -> Any:
    from cofitune.importance.partial import load_sums

    sums = load_sums(folder / "0-of-1.safetensors", "mine")
    return sums and [sums.values, sums.tokens, sums.samples, sums.micro_batches]


def _write_answers(folder: Path) -> None:
    from cofitune.evaluation.metrics import METRICS
    from cofitune.evaluation.samples import Sample, TaskResult, save_result

    samples = (Sample(1, "Q?", 1, None, (-1.25, -0.5), 1, 1), Sample(3, "F?", ["ä"], "ä\n", None, None, 0.5))
    save_result(TaskResult("t", "gen_kn", METRICS["acc"], 0.75, 0.25, samples, 1.5), folder / "answers.jsonl")


def _read_answers(folder: Path) -> Any:
    from cofitune.evaluation.samples import load_result

    return load_result(folder / "answers.jsonl")


def _write_trials(folder: Path) -> None:
    from cofitune.model.region import Region
    from cofitune.search.store import open_store
    from cofitune.search.trial import Trial

    folder.mkdir(parents=True)
    store = open_store(folder, {"seed": 1})
    for number in range(3):
        region = Region.span(number, number + 1, ("up_proj",))
        scores: dict[str, Any] = {"speciality": 0.5, "versatility": 0.25, "unified": 0.4}
        store.append(Trial(f"t{number}", region, "done", 1, 7, 100, 2.5, 4, **scores))


def _read_trials(folder: Path) -> Any:
    from cofitune.search.store import read_trials

    return read_trials(folder / "trials.jsonl")


def _write_checkpoint(folder: Path) -> None:
    import torch

    from cofitune.training import state_files as files

    place = folder / "step-000003"
    parts = {kind: torch.rand(3, 4) for kind in ("master", "exp_avg", "exp_avg_sq")}
    places = files.write_whole(place, [("w", parts)])
    files.write_checkpoint(place, places, [{"cpu": torch.get_rng_state()}], CHECKPOINT)


def _write_pieces(folder: Path) -> None:
    import torch

    from cofitune.training import state_files as files

    place = folder / "step-000003"
    pieces: dict[str, Any] = {}
    hashes: dict[str, str] = {}
    for rank in range(2):
        parts = {kind: torch.rand(6) for kind in ("master", "exp_avg", "exp_avg_sq")}
        wrote = files.write_pieces(place, rank, [("w", 6 * rank, parts)])
        pieces.setdefault("w", []).extend(wrote["pieces"]["w"])
        hashes |= wrote["sha256"]
    states = [{"cpu": torch.get_rng_state()}] * 2
    files.write_checkpoint(place, {"pieces": pieces, "sha256": hashes}, states, {**CHECKPOINT, "world_size": 2})


def _read_checkpoint(folder: Path) -> Any:
    from cofitune.files import read_tensors
    from cofitune.training.state_check import newest_whole

    found = newest_whole(folder, lambda _: None)
    if found is None:
        return None
    tensors = {name: read_tensors(found.folder / name, "state") for name in found.sha256}
    return [found.step, found.world_size, found.identity, found.tensors, found.pieces, tensors]


def _write_delta(folder: Path) -> None:
    import torch

    from cofitune.training.delta import write_delta

    write_delta(folder, {"w": torch.rand(3, 4)}, {"base_fingerprint": "f", "base": "b", "steps": 7, "losses": [1.5]})


def _read_delta(folder: Path) -> Any:
    from cofitune.training.delta import read_delta

    delta = read_delta(folder, "f")
    return [delta.tensors, *_known(delta.manifest, ("base", "steps", "losses"))]


def _known(content: dict[str, Any], keys: tuple[str, ...]) -> list[Any]:
    """The entries that somebody reads: a flip in the name of the checksum itself adds one that nobody does."""
    return [content.get(key) for key in keys]


def _write_json(folder: Path) -> None:
    from cofitune.files import write_checked_json

    folder.mkdir(parents=True)
    for name in ("alpha.json", "proxy.json", "scores.json", "tree.json"):
        write_checked_json(folder / name, {"format": 1, "alpha": 0.7, "points": [{"score": 12.5}], "text": "ä"})


def _read_json(folder: Path) -> Any:
    from cofitune.files import read_json

    contents = [read_json(path, "artifact") for path in sorted(folder.iterdir())]
    return [_known(content, ("format", "alpha", "points", "text")) for content in contents]


def _write_importance(folder: Path) -> None:
    import torch

    from cofitune.importance_file import write_importance

    write_importance(folder, {"a": torch.rand(2, 3)}, {"a": torch.rand(2, 3)}, {"base_fingerprint": "f", "samples": 8})


def _read_importance(folder: Path) -> Any:
    from cofitune.files import read_json
    from cofitune.importance_file import read_vectors

    manifest = read_json(folder / "manifest.json", "importance manifest")
    return [read_vectors(folder, manifest), *_known(manifest, ("base_fingerprint", "samples"))]


def _write_batch(folder: Path) -> None:
    import torch

    from cofitune.data.top_k import TopK
    from cofitune.rehearsal.generate import Answer
    from cofitune.rehearsal.partial import AnsweredBatch, Partial

    top_k = TopK(torch.ones(2, 3, dtype=torch.int32), torch.rand(2, 3), torch.rand(2))
    Partial(folder).put("answers", 1, AnsweredBatch((Answer((1, 2), True),), top_k, torch.rand(2)))


def _read_batch(folder: Path) -> Any:
    from cofitune.rehearsal.partial import Partial

    partial = Partial(folder)
    if not partial.has("answers", 1):
        return None
    batch = partial.get("answers", 1)
    return [batch.answers, batch.top_k.indices, batch.top_k.log_probs, batch.top_k.rest, batch.token_log_probs]


def _write_tokens(folder: Path) -> None:
    import pyarrow as pa

    from cofitune.data.encoded import SCHEMA
    from cofitune.data.encoded_cache import ITEMS, write_account
    from cofitune.data.read import ItemCounts

    folder.mkdir(parents=True)
    rows: list[Any] = [[[1, 2]], [[False, True]], [True]]
    columns = [pa.array(column, field.type) for column, field in zip(rows, SCHEMA, strict=True)]
    with (folder / ITEMS).open("wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
    write_account(folder, ItemCounts(read=1, kept=1))


def _read_tokens(folder: Path) -> Any:
    from cofitune.data.encoded_cache import read_entry

    table, account = read_entry(folder)
    return [table.to_pylist(), account]


KINDS = {
    "sums": Kind(_write_sums, _read_sums),
    "answers": Kind(_write_answers, _read_answers),
    "trials": Kind(_write_trials, _read_trials, "trials.jsonl"),
    "checkpoint": Kind(_write_checkpoint, _read_checkpoint),
    "pieces": Kind(_write_pieces, _read_checkpoint),
    "delta": Kind(_write_delta, _read_delta),
    "importance": Kind(_write_importance, _read_importance, "[im]*"),
    "json": Kind(_write_json, _read_json),
    "batch": Kind(_write_batch, _read_batch),
    "tokens": Kind(_write_tokens, _read_tokens),
}
