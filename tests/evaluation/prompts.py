"""What a model is asked, as text."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from cofitune.evaluation.asked import ask_item
from cofitune.evaluation.items import EvalItem, EvalTask


def render_prompt(tokenizer: PreTrainedTokenizerBase, item: EvalItem, prompt: str = "chat") -> str:
    """The text that the model sees for an item, up to where its answer begins.

    Args:
        prompt: chat: the item in the template, as a user's turn; continuation: the item's text alone, behind the token
            with which the tokenizer begins every text, where there is one.
    """
    return ask_item(tokenizer, item, EvalTask("", "", "", "generate", "", prompt=prompt)).prompt
