"""A rehearsal on the disk: read back as it was written, and refused where it is damaged or another base's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cofitune.data.chat import IGNORED
from cofitune.data.top_k import TopK
from cofitune.errors import ArtifactError, DataError
from cofitune.files import read_json
from cofitune.rehearsal.generate import Answer
from cofitune.rehearsal.items import (
    ITEMS,
    MANIFEST,
    TOP_K,
    Rehearsal,
    RehearsalExamples,
    RehearsalItem,
    check_base,
    no_tokens,
    read_rehearsal,
    write_rehearsal,
)
from cofitune.rehearsal.partial import AnsweredBatch, Partial

MADE = {"base": "org/base", "base_fingerprint": "f" * 64, "tokenizer_sha256": "t" * 64, "template": "chat", "top_k": 2}


def item(text: str, prompt: int, answer: int, held_out: bool = False) -> RehearsalItem:
    asked = ({"role": "user", "content": f"Say {text}"},)
    return RehearsalItem(
        asked, text, tuple(range(prompt)), tuple(range(50, 50 + answer)), not held_out, held_out, "p.jsonl:1"
    )


WRITTEN = [item("a", 3, 4), item("one\u2028line\u0085é\n", 2, 1, held_out=True), item("c", 5, 3)]


def probabilities(count: int) -> tuple[TopK, torch.Tensor]:
    """Of each token other values, so that a row out of place shows."""
    rows = torch.arange(count, dtype=torch.float32)
    indices = torch.stack([rows, rows + 100], 1).to(torch.int32)
    return TopK(indices, -torch.stack([rows, rows + 1], 1), -rows / 2), -rows / 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rehearsal(tmp_path, WRITTEN, *probabilities(8), MADE)
    return tmp_path


def test_what_was_written_is_read_back_with_each_items_probabilities(folder: Path) -> None:
    result = read_rehearsal(folder)
    assert list(result.items) == WRITTEN
    assert result.starts == (0, 4, 5, 8) and result.top_k == 2
    assert (result.of(held_out=True), result.of(held_out=False)) == ([1], [0, 2])
    top_k, own = probabilities(8)
    for index, rows in enumerate((slice(0, 4), slice(4, 5), slice(5, 8))):
        assert torch.equal(result.log_probs_of(index), own[rows])
        stored = result.probabilities_of(index)
        assert torch.equal(stored.indices, top_k.indices[rows])
        assert torch.equal(stored.log_probs, top_k.log_probs[rows])
        assert torch.equal(stored.rest, top_k.rest[rows])


def test_an_answer_with_other_kinds_of_line_ends_stays_one_item(folder: Path) -> None:
    assert read_rehearsal(folder).items[1].answer == "one\u2028line\u0085é\n"
    assert (folder / ITEMS).read_text(encoding="utf-8").count("\n") == 3


def test_the_contents_have_a_name_that_their_place_does_not_change(folder: Path, tmp_path: Path) -> None:
    first = read_rehearsal(folder).sha256
    write_rehearsal(_made(tmp_path / "same"), WRITTEN, *probabilities(8), MADE)
    write_rehearsal(_made(tmp_path / "other"), [item("b", 3, 4), *WRITTEN[1:]], *probabilities(8), MADE)
    assert read_rehearsal(tmp_path / "same").sha256 == first
    assert read_rehearsal(tmp_path / "other").sha256 != first


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("name", [ITEMS, TOP_K])
def test_changed_and_missing_files_are_refused_by_name(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(ArtifactError, match=rf"{name}: its bytes are not those that were written"):
        read_rehearsal(folder)
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=rf"{name}: is missing; .*cofitune rehearse CONFIG --overwrite"):
        read_rehearsal(folder)


def test_without_its_manifest_or_of_another_format_a_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    manifest = read_json(folder / MANIFEST, "manifest")
    (folder / MANIFEST).write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(ArtifactError, match="not of format 1"):
        read_rehearsal(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        read_rehearsal(folder)


def test_files_of_two_rehearsals_are_not_read_as_one(tmp_path: Path) -> None:
    write_rehearsal(tmp_path, WRITTEN, *probabilities(9), MADE)
    with pytest.raises(ArtifactError, match="of different rehearsals"):
        read_rehearsal(tmp_path)


def test_another_base_and_another_template_are_refused_by_name(folder: Path) -> None:
    result = read_rehearsal(folder)
    check_base(result, "org/base", "f" * 64, "t" * 64)
    with pytest.raises(ArtifactError, match=r"answers of another base \(org/base, fingerprint f{12}; mine has e{12}\)"):
        check_base(result, "mine", "e" * 64, "t" * 64)
    with pytest.raises(ArtifactError, match="another chat template or tokenizer"):
        check_base(result, "org/base", "f" * 64, "u" * 64)


def test_training_reads_the_answers_and_cuts_and_counts_long_ones(folder: Path) -> None:
    result = read_rehearsal(folder)
    rows = RehearsalExamples(result, False, 6, with_top_k=True)
    assert len(rows) == 2 and rows.lengths.tolist() == [6, 6]
    first, last = rows[0], rows[1]
    assert first.input_ids == [0, 1, 2, 50, 51, 52] and first.labels == [IGNORED] * 3 + [50, 51, 52]
    assert last.labels == [IGNORED] * 5 + [50]
    assert first.top_k is not None and len(first.top_k) == 3
    assert last.top_k is not None and torch.equal(last.top_k.rest, probabilities(8)[0].rest[5:6])
    assert [len(part) for part in rows.base_log_probs()] == [3, 1]
    account = rows.account
    assert (account.read, account.kept, account.truncated, account.supervised) == (2, 2, 2, 4)


def test_a_prompt_that_fills_the_length_is_an_error_or_dropped_and_counted(folder: Path) -> None:
    result = read_rehearsal(folder)
    with pytest.raises(DataError, match=r"items\.jsonl: item 3: the prompt alone has 5 tokens.*max_length is 5"):
        RehearsalExamples(result, False, 5, with_top_k=False)
    rows = RehearsalExamples(result, False, 5, with_top_k=False, on_bad_item="drop")
    assert len(rows) == 1 and rows.account.reasons == {"prompt too long": 1} and rows[0].top_k is None


def test_an_answered_batch_is_kept_for_its_own_identity_alone(tmp_path: Path) -> None:
    top_k, own = probabilities(5)
    batch = AnsweredBatch((Answer((7, 8, 9), True), Answer((), False), Answer((1, 2), False)), top_k, own)
    partial = Partial(tmp_path / "partial")
    partial.start({"seed": 1})
    partial.put("answers", 3, batch)
    partial.start({"seed": 1})
    assert [partial.has("answers", n) for n in (2, 3)] == [False, True] and not partial.has("written", 3)
    result = partial.get("answers", 3)
    assert result.answers == batch.answers and torch.equal(result.token_log_probs, own)
    assert torch.equal(result.top_k.indices, top_k.indices) and partial.done("answers", range(5)) == 1
    partial.start({"seed": 2})
    assert not partial.has("answers", 3) and partial.is_of({"seed": 2})


def test_a_damaged_batch_is_named(tmp_path: Path) -> None:
    partial = Partial(tmp_path)
    partial.put("answers", 0, AnsweredBatch((), no_tokens(2), torch.empty(0)))
    assert partial.get("answers", 0).answers == ()
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ArtifactError, match="answers-000000"):
        partial.get("answers", 0)


def test_without_stored_probabilities_an_item_has_rows_of_none(tmp_path: Path) -> None:
    none = replace(probabilities(8)[0], indices=torch.empty(8, 0, dtype=torch.int32), log_probs=torch.empty(8, 0))
    write_rehearsal(tmp_path, WRITTEN, none, probabilities(8)[1], MADE | {"top_k": 0})
    result: Rehearsal = read_rehearsal(tmp_path)
    assert result.top_k == 0 and result.probabilities_of(0).indices.shape == (4, 0)
