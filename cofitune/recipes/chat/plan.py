"""With whom one chats: a model, or a run's base and the run itself on the same weights, asked as training asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from cofitune.config.day import today
from cofitune.data.chat import end_ids, set_template
from cofitune.data.template import ChatTemplate
from cofitune.errors import UserError
from cofitune.evaluation.lengths import max_positions
from cofitune.model.anatomy import read_model_config
from cofitune.model.folder import read_generation_config
from cofitune.model.load import DTYPES, choose_dtype, load_tokenizer
from cofitune.model.other_folders import is_missing_folder
from cofitune.model.weight_files import fingerprint
from cofitune.recipes.alpha.recipe import choose_alpha
from cofitune.recipes.folders import Place, check_trusted, find_base, train_folder
from cofitune.training.delta import Delta, read_delta, read_manifest

Only = Literal["base", "run"]


@dataclass(frozen=True)
class Speaker:
    """One voice of the chat; `alpha`: how much of the run's training it has, 0 for the base or a whole model."""

    name: str
    alpha: float = 0.0


@dataclass(frozen=True)
class ChatPlan:
    """A chat, resolved: all that is known before weights load.

    Attributes:
        place: name and revision of the weights that all speakers stand on.
        tokenizer: speaks the template of the training, with its settings and its day.
        ends: the tokens that end an answer.
        positions: tokens that the model can attend to; None: unlimited.
        opened: whether an answer begins with what the template opens every response with.
        delta: the run's; None where only whole weights speak.
    """

    place: Place
    dtype: torch.dtype
    trust_remote_code: bool
    tokenizer: PreTrainedTokenizerBase
    ends: tuple[int, ...]
    positions: int | None
    opened: bool
    delta: Delta | None
    speakers: tuple[Speaker, ...]


def plan_chat(
    model: str,
    *,
    base: str | None = None,
    alpha: float | Literal["auto"] = 1.0,
    only: Only | None = None,
    trust_remote_code: bool = False,
    console: Console,
) -> ChatPlan:
    """Find out what `model` is and who speaks.

    Args:
        model: a run's output_dir, a model folder (an exported one, for example), or a hub name.
        base: where the run's base is now, if it has moved.
        alpha: how much of the training the run's voice has; auto: as `choose_alpha` finds it, measuring if need be.
        only: one voice alone.

    Raises:
        UserError: there is no such model, or an option asks for a run where there is none.
    """
    train = train_folder(model)
    if train is None:
        asked = {"--base": base, "--alpha": alpha != 1 or None, f"--{only}-only": only}
        if wrong := next((name for name, value in asked.items() if value is not None), None):
            raise UserError(
                f"{wrong}: needs a run whose training has finished (train/manifest.json), and {model} is none; seen "
                f"from {Path.cwd()}"
            )
        return _plan_whole(model, trust_remote_code)
    manifest = read_manifest(train)
    check_trusted(manifest, trust_remote_code)
    place = find_base(manifest, (base, None) if base else None)
    tokenizer = load_tokenizer(place[0], place[1], trust_remote_code)
    set_template(tokenizer, ChatTemplate.from_manifest(manifest))
    if only == "base":
        alpha = 0.0
    elif alpha == "auto":
        alpha = choose_alpha(train.parent, base=place, trust_remote_code=trust_remote_code, console=console)
    elif not 0 <= alpha <= 1:
        raise UserError(f"--alpha {alpha:g}: from 0, the base, to 1, the run; or auto")
    return _plan(
        place,
        tokenizer,
        dtype=DTYPES[manifest["dtype"]],
        trust_remote_code=trust_remote_code,
        opened=not _reasons(manifest),
        delta=None if only == "base" else read_delta(train, fingerprint(*place)),
        speakers=_speakers(alpha, only),
    )


def run_at(alpha: float) -> Speaker:
    """The run's voice with a part of its training."""
    return Speaker("run" if alpha == 1 else f"run at {alpha:g}", alpha)


def _speakers(alpha: float, only: Only | None) -> tuple[Speaker, ...]:
    voices = {"base": Speaker("base"), "run": run_at(alpha)}
    return (voices[only],) if only else tuple(voices.values())


def _plan_whole(model: str, trust_remote_code: bool) -> ChatPlan:
    path = Path(model)
    if is_missing_folder(model) or (path.is_dir() and not (path / "config.json").is_file()):
        raise UserError(
            f"{model} is neither a run whose training has finished (train/manifest.json) nor a model folder "
            f"(config.json); seen from {Path.cwd()}"
        )
    try:
        tokenizer = load_tokenizer(model, None, trust_remote_code)
    except UserError as error:
        if path.is_dir():
            raise
        raise UserError(
            f"{model} is no run and no folder here (seen from {Path.cwd()}); as a hub's name: {error}"
        ) from error
    # one that has a template speaks it as it is: an exported folder's holds the settings of its training
    if not isinstance(tokenizer.chat_template, str) or not tokenizer.chat_template:
        set_template(tokenizer, ChatTemplate(day=today()))
    return _plan(
        (model, None),
        tokenizer,
        dtype=choose_dtype("auto"),
        trust_remote_code=trust_remote_code,
        opened=True,
        delta=None,
        speakers=(Speaker(path.resolve().name if path.is_dir() else model),),
    )


def _plan(
    place: Place,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool,
    opened: bool,
    delta: Delta | None,
    speakers: tuple[Speaker, ...],
) -> ChatPlan:
    config = read_model_config(*place, trust_remote_code)
    ends = end_ids(tokenizer, read_generation_config(*place, config))
    return ChatPlan(
        place=place,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        tokenizer=tokenizer,
        ends=tuple(sorted(ends)),
        positions=max_positions(config),
        opened=opened,
        delta=delta,
        speakers=speakers,
    )


def _reasons(manifest: Mapping[str, Any]) -> bool:
    """Whether a run has mostly learned to think before it answers: then nothing is written in its thought's place."""
    kept, reasoning = (sum(counts.get(n, 0) for counts in manifest.get("items", ())) for n in ("kept", "reasoning"))
    return bool(2 * reasoning > kept)
