"""`cofitune chat`: the base and the run answer the same person, so that one feels what was learnt and what was lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Literal

from rich.console import Console
from transformers import PreTrainedModel

from cofitune.data.asking import make_prompt_tokens
from cofitune.distributed import device
from cofitune.errors import UserError
from cofitune.model.load import load_model
from cofitune.recipes.chat.plan import ChatPlan, Only, Speaker, plan_chat, run_at
from cofitune.rehearsal.generate import Sampling, TransformersGenerator
from cofitune.reports.chat import Screen, open_screen
from cofitune.reports.console import say, show_status
from cofitune.training.delta import delta_applied

HELP = "/new begins a new conversation, /quit ends"
HELP_RUN = "/new begins a new conversation, /alpha 0.5 sets how much of its training the run has, /quit ends"
Turns = list[dict[str, str]]


@dataclass(frozen=True)
class Exchange:
    """One prompt and what each speaker answered, by the speakers' names."""

    prompt: str
    answers: dict[str, str]


@dataclass(frozen=True)
class ChatOptions:
    """How answers are drawn; `temperature` 0 is greedy decoding; `system` opens every conversation."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 1234
    system: str | None = None


def chat(
    model: str,
    prompts: Sequence[str] = (),
    *,
    base: str | None = None,
    alpha: float | Literal["auto"] = 1.0,
    only: Only | None = None,
    options: ChatOptions | None = None,
    trust_remote_code: bool = False,
    console: Console | None = None,
    ask: Callable[[], str] | None = None,
) -> list[Exchange]:
    """Answer prompts, or talk: with a whole model, or with a run and its base in turn.

    The base's weights are in memory once. The run's tensors take their places for its answers and are taken off again.

    Args:
        model: a run's output_dir, a model folder, or a hub name.
        prompts: a conversation each; none: a person is asked, turn by turn.
        base, alpha, only: as `plan_chat`.
        console: where to show the answers while they are written; default: the terminal.
        ask: gives a person's next turn, and raises EOFError at the end; default: a prompt on the console.

    Raises:
        UserError: as `plan_chat`; or a prompt cannot be asked.
    """
    console = console or Console()
    options = options or ChatOptions()
    plan = plan_chat(model, base=base, alpha=alpha, only=only, trust_remote_code=trust_remote_code, console=console)
    if options.max_new_tokens < 1 or options.temperature < 0:
        raise UserError("--max-new-tokens: at least 1; --temperature: 0, which is greedy, or above")
    conversations = [_Conversation(plan, options, text) for text in prompts]  # refused before weights load
    with show_status(console, f"loading {plan.place[0]}"):
        weights = load_model(plan.place[0], plan.dtype, "auto", plan.place[1], trust_remote_code).to(device()).eval()
    screen = open_screen(console, [speaker.name for speaker in plan.speakers])
    if prompts:
        return [one.answer(text, weights, screen) for one, text in zip(conversations, prompts, strict=True)]
    say(console, HELP_RUN if plan.delta else HELP, style="dim")
    return list(_talk(plan, options, weights, console, ask or (lambda: console.input("\nyou> ", markup=False))))


def _talk(
    plan: ChatPlan, options: ChatOptions, weights: PreTrainedModel, console: Console, ask: Callable[[], str]
) -> Iterator[Exchange]:
    """Turn by turn until the person ends it; Ctrl-C ends an answer, and at the prompt the chat."""
    with suppress(ImportError):  # lines may be edited then
        import readline  # noqa: F401
    conversation = _Conversation(plan, options)
    while True:
        try:
            text = ask().strip()
        except (EOFError, KeyboardInterrupt):
            return
        if text == "/quit":
            return
        try:
            if text == "/new":
                conversation = _Conversation(plan, options)
            elif text.startswith("/alpha"):
                plan = _at_alpha(plan, text.removeprefix("/alpha"))
                conversation = _Conversation(plan, options)
                say(console, "a new conversation: " + ", ".join(speaker.name for speaker in plan.speakers), style="dim")
            elif text.startswith("/"):
                say(console, HELP_RUN if plan.delta else HELP, style="dim")
            elif text:
                screen = open_screen(console, [speaker.name for speaker in plan.speakers])
                yield conversation.answer(text, weights, screen)
        except UserError as error:
            say(console, f"error: {error}")
        except KeyboardInterrupt:
            say(console, "(stopped; this turn is forgotten)", style="dim")


def _at_alpha(plan: ChatPlan, text: str) -> ChatPlan:
    try:
        alpha = float(text)
    except ValueError:
        alpha = -1.0
    if plan.delta is None or not 0 <= alpha <= 1:
        raise UserError(f"/alpha{text}: write /alpha 0.5, from 0, the base, to 1, the run; only a run has one")
    return replace(plan, speakers=tuple(run_at(alpha) if s.name.startswith("run") else s for s in plan.speakers))


class _Conversation:
    """Every speaker's own turns: each continues from what it said itself."""

    def __init__(self, plan: ChatPlan, options: ChatOptions, first: str | None = None) -> None:
        """`first`: a prompt that will be asked; it is checked at once.

        Raises:
            UserError: it cannot be asked.
        """
        self._plan, self._options, self._number = plan, options, 0
        opening = [{"role": "system", "content": options.system}] if options.system else []
        self._turns: dict[str, Turns] = {speaker.name: list(opening) for speaker in plan.speakers}
        if first is not None:
            for turns in self._turns.values():
                self._prompt(turns, first)

    def answer(self, text: str, weights: PreTrainedModel, screen: Screen) -> Exchange:
        """Let every speaker answer a turn; it is kept once all have.

        Raises:
            UserError: the template refuses it, or the conversation is too long for the model.
        """
        plan, options = self._plan, self._options
        prompts = {s.name: self._prompt(self._turns[s.name], text) for s in plan.speakers}
        pad = int(plan.tokenizer.pad_token_id)
        answers = {}
        with screen:
            for speaker in plan.speakers:
                ids, most = prompts[speaker.name]
                sampling = Sampling(most, options.temperature, seed=options.seed)
                stream = screen.stream(speaker.name, plan.tokenizer, plan.ends)
                generate = TransformersGenerator(weights, plan.ends, pad, stream)
                with _speaking(plan, speaker, weights):
                    (written,) = generate([ids], sampling, self._number)
                kept = [i for i in written.ids if i not in plan.ends]
                answers[speaker.name] = plan.tokenizer.decode(kept, skip_special_tokens=True).strip()
                screen.finish(speaker.name, answers[speaker.name], cut=not written.ended)
        for name, said in answers.items():
            self._turns[name] += [{"role": "user", "content": text}, {"role": "assistant", "content": said}]
        self._number += 1
        return Exchange(text, answers)

    def _prompt(self, turns: Turns, text: str) -> tuple[tuple[int, ...], int]:
        """The tokens of a conversation with this turn, and how many tokens its answer may have."""
        plan, asked = self._plan, [*turns, {"role": "user", "content": text}]
        ids = make_prompt_tokens(plan.tokenizer, asked, "prompt", opened=plan.opened).ids
        room = self._options.max_new_tokens if plan.positions is None else plan.positions - len(ids)
        if room < 1:
            raise UserError(f"prompt: has {len(ids):,} tokens, and the model attends to {plan.positions:,}")
        return ids, min(room, self._options.max_new_tokens)


def _speaking(plan: ChatPlan, speaker: Speaker, weights: PreTrainedModel) -> AbstractContextManager[object]:
    if plan.delta is None or speaker.alpha == 0:
        return nullcontext()
    return delta_applied(weights, plan.delta, speaker.alpha)
