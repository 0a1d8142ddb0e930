"""Rehearsal on the disk: general prompts, the base's own answers, and how likely the base finds each token of them.

A folder with `items.jsonl` (an item a line), `top_k.safetensors` (a row for each answer token, in the items' order) and
`manifest.json`, written last, which names the base, the tokenizer with its template, and how the answers were made.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cofitune.data.chat import IGNORED, Example, LazyExamples
from cofitune.data.formats import BadItemError
from cofitune.data.read import ItemCounts, bad_item
from cofitune.data.top_k import TopK
from cofitune.errors import ArtifactError
from cofitune.files import read_json, sha256_file, write_checked_json, write_tensors, write_text
from cofitune.model.weight_files import remembered_sha256

FOLDER = "rehearsal"  # below output_dir

FORMAT = 1  # of a rehearsal folder
REMAKE = "remake it with `cofitune rehearse CONFIG --overwrite`"
ITEMS, TOP_K, MANIFEST = "items.jsonl", "top_k.safetensors", "manifest.json"


@dataclass(frozen=True)
class RehearsalItem:
    """One general prompt and the base's answer to it.

    Attributes:
        messages: the prompt, as turns of role and content; the last one is the user's.
        answer: the answer's text, without special tokens.
        prompt_ids: the prompt's tokens in the template, up to where the answer begins.
        answer_ids: the answer's tokens as the base wrote them; the last one ends the turn where `ended`.
        ended: whether the base ended the answer by itself.
        held_out: never trained on: drift is measured on it.
        where: the prompt's place, `file:line`; or `written by the model`.
    """

    messages: tuple[dict[str, str], ...]
    answer: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    ended: bool
    held_out: bool
    where: str

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(vars(self), ensure_ascii=False)


@dataclass(frozen=True)
class Rehearsal:
    """A rehearsal folder, read.

    Attributes:
        items: all of them, held-out ones too.
        starts: row of each item's first answer token in the stored probabilities, and at the end their number.
        token_log_probs: float32, the base's log-probability of each answer token, in nats.
    """

    folder: Path
    manifest: dict[str, Any]
    items: tuple[RehearsalItem, ...]
    starts: tuple[int, ...]
    token_log_probs: Tensor = field(repr=False)

    @property
    def sha256(self) -> str:
        """Names the contents: items and probabilities."""
        return str(self.manifest["items_sha256"])[:32] + str(self.manifest["top_k_sha256"])[:32]

    @property
    def top_k(self) -> int:
        """Probabilities stored for each answer token; 0: none."""
        return int(self.manifest["top_k"])

    def of(self, held_out: bool) -> list[int]:
        """Places of the items that are held out, or of those that are not."""
        return [index for index, item in enumerate(self.items) if item.held_out == held_out]

    def log_probs_of(self, index: int) -> Tensor:
        """The base's log-probability of each answer token of one item, float32 [its answer's tokens]."""
        return self.token_log_probs[self.starts[index] : self.starts[index + 1]]

    def probabilities_of(self, index: int) -> TopK:
        """The stored probabilities at each answer token of one item; read from the disk."""
        rows = slice(self.starts[index], self.starts[index + 1])
        with safe_open(self.folder / TOP_K, framework="pt") as file:
            return TopK(*(file.get_slice(name)[rows] for name in ("indices", "log_probs", "rest")))


class RehearsalExamples(LazyExamples):
    """Some items of a rehearsal as a training reads them.

    Attributes:
        lengths: tokens of each, int32.
        account: what became of them under `max_length`.
    """

    def __init__(
        self, rehearsal: Rehearsal, held_out: bool, max_length: int, *, with_top_k: bool, on_bad_item: str = "error"
    ) -> None:
        """Take the items that are held out, or all others.

        Args:
            max_length: tokens that an item may have; a longer answer is cut, and counted.
            with_top_k: whether each example carries its stored probabilities.

        Raises:
            DataError: a prompt alone exceeds `max_length`, under `on_bad_item: error`.
        """
        self._rehearsal, self._max_length, self._with_top_k = rehearsal, max_length, with_top_k
        self.account = ItemCounts()
        self._chosen: list[int] = []
        for index in rehearsal.of(held_out):
            self._count(index, on_bad_item)
        self.lengths = np.array([len(self._ids(index)) for index in self._chosen], dtype=np.int32)

    def __len__(self) -> int:
        return len(self._chosen)

    def example(self, index: int) -> Example:
        """One of them."""
        place = self._chosen[index]
        ids, prompt = self._ids(place), len(self._rehearsal.items[place].prompt_ids)
        top_k = self._rehearsal.probabilities_of(place).first(len(ids) - prompt) if self._with_top_k else None
        return Example(ids, [IGNORED] * prompt + ids[prompt:], top_k=top_k)

    def base_log_probs(self) -> list[Tensor]:
        """The base's log-probabilities of each example's answer tokens, as they are cut."""
        return [
            self._rehearsal.log_probs_of(place)[: int(length) - len(self._rehearsal.items[place].prompt_ids)]
            for place, length in zip(self._chosen, self.lengths, strict=True)
        ]

    def _ids(self, place: int) -> list[int]:
        item = self._rehearsal.items[place]
        return [*item.prompt_ids, *item.answer_ids][: self._max_length]

    def _count(self, place: int, on_bad_item: str) -> None:
        item, account = self._rehearsal.items[place], self.account
        account.read += 1
        prompt, whole = len(item.prompt_ids), len(item.prompt_ids) + len(item.answer_ids)
        if prompt >= self._max_length:
            where = f"{self._rehearsal.folder / ITEMS}: item {place + 1}"
            message = f"{where}: the prompt alone has {prompt} tokens, and data.max_length is {self._max_length}"
            bad_item(BadItemError("prompt too long", message), on_bad_item, account)
            return
        self._chosen.append(place)
        account.kept += 1
        account.truncated += whole > self._max_length
        account.tokens += min(whole, self._max_length)
        account.supervised += min(whole, self._max_length) - prompt


def write_rehearsal(
    folder: Path,
    items: Sequence[RehearsalItem],
    top_k: TopK,
    token_log_probs: Tensor,
    manifest: dict[str, object],
) -> None:
    """Write a rehearsal folder; its manifest comes last and marks it as whole.

    Args:
        top_k, token_log_probs: a row for each answer token, in the items' order.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    write_text(folder / ITEMS, "".join(item.to_json() + "\n" for item in items))
    tensors = {"indices": top_k.indices, "log_probs": top_k.log_probs, "rest": top_k.rest}
    write_tensors(folder / TOP_K, {**tensors, "token_log_probs": token_log_probs})
    hashes = {"items_sha256": sha256_file(folder / ITEMS), "top_k_sha256": sha256_file(folder / TOP_K)}
    write_checked_json(folder / MANIFEST, {"format": FORMAT, **manifest, **hashes})


def read_rehearsal(folder: Path) -> Rehearsal:
    """Read a rehearsal folder and check its bytes.

    Raises:
        ArtifactError: it is missing, damaged, or of another format.
    """
    manifest = read_json(folder / MANIFEST, "rehearsal (its manifest)")
    if manifest.get("format") != FORMAT:
        raise ArtifactError(f"{folder}: this rehearsal is not of format {FORMAT}, which we read; {REMAKE}")
    for name, key in ((ITEMS, "items_sha256"), (TOP_K, "top_k_sha256")):
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder / name}: is missing; {REMAKE}")
        if remembered_sha256(folder / name) != manifest.get(key):
            raise ArtifactError(f"{folder / name}: its bytes are not those that were written; {REMAKE}")
    try:
        lines = (folder / ITEMS).read_text(encoding="utf-8").split("\n")  # not splitlines: a text may hold U+2028
        items = tuple(_item(json.loads(line)) for line in lines if line)
        with safe_open(folder / TOP_K, framework="pt") as file:
            token_log_probs = file.get_tensor("token_log_probs")
    except (ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
        raise ArtifactError(f"{folder}: this rehearsal is damaged ({error}); {REMAKE}") from None
    starts = (0, *accumulate(len(item.answer_ids) for item in items))
    if starts[-1] != len(token_log_probs):
        raise ArtifactError(f"{folder}: {ITEMS} and {TOP_K} are of different rehearsals; {REMAKE}")
    return Rehearsal(folder, manifest, items, starts, token_log_probs)


def check_base(
    rehearsal: Rehearsal, base: str, base_fingerprint: str, tokenizer_sha256: str, day: str | None = None
) -> None:
    """Refuse the answers of another base, or to prompts in another template.

    Args:
        base: the base's name, for the message.
        tokenizer_sha256: of the tokenizer with its template set.
        day: what its template writes as the date; None where it writes none.

    Raises:
        ArtifactError: it names what differs.
    """
    made = rehearsal.manifest
    if made["base_fingerprint"] != base_fingerprint:
        raise ArtifactError(
            f"{rehearsal.folder}: these are the answers of another base ({made['base']}, fingerprint "
            f"{made['base_fingerprint'][:12]}; {base} has {base_fingerprint[:12]}): rehearsal takes the base's own; "
            "run `cofitune rehearse` with this config"
        )
    if made["tokenizer_sha256"] != tokenizer_sha256:
        if day and made.get("day", day) != day:
            raise ArtifactError(
                f"{rehearsal.folder}: was made under the date {made['day']}, which the chat template writes, and here "
                f"it is {day}; set data.date: {made['day']} (or run `cofitune rehearse` with this config)"
            )
        raise ArtifactError(
            f"{rehearsal.folder}: was made under another chat template or tokenizer (template: {made['template']}, "
            f"hash {made['tokenizer_sha256'][:12]}; here {tokenizer_sha256[:12]}); run `cofitune rehearse` with this "
            "config"
        )


def _item(value: dict[str, Any]) -> RehearsalItem:
    lists = {name: tuple(value[name]) for name in ("messages", "prompt_ids", "answer_ids")}
    return RehearsalItem(**{**value, **lists})


def check_opening(rehearsal: Rehearsal, opening: str, thinks: bool) -> None:
    """Refuse answers that were made at once where models are asked to think first, and the other way round.

    Args:
        opening: what the template opens every response with.
        thinks: whether models are left to think, without it.

    Raises:
        ArtifactError: the answers are of the other mode.
    """
    made = rehearsal.manifest.get("opening", opening)  # older ones were all made behind it
    if made == ("" if thinks else opening):
        return
    what = (
        f"answers behind {made!r}, without thinking, and eval.think_end_token lets models think"
        if thinks
        else f"answers with thinking, and without eval.think_end_token models answer at once, behind {opening!r}"
    )
    raise ArtifactError(
        f"{rehearsal.folder}: holds {what}; run `cofitune rehearse CONFIG --overwrite` with this config, so that what "
        "is rehearsed is what is asked"
    )


def no_tokens(top_k: int) -> TopK:
    """Stored probabilities of no token."""
    return TopK(torch.empty(0, top_k, dtype=torch.int32), torch.empty(0, top_k), torch.empty(0))
