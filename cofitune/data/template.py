"""The chat template that a tokenizer speaks: the model's own, ours, or a file; with its settings written into it.

Settings (keyword arguments, the day, the system role) become Jinja statements in front of the template's own text.
So training, evaluation, rehearsal and export all speak the same template, and one hash over its text names them all.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from cofitune.data.guarded import guarded
from cofitune.errors import UserError

NAMED = ("auto", "chat", "plain")  # what a template may be called besides a file's path
PLAIN_TEMPLATE = (  # every marker ends with a line break, so that no token straddles the prompt and the response
    "{{ bos_token if bos_token else '' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'user' %}### User:\n{{ message['content'] }}\n\n"
    "{% else %}### Assistant:\n{{ message['content'] }}{{ eos_token }}\n\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
# transformers' Jinja drops the line break behind a statement, so that the template's own text begins on a fresh line
BEGIN, END = "{#- settings by cofitune #}\n", "{#- end of settings #}\n"
MERGE_SYSTEM = (  # one line: every run of system turns goes into the user's turn behind it; others stay where they are
    "{% set merged = namespace(turns=[], held=[], text='') %}{% for turn in messages %}"
    "{% if turn['role'] == 'system' %}{% set merged.held = merged.held + [turn] %}"
    "{% elif turn['role'] == 'user' and merged.held %}{% set merged.text = '' %}"
    "{% for one in merged.held %}{% if one['content'] %}"
    "{% set merged.text = merged.text + one['content'] + '\\n\\n' %}{% endif %}{% endfor %}"
    "{% set merged.turns = merged.turns + [{'role': 'user', 'content': merged.text + turn['content']}] %}"
    "{% set merged.held = [] %}"
    "{% else %}{% set merged.turns = merged.turns + merged.held + [turn] %}{% set merged.held = [] %}{% endif %}"
    "{% endfor %}{% set messages = merged.turns + merged.held %}"
)
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@dataclass(frozen=True)
class ChatTemplate:
    """Which template is spoken, and how.

    Attributes:
        name: auto, chat, plain, or the path of a file with a Jinja template.
        kwargs: values that the template reads by name, such as `enable_thinking`.
        system: keep: a system turn is the template's business; merge: it becomes the beginning of the user's turn
            behind it, several of them in their order.
        day: what a template that writes the date writes, as year-month-day; None: each call's own day.
        text: the file's text, where it is known already; None: it is read.
    """

    name: str = "auto"
    kwargs: Mapping[str, object] = field(default_factory=dict)
    system: str = "keep"
    day: str | None = None
    text: str | None = None

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> ChatTemplate:
        """The template that a run was trained under; of an older run by its name alone."""
        about = manifest.get("chat_template") or {}
        return cls(
            manifest["template"],
            about.get("kwargs") or {},
            about.get("system", "keep"),
            about.get("day"),
            about.get("text"),
        )

    def as_dict(self, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, object]:
        """What a manifest keeps of it beside its name."""
        about: dict[str, object] = {"kwargs": dict(self.kwargs), "system": self.system, "day": self.day}
        if tokenizer is None:
            return about
        text = {} if self.name in NAMED else {"text": own_text(str(tokenizer.chat_template))}
        return {**about, **text, "sha256": template_sha256(tokenizer)}


def set_template(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | str) -> str:
    """Make the tokenizer speak the configured template, for training, evaluation and export alike.

    Args:
        template: a name stands for itself without further settings: chat (the model's own), plain (ours), auto (the
            model's own where there is one), or a file's path.

    Returns:
        chat or plain, which of the two it is now; of a file its path.

    Raises:
        UserError: `chat` is asked of a tokenizer that has no chat template, the file cannot be read, or a template is
            no Jinja.
    """
    given = ChatTemplate(template) if isinstance(template, str) else template
    name, text = _text(tokenizer, given)
    tokenizer.chat_template = _settings(given, text) + text
    if given.name not in NAMED or given.kwargs:
        _check(tokenizer, given)
    return name


def is_dated(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's template writes the date."""
    return "strftime_now" in own_text(str(tokenizer.chat_template or ""))


def own_text(template: str) -> str:
    """A template's text without the settings that we wrote in front of it."""
    return template.partition(END)[2] if template.startswith(BEGIN) else template


def template_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Names the template with its settings, the day left out."""
    lines = str(tokenizer.chat_template).splitlines(keepends=True)
    undated = "".join(line for line in lines if not line.startswith("{% macro strftime_now(format)"))
    return hashlib.sha256(undated.encode("utf-8")).hexdigest()


def merges_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether system turns are merged into the user's turn behind them."""
    return MERGE_SYSTEM in str(tokenizer.chat_template)


def without_day(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the template write each call's own day again, as an exported model's does."""
    text = str(tokenizer.chat_template)
    lines = text.splitlines(keepends=True)
    kept = "".join(line for line in lines if not line.startswith("{% macro strftime_now(format)"))
    tokenizer.chat_template = kept.removeprefix(BEGIN + END)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, object]],
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, object]] = (),
) -> str:
    """The text that the model sees for these messages.

    Raises:
        TemplateError: the template raises.
        UserError: it does not come to an end.
    """
    return guarded(
        lambda: tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] or None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    )


def _text(tokenizer: PreTrainedTokenizerBase, given: ChatTemplate) -> tuple[str, str]:
    """The template's name and its own text."""
    if isinstance(tokenizer.chat_template, dict):
        raise UserError(
            f"data.template: this model's tokenizer has several chat templates ({', '.join(tokenizer.chat_template)}); "
            "write the one to use into a file and name it"
        )
    own = own_text(str(tokenizer.chat_template or ""))
    if given.name not in NAMED:
        return given.name, given.text if given.text is not None else _read(Path(given.name))
    if given.name == "chat" and not own:
        raise UserError("data.template: this model's tokenizer has no chat template; use template: plain (or auto)")
    return ("plain", PLAIN_TEMPLATE) if given.name == "plain" or not own else ("chat", own)


def _read(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise UserError(f"data.template: {path} is no file; it is {', '.join(NAMED)} or a file with a Jinja template")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.template: {path} cannot be read ({getattr(error, 'strerror', None) or 'it is no UTF-8 text'}; seen "
            f"from {Path.cwd()}); it is {', '.join(NAMED)} or a file with a Jinja template"
        ) from None
    if not text.strip():
        raise UserError(f"data.template: {path} is empty")
    return text


def _check(tokenizer: PreTrainedTokenizerBase, given: ChatTemplate) -> None:
    """Raise a UserError where the template cannot be read as Jinja, or never reads a keyword argument."""
    own = own_text(str(tokenizer.chat_template))
    unread = [name for name in given.kwargs if name not in own]
    if unread:
        raise UserError(f"data.chat_template_kwargs: the chat template reads no '{unread[0]}'")
    try:
        render(tokenizer, [{"role": "user", "content": "a"}], add_generation_prompt=True)
    except TemplateError as error:
        line = f":{error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        raise UserError(f"data.template: {given.name}{line}: cannot be used as a chat template: {error}") from None


def _settings(given: ChatTemplate, text: str) -> str:
    """The statements in front of the template; nothing where there is nothing to say."""
    lines = [f"{{% set {name} = {_literal(value)} %}}" for name, value in sorted(given.kwargs.items())]
    if given.system == "merge":
        lines.append(MERGE_SYSTEM)
    if given.day is not None and "strftime_now" in text:
        lines.append(_fixed_day(datetime.date.fromisoformat(given.day)))
    return BEGIN + "".join(f"{line}\n" for line in lines) + END if lines else ""


def _literal(value: object) -> str:
    """A JSON value as Jinja writes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)


def _fixed_day(day: datetime.date) -> str:
    """A macro in the place of transformers' `strftime_now`: English names, and midnight for the time of day."""
    month, weekday = MONTHS[day.month - 1], DAYS[day.weekday()]
    parts = {
        "%-d": str(day.day), "%-m": str(day.month), "%d": f"{day.day:02}", "%m": f"{day.month:02}", "%Y": f"{day:%Y}",
        "%y": f"{day:%y}", "%B": month, "%b": month[:3], "%h": month[:3], "%A": weekday, "%a": weekday[:3],
        "%F": day.isoformat(), "%j": f"{day:%j}", "%H": "00", "%M": "00", "%S": "00", "%I": "12", "%p": "AM",
    }  # fmt: skip
    replaced = "".join(f"|replace('{code}', '{text}')" for code, text in parts.items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}"
