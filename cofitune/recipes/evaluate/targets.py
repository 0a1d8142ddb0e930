"""One model of an evaluation, and whether several can stand side by side in one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from cofitune.errors import UserError
from cofitune.evaluation.tasks import is_title
from cofitune.model.load import coarser, dtype_name

WHY = {
    "template": "data.template: plain asks all alike",
    "template_sha256": "the chat template's text is another one; data.template: plain asks all alike",
    "tokenizer_sha256": "the tokenizer is another one",
    "end_tokens": "other tokens end its answers (generation_config.json)",
}


@dataclass(frozen=True)
class Source:
    """Whole weights: a folder or a hub name, and what is asked of them.

    Attributes:
        asked: what the prompts and the ends of answers depend on.
        dtype: what its weights are stored in; None where they are no floating-point numbers.
        positions: tokens that the model can attend to.
        model_type: as transformers calls it.
    """

    name: str
    revision: str | None
    fingerprint: str
    tokenizer: PreTrainedTokenizerBase
    asked: dict[str, object]
    dtype: torch.dtype | None
    positions: int | None
    model_type: str

    @property
    def place(self) -> tuple[str, str | None]:
        """Where it is loaded from."""
        return self.name, self.revision


@dataclass(frozen=True)
class EvalTarget:
    """One model of the table.

    Attributes:
        path: as the config names it.
        source: the whole weights that it stands on.
        train: a run's `train` folder, with the delta; None for whole weights.
        delta_sha256: of the delta; None for whole weights.
        dtype: what its weights, or its delta's, are stored in.
        seed: a run's training seed.
        training: what a run's training stood on, the seed left out: runs that share it differ by their seeds only.
        alpha: how much of a run's training stays; 0 is its base.
        keep: the share of the run's gain that its alpha was chosen to keep; None: the alpha was named.
        day: what a run's template wrote as the date when it was trained; None where it writes none.
    """

    name: str
    role: str | None
    path: str
    source: Source
    train: Path | None = None
    delta_sha256: str | None = None
    dtype: torch.dtype | None = None
    seed: int | None = None
    training: str | None = None
    alpha: float = 1.0
    keep: float | None = None
    day: str | None = None

    @property
    def weights(self) -> dict[str, object]:
        """What names the weights, by content."""
        delta = self.delta_sha256 if self.alpha else None
        results: dict[str, object] = {"fingerprint": self.source.fingerprint, "delta_sha256": delta}
        return results if self.alpha in (0, 1) else {**results, "alpha": self.alpha}


def check_names(models: Sequence[EvalTarget]) -> None:
    """Raise a UserError where a name cannot name a file, or two models share one."""
    seen: dict[str, EvalTarget] = {}
    for model in models:
        if not is_title(model.name):
            raise UserError(
                f"eval.models: '{model.name}' cannot be a name (letters, digits, spaces and . _ + -: it also names a "
                "file); give one: name: …, or --model NAME=PATH"
            )
        other = seen.setdefault(model.name.lower(), model)
        if other is not model:
            raise UserError(
                f"eval.models: two models are called '{model.name}' ({other.path} and {model.path}); give each a name: "
                "of its own, or --model NAME=PATH"
            )


def check_side_by_side(models: Sequence[EvalTarget]) -> None:
    """Raise a UserError where the models would not be asked the same prompts, tokens and ends."""
    base, *others = models
    problems = [
        f"'{model.name}' ({model.path}): {key} is {_short(value)} and {_short(base.source.asked[key])} for "
        f"'{base.name}': {WHY[key]}"
        for model in others
        for key, value in model.source.asked.items()
        if value != base.source.asked[key]
    ]
    if problems:
        raise UserError("these models cannot be put side by side: " + "; ".join(problems))


def check_dtypes(models: Sequence[EvalTarget], dtype: torch.dtype) -> None:
    """Raise a UserError where a model's weights were rounded more than the base's are when they are scored in `dtype`.

    What rounding alone changes would stand in the table as learnt or forgotten.
    """

    def scored(model: EvalTarget) -> torch.dtype:
        return coarser((model.dtype or dtype, dtype))

    base, *others = models
    for model in others:
        if coarser((scored(base), scored(model))) != scored(base):
            own, theirs = (dtype_name(scored(m)) for m in (model, base))
            raise UserError(
                f"these models cannot be put side by side: the weights of '{model.name}' ({model.path}) are in {own}, "
                f"those of '{base.name}' would be scored in {theirs}; model.dtype=bfloat16 rounds all alike"
            )


def _short(value: object) -> str:
    return str(value)[:12] if isinstance(value, str) else str(value)
