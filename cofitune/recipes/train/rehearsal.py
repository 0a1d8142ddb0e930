"""What a training takes from a rehearsal: the base's answers to train on, and those to measure drift on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cofitune.config import schema
from cofitune.config.train import TrainRehearsal
from cofitune.data.asking import fixed_opening
from cofitune.data.batches import RehearsalMix
from cofitune.data.chat import Example, LazyExamples
from cofitune.data.encoded import tokenizer_sha256
from cofitune.data.packing import Packs, pack_lengths
from cofitune.data.read import ItemCounts
from cofitune.errors import ArtifactError, UserError
from cofitune.recipes.from_config import written_day
from cofitune.recipes.prerequisites import Prerequisites
from cofitune.recipes.train.data import TrainData
from cofitune.rehearsal.items import FOLDER, Rehearsal, RehearsalExamples, check_base, check_opening, read_rehearsal
from cofitune.training.drift import HeldOut
from cofitune.training.loop import RehearsalLoss


@dataclass(frozen=True)
class Rehearsed:
    """The rehearsal of a training.

    Attributes:
        folder: where it lies.
        sha256: names its contents.
        examples: what is trained on, packed where the training's items are; empty where drift alone is measured.
        lengths: tokens of each example.
        items: how many items they are.
        account: what became of these under data.max_length.
        share: which part of a step's examples they are.
        loss: how they enter the loss; None where drift alone is measured.
        held_out: what drift is measured on; None where nothing was held out.
    """

    folder: Path
    sha256: str
    examples: Sequence[Example]
    lengths: np.ndarray
    items: int
    account: ItemCounts
    share: float
    loss: RehearsalLoss | None
    held_out: HeldOut | None

    @property
    def manifest(self) -> Path:
        """The file that names its contents."""
        return self.folder / "manifest.json"

    def mix(self, first: int) -> RehearsalMix | None:
        """Its part in the steps, where its examples begin at index `first`; None where it has none."""
        return RehearsalMix(first, len(self.examples), self.share) if self.loss else None

    def trained_on(self) -> dict[str, object]:
        """What a training must not change on its way; where drift is measured trains nothing."""
        trained = self.loss and {"share": self.share, "loss": self.loss.kind, "weight": self.loss.weight}
        return {"sha256": self.sha256, "items": self.items, **(trained or {})}

    def as_dict(self) -> dict[str, object]:
        """What a manifest keeps of it."""
        held_out = (
            {"held_out": len(self.held_out.examples), "held_out_tokens": self.held_out.tokens} if self.held_out else {}
        )
        return {**self.trained_on(), **held_out}


class Joined(LazyExamples):
    """Two sequences of examples as one; nothing is copied."""

    def __init__(self, first: Sequence[Example], second: Sequence[Example]) -> None:
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def example(self, index: int) -> Example:
        """One of them."""
        return self._first[index] if index < len(self._first) else self._second[index - len(self._first)]


@dataclass(frozen=True)
class BaseIdentity:
    """The base that a rehearsal must be of, and how it must have been asked.

    Attributes:
        fingerprint: None where a dry run has no weights.
        thinks: whether an evaluation lets it think before it answers (`eval.think_end_token`).
    """

    name: str
    fingerprint: str | None
    thinks: bool = False


def rehearsal_folder(train: schema.Train, run: Path) -> Path:
    """Where the training's rehearsal lies; `run`: the config's own folder, which it is in by default."""
    named = train.rehearsal.path if train.rehearsal else train.drift_data
    return Path(named) if named else run / FOLDER


def read_rehearsed(
    train: schema.Train, settings: schema.Data, data: TrainData, base: BaseIdentity, run: Path, needs: Prerequisites
) -> Rehearsed | None:
    """Read what a training rehearses, or measures drift on; None where it does neither.

    A dry run without it tells `needs` what it lacked.

    Args:
        settings: the section `data`.
        data: the training's items, which its tokenizer and packs are as.

    Raises:
        UserError: it is not there, damaged, of another base or template, or has not what the loss needs.
    """
    requested = train.rehearsal
    if requested is None and train.drift_data is None:
        return None
    folder = rehearsal_folder(train, run)
    if not (folder / "manifest.json").is_file():
        message = (
            f"train.rehearsal: no rehearsal in {folder}; run `cofitune rehearse` with this config first, name its "
            "folder in train.rehearsal.path, or set train.rehearsal: null"
            if requested
            else f"train.drift_data: no rehearsal in {folder}; `cofitune rehearse` writes one"
        )
        needs.lack(ArtifactError(message))
        return None
    rehearsal = read_rehearsal(folder)
    if base.fingerprint is None or data.tokenizer is None:  # a dry run without weights has nothing to compare it with
        return None
    day = written_day(data.tokenizer, settings)
    made_by = base.name, base.fingerprint, tokenizer_sha256(data.tokenizer), day
    check_base(rehearsal, *made_by)
    if requested is not None:
        check_opening(rehearsal, fixed_opening(data.tokenizer), base.thinks)
    measured = rehearsal
    if requested is not None and train.drift_data is not None:
        measured = read_rehearsal(Path(train.drift_data))
        check_base(measured, *made_by)
    held_out = _held_out(measured, settings.max_length)
    if train.max_drift is not None and held_out is None:
        raise UserError(
            f"train.max_drift: {measured.folder} holds out no item to measure drift on; make it with "
            "rehearsal.held_out above 0"
        )
    needs.use("rehearsal", folder / "manifest.json")
    if requested is None:
        return Rehearsed(folder, rehearsal.sha256, [], np.empty(0, np.int32), 0, ItemCounts(), 0.0, None, held_out)
    return replace(_trained(requested, rehearsal, settings, data.packed_into), held_out=held_out)


def _trained(
    requested: TrainRehearsal, rehearsal: Rehearsal, settings: schema.Data, packed_into: int | None
) -> Rehearsed:
    """The items to train on, in packs where the training's own are."""
    folder, with_top_k = rehearsal.folder, requested.loss == "kl"
    if with_top_k and rehearsal.top_k == 0:
        raise UserError(
            f"train.rehearsal.loss: kl needs the base's probabilities, and {folder} was made with rehearsal.top_k: 0; "
            "make it with 32, or use loss: nll"
        )
    examples = RehearsalExamples(
        rehearsal, False, settings.max_length, with_top_k=with_top_k, on_bad_item=settings.on_bad_item
    )
    if not len(examples):
        raise UserError(f"train.rehearsal: {folder} holds not one item to train on")
    packs = Packs(examples, pack_lengths(examples.lengths, packed_into)) if packed_into else None
    return Rehearsed(
        folder=folder,
        sha256=rehearsal.sha256,
        examples=examples if packs is None else packs,
        lengths=examples.lengths if packs is None else packs.lengths,
        items=len(examples),
        account=examples.account,
        share=requested.share,
        loss=RehearsalLoss(requested.loss, requested.weight),
        held_out=None,
    )


def _held_out(rehearsal: Rehearsal, max_length: int) -> HeldOut | None:
    """The held-out items that fit, with the stored probabilities where there are some; never packed."""
    examples = RehearsalExamples(rehearsal, True, max_length, with_top_k=rehearsal.top_k > 0, on_bad_item="drop")
    if not len(examples):
        return None
    own = examples.base_log_probs()
    tokens = sum(map(len, own))
    return HeldOut(examples, float(sum(part.double().sum() for part in own)) / tokens, tokens)
