"""The template that is spoken: named, from a file, with settings, on a fixed day."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cofitune.data.template import (
    ChatTemplate,
    is_dated,
    own_text,
    render,
    set_template,
    template_sha256,
    without_day,
)
from cofitune.errors import UserError

TURNS = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
SWITCHED = (
    "  {% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% if enable_thinking is defined and enable_thinking is false %}"
    " <think></think>{% endif %}{% endif %}"
)
DATED = (
    "{% set today = strftime_now('%d %b %Y') if strftime_now is defined else '-' %}\nToday: {{ today }}\n" + SWITCHED
)


def write(folder: Path, text: str) -> str:
    path = folder / "mine.jinja"
    path.write_text(text)
    return str(path)


def test_a_file_is_spoken_as_it_stands(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = write(tmp_path, SWITCHED)
    assert set_template(tiny_tokenizer, path) == path
    assert tiny_tokenizer.chat_template == SWITCHED
    assert render(tiny_tokenizer, TURNS, True) == "system: Be kind.\nuser: Hi\nassistant:"
    known = ChatTemplate(path).as_dict(tiny_tokenizer)
    Path(path).unlink()
    again = ChatTemplate.from_manifest({"template": path, "chat_template": known})
    tiny_tokenizer.chat_template = None
    set_template(tiny_tokenizer, again)
    assert tiny_tokenizer.chat_template == SWITCHED, "a manifest knows the text"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("  \n", "is empty"),
        ("{% for m in messages %}", r"mine\.jinja:1: cannot be used as a chat template"),
    ],
)
def test_a_file_that_is_no_template_is_named(tmp_path: Path, tiny_tokenizer: Any, text: str, message: str) -> None:
    path = write(tmp_path, text) if text else str(tmp_path / "mine.jinja")
    with pytest.raises(UserError, match=message):
        set_template(tiny_tokenizer, path)


@pytest.mark.parametrize("begin", ["", "\n", "  ", "{# a comment #}\n  "])
def test_settings_change_nothing_else(tiny_tokenizer: Any, begin: str) -> None:
    tiny_tokenizer.chat_template = begin + SWITCHED
    before = render(tiny_tokenizer, TURNS, True)
    set_template(tiny_tokenizer, ChatTemplate(kwargs={"enable_thinking": False}))
    assert render(tiny_tokenizer, TURNS, True) == before + " <think></think>"
    assert own_text(tiny_tokenizer.chat_template) == begin + SWITCHED
    set_template(tiny_tokenizer, ChatTemplate(kwargs={"enable_thinking": True}))
    assert render(tiny_tokenizer, TURNS, True) == before, "the last settings count, and stand there once"


def test_any_value_of_json_reaches_the_template(tiny_tokenizer: Any) -> None:
    value: dict[str, Any] = {"text": 'a "b"}} %} é🙂\n', "none": None, "list": [1, 2.5, True], "empty": {}}
    tiny_tokenizer.chat_template = "{{ x.text }}|{{ x.none }}|{{ x.list }}|{{ x.empty }}"
    set_template(tiny_tokenizer, ChatTemplate(kwargs={"x": value}))
    assert render(tiny_tokenizer, TURNS) == "{text}|{none}|{list}|{empty}".format(**value)


def test_a_keyword_that_the_template_never_reads_is_named(tiny_tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"data\.chat_template_kwargs: the chat template reads no 'enable_thinkin'"):
        set_template(tiny_tokenizer, ChatTemplate(kwargs={"enable_thinkin": False}))


def test_a_system_turn_is_merged_where_asked(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = SWITCHED
    set_template(tiny_tokenizer, ChatTemplate(system="merge"))
    assert render(tiny_tokenizer, TURNS, True) == "user: Be kind.\n\nHi\nassistant:"
    assert render(tiny_tokenizer, TURNS[1:], True) == "user: Hi\nassistant:"


def said(text: str) -> list[dict[str, str]]:
    """Turns out of letters and texts: "s:Be kind. u:Hi"."""
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": names[turn[0]], "content": turn[2:]} for turn in text.split()]


@pytest.mark.parametrize(
    ("given", "merged"),
    [
        ("s:A s:B u:C a:D", ["user: A\n\nB\n\nC", "assistant: D"]),
        ("u:A a:B s:C u:D a:E", ["user: A", "assistant: B", "user: C\n\nD", "assistant: E"]),
        ("s:A u:B a:C s:D s:E u:F", ["user: A\n\nB", "assistant: C", "user: D\n\nE\n\nF"]),
        ("s: u:A a:B", ["user: A", "assistant: B"]),
        ("u:A s:B a:C", ["user: A", "system: B", "assistant: C"]),
        ("u:A a:B s:C", ["user: A", "assistant: B", "system: C"]),
    ],
)
def test_system_turns_go_into_the_users_turn_behind_them(tiny_tokenizer: Any, given: str, merged: list[str]) -> None:
    tiny_tokenizer.chat_template = SWITCHED
    set_template(tiny_tokenizer, ChatTemplate(system="merge"))
    assert render(tiny_tokenizer, said(given)) == "\n".join(merged) + "\n"


def test_a_date_is_the_given_day(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = DATED
    assert is_dated(tiny_tokenizer)
    hashes, texts = set(), set()
    for day, written in (("2026-01-07", "07 Jan 2026"), ("2024-12-30", "30 Dec 2024")):
        set_template(tiny_tokenizer, ChatTemplate(day=day))
        assert render(tiny_tokenizer, TURNS).startswith(f"Today: {written}\n")
        hashes.add(template_sha256(tiny_tokenizer))
        texts.add(tiny_tokenizer.chat_template)
    assert (len(hashes), len(texts)) == (1, 2), "the day names no other template, but other prompts"
    without_day(tiny_tokenizer)
    assert tiny_tokenizer.chat_template == DATED


@pytest.mark.parametrize("form", ["%d %B %Y", "%Y-%m-%d", "%A, %-d %b %y", "%F", "%j of %Y"])
def test_dates_are_written_as_python_writes_them(tiny_tokenizer: Any, form: str) -> None:
    import datetime

    tiny_tokenizer.chat_template = "{{ strftime_now('" + form + "') }}"
    for day in ("2026-03-09", "2025-11-28"):
        set_template(tiny_tokenizer, ChatTemplate(day=day))
        assert render(tiny_tokenizer, TURNS) == datetime.date.fromisoformat(day).strftime(form)


def test_an_undated_template_is_left_as_it_is(tiny_tokenizer: Any) -> None:
    own = tiny_tokenizer.chat_template
    set_template(tiny_tokenizer, ChatTemplate(day="2026-01-07"))
    assert tiny_tokenizer.chat_template == own


def test_several_templates_are_refused(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = {"default": SWITCHED, "rag": SWITCHED}
    with pytest.raises(UserError, match=r"several chat templates \(default, rag\)"):
        set_template(tiny_tokenizer, "auto")
