"""Prompts alone, out of every form that data comes in, and what is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cofitune.data.formats import BadItemError, prompt_turns_of
from cofitune.data.read import make_prompt
from cofitune.data.sources import Source, open_source

EARLIER = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Who won?"},
]
KEPT = (("system", "Be brief."), ("user", "Hello."), ("assistant", "Hi."), ("user", "Who won?"))
RESPONSE = {"role": "assistant", "content": "The buyer."}
SHAREGPT = [{"from": "human", "value": "Who won?"}]
ASKED = (("user", "Who won?"),)


def pairs(item: dict[str, Any], form: str) -> tuple[tuple[str, str], ...]:
    return tuple((turn.role, turn.content) for turn in prompt_turns_of(item, form).turns)


@pytest.mark.parametrize(
    ("item", "turns"),
    [
        ({"instruction": "Who won?", "output": "The buyer."}, ASKED),
        ({"instruction": "Who won?"}, ASKED),
        ({"instruction": "Who won?", "output": ""}, ASKED),
        ({"instruction": "Who won?", "input": "Case 1.", "output": None}, (("user", "Who won?\nCase 1."),)),
        ({"prompt": "Who won?", "completion": "Nobody.", "label": False}, ASKED),
        ({"prompt": "Who won?", "completion": "The buyer.", "label": None}, ASKED),
        ({"messages": EARLIER}, KEPT),
        ({"messages": [*EARLIER, RESPONSE]}, KEPT),
        ({"conversations": SHAREGPT}, ASKED),
        ({"conversations": [*SHAREGPT, {"from": "gpt", "value": "The buyer."}]}, ASKED),
        ({"prompt": "Who won?"}, ASKED),
        ({"prompt": EARLIER}, KEPT),
        ({"prompt": "Who won?", "completion": "The buyer."}, ASKED),
        ({"prompt": EARLIER, "completion": [RESPONSE]}, KEPT),
        ({"prompt": "Who won?", "chosen": "The buyer.", "rejected": "Nobody."}, ASKED),
        ({"prompt": "Who won?", "chosen": [*EARLIER, RESPONSE], "rejected": [*EARLIER, RESPONSE]}, ASKED),
        ({"chosen": [*EARLIER, RESPONSE], "rejected": [*EARLIER, RESPONSE]}, KEPT),
    ],
)
def test_a_prompt_is_all_turns_up_to_the_users_last_one(item: dict[str, Any], turns: Any) -> None:
    assert pairs(item, "auto") == turns


@pytest.mark.parametrize(
    ("item", "reason", "message"),
    [
        ({"messages": EARLIER[:1]}, "no prompt at the end", "ends with the system's"),
        ({"messages": [*EARLIER, EARLIER[0]]}, "no prompt at the end", "ends with the system's"),
        ({"messages": [RESPONSE]}, "no prompt at the end", "no turn but a response"),
        ({"messages": [*EARLIER[1:3], RESPONSE]}, "no prompt at the end", "ends with the assistant's"),
        ({"messages": [RESPONSE, EARLIER[1]]}, "first turn not the user's", "first turn .* is the assistant's"),
        ({"messages": []}, "wrong type", "must be a list of turns"),
        ({"messages": [{"role": "user", "content": " \n"}]}, "empty prompt", "is empty"),
        ({"instruction": " ", "input": ""}, "empty prompt", "is empty"),
        ({"instruction": 3}, "wrong type", "must be strings"),
        ({"prompt": ""}, "empty prompt", "is empty"),
        ({"prompt": 3}, "wrong type", "must be a list"),
        ({"txt": "Who won?"}, "unknown keys", "this one has"),
        ({"text": "Who won?"}, "plain text", "is plain text"),
        ({"chosen": "Human: Who won?", "rejected": "Human: Who?"}, "preference data", "are preferences"),
    ],
)
def test_what_is_no_prompt_is_named_with_its_place(item: dict[str, Any], reason: str, message: str) -> None:
    with pytest.raises(BadItemError, match=rf"^p\.jsonl:7: .*{message}") as refused:
        make_prompt("p.jsonl:7", item, "auto")
    assert refused.value.reason == reason


def test_a_stated_format_is_not_guessed() -> None:
    both = {"instruction": "Who won?", "prompt": "Who lost?"}
    assert pairs(both, "prompt_completion") == (("user", "Who lost?"),)
    with pytest.raises(BadItemError, match="messages"):
        prompt_turns_of(both, "messages")


def test_prompts_are_read_from_tables_whose_other_columns_are_empty(tmp_path: Path) -> None:
    from datasets import Dataset, Features, Value

    columns = {"instruction": ["Who won?", "007"], "output": [None, "x"], "prompt": [None, None]}
    table = Dataset.from_dict(columns, Features({name: Value("string") for name in columns}))
    table.to_parquet(str(tmp_path / "p.parquet"))
    (tmp_path / "p.csv").write_text("instruction\nWho won?\n007\n")
    for name in ("p.parquet", "p.csv"):
        rows = open_source(Source(str(tmp_path / name))).rows()
        results = [make_prompt(where, row, "auto").turns[-1][1] for where, row in rows]
        assert results == ["Who won?", "007"], name
