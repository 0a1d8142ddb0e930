"""Chat templates that loop for ever, or raise what they like."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from jinja2 import TemplateError

from cofitune.data import guarded as guarded_module
from cofitune.data.asking import make_prompt_tokens
from cofitune.data.formats import BadItemError
from cofitune.data.guarded import guarded
from cofitune.data.template import render
from cofitune.errors import UserError

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TURN = [{"role": "user", "content": "a"}]


def test_a_template_that_does_not_end_is_ended_with_a_message(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded_module, "SECONDS", 0.1)
    tiny_tokenizer.chat_template = ENDLESS
    with pytest.raises(UserError, match=r"has not rendered one conversation in 0.1 seconds"):
        render(tiny_tokenizer, TURN)
    began = time.process_time()
    while time.process_time() - began < 0.3:  # the clock is off again
        pass


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ messages[0]['content'] + 1 }}", "{{ range(10 ** 9)|list }}"])
def test_whatever_a_template_raises_is_a_message_in_evaluation_too(tiny_tokenizer: Any, template: str) -> None:
    tiny_tokenizer.chat_template = template
    with pytest.raises(TemplateError, match="it raises (ZeroDivision|Type|Overflow)Error: "):
        render(tiny_tokenizer, TURN)
    with pytest.raises(BadItemError, match=r"items.jsonl:3: the model's chat template refuses this prompt: it raises"):
        make_prompt_tokens(tiny_tokenizer, TURN, "items.jsonl:3")


def test_other_threads_render_without_a_clock() -> None:
    results: list[str] = []
    thread = threading.Thread(target=lambda: results.append(guarded(lambda: "a")))
    thread.start()
    thread.join()
    assert results == ["a"]
