"""Tasks: what their files may hold, and what is said of those that hold something else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cofitune.errors import DataError, UserError
from cofitune.evaluation import items as items_module
from cofitune.evaluation.items import EvalTask
from cofitune.evaluation.tasks import load_tasks

CHOICE = {"question": "Two plus two?", "choices": ["three", "four"], "answer": 1}
COMMA = {"key": 1, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}


def make_task(folder: Path, items: list[Any], kind: str = "multiple_choice", **changes: Any) -> EvalTask:
    path = folder / f"{changes.pop('file', 'items')}.jsonl"
    path.write_text("".join((i if isinstance(i, str) else json.dumps(i)) + "\n" for i in items))
    metrics = {"multiple_choice": "acc", "generate": "exact_match", "loss": "nats_per_token", "ifeval": "prompt_strict"}
    metric = metrics[kind]
    return EvalTask(**{"title": "t", "category": "gen_kn", "path": str(path), "kind": kind, "metric": metric} | changes)


def test_a_choice_follows_its_context_and_chance_is_the_mean_over_items(tmp_path: Path) -> None:
    four = {"question": "Which?", "context": "A fact.", "choices": ["a", "b", "c", "d"], "answer": 0}
    (loaded,) = load_tasks([make_task(tmp_path, [CHOICE, "", four])])
    assert [item.prompt for item in loaded.items] == ["Two plus two?", "A fact.\nWhich?"]
    assert [item.line for item in loaded.items] == [1, 3]
    assert [item.reference for item in loaded.items] == [1, 0]
    assert loaded.chance == pytest.approx((1 / 2 + 1 / 4) / 2)


@pytest.mark.parametrize(
    ("fields", "references"),
    [
        ({"output": "long", "answer": "short", "answers": ["a", "b"]}, ("a", "b")),
        ({"output": "long", "answer": "short"}, ("short",)),
        ({"output": "long"}, ("long",)),
    ],
)
def test_the_reference_is_answers_or_answer_or_output(
    tmp_path: Path, fields: dict[str, Any], references: tuple[str, ...]
) -> None:
    item = {"instruction": " Name it. ", "input": "This.", **fields}
    (loaded,) = load_tasks([make_task(tmp_path, [item], "generate")])
    assert loaded.items[0].references == references
    assert loaded.items[0].prompt == "Name it.\nThis."  # as training joins instruction and input
    assert loaded.chance == 0


@pytest.mark.parametrize(
    ("fields", "answer_field", "reference"),
    [
        ({"output": "long", "answer": "short", "answers": ["a", "b"]}, None, "long"),
        ({"answers": ["a", "b"]}, None, "a"),
        ({"output": "long", "answer": "short"}, "answer", "short"),
        ({"choices": ["x", "y"], "answer": 1}, None, "y"),
    ],
)
def test_the_text_whose_loss_is_taken_is_the_whole_output_first(
    tmp_path: Path, fields: dict[str, Any], answer_field: str | None, reference: str
) -> None:
    item = {"question": "Q?", **fields}
    (loaded,) = load_tasks([make_task(tmp_path, [item], "loss", answer_field=answer_field)])
    assert loaded.items[0].references == (reference,)
    assert (loaded.chance, loaded.metric.unit, loaded.metric.higher_is_better) == (0, "nats", False)


def test_the_answers_key_can_be_named(tmp_path: Path) -> None:
    item = {"question": "Q?", "answers": ["a", "b"], "spans": "a; b"}
    (loaded,) = load_tasks([make_task(tmp_path, [item], "generate", answer_field="spans")])
    assert loaded.items[0].references == ("a; b",)
    with pytest.raises(DataError, match=r"items\.jsonl:1: there is no 'span' to compare with"):
        load_tasks([make_task(tmp_path, [item], "generate", answer_field="span")])


def test_a_reference_that_the_metric_cannot_compare_is_named_by_its_line(tmp_path: Path) -> None:
    items = [{"question": "Q?", "answer": "12"}, {"question": "Q?", "answer": "twelve"}]
    with pytest.raises(DataError, match=r"items\.jsonl:2: there is no number in 'twelve', so no answer could be right"):
        load_tasks([make_task(tmp_path, items, "generate", metric="number")])


def test_limit_takes_items_from_the_top_and_never_reads_beyond(tmp_path: Path) -> None:
    (loaded,) = load_tasks([make_task(tmp_path, [CHOICE, CHOICE, "broken"], limit=2)])
    assert len(loaded.items) == 2


@pytest.mark.parametrize(
    ("kind", "item", "output"),
    [
        ("multiple_choice", CHOICE | {"choices": ["one"]}, "'choices' must be a list of two or more"),
        ("multiple_choice", CHOICE | {"choices": ["one", " "]}, "that are not empty"),
        ("multiple_choice", CHOICE | {"answer": 2}, "0 to 1 (given: 2)"),
        ("multiple_choice", CHOICE | {"answer": "B"}, "index"),
        ("multiple_choice", CHOICE | {"answer": True}, "index"),
        ("multiple_choice", {"choices": ["a", "b"], "answer": 0}, "'question'"),
        ("generate", {"instruction": "Do."}, "no 'answers', 'answer' or 'output'"),
        ("generate", {"instruction": "Do.", "answer": 3}, "(given: 3)"),
        ("generate", {"instruction": "", "output": "x"}, "both empty"),
        ("generate", {"question": "Q?", "answers": []}, "'answers'"),
        ("ifeval", {"prompt": "p"}, "no 'key', 'instruction_id_list', 'kwargs'"),
        ("ifeval", COMMA | {"kwargs": []}, "of one length"),
        (
            "ifeval",
            COMMA | {"instruction_id_list": ["punctuation:no_commas"]},
            "did you mean 'punctuation:no_comma'?",
        ),
        (
            "ifeval",
            COMMA | {"instruction_id_list": ["startend:end_checker"], "kwargs": [{"endphrase": "bye"}]},
            "does not take {'endphrase': 'bye'}",
        ),
        ("ifeval", COMMA | {"instruction_id_list": [["punctuation:no_comma"]]}, "must be lists of one length"),
        ("generate", "{broken", "not valid JSON: Expecting property name enclosed in double quotes at column 2"),
        ("generate", '["a"]', "an item is a JSON object, not list"),
        ("generate", '{"question": "Q?", "answer": "a", "answer": "b"}', "the key 'answer' stands there twice"),
        ("generate", '{"question": "Q?", "answer": "cut \\ud83d"}', "holds half a character"),
        ("generate", "[" * 100_000, "nested too deeply"),
        ("generate", {"instruction": "Do.", "input": 0, "output": "x"}, "'instruction' and 'input' must be strings"),
        ("generate", {"question": "Q?", "context": False, "answer": "x"}, "'context' a string"),
        ("generate", {"question": "Q?", "answer": 0}, "(given: 0)"),
    ],
)
def test_a_bad_item_is_named_by_file_and_line(tmp_path: Path, kind: str, item: Any, output: str) -> None:
    good = {"multiple_choice": CHOICE, "generate": {"question": "Q?", "answer": "a"}, "ifeval": COMMA}[kind]
    with pytest.raises(DataError) as caught:
        load_tasks([make_task(tmp_path, [good, item], kind)])
    assert "items.jsonl:2: " in str(caught.value)
    assert output in str(caught.value)


def test_an_empty_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no items"):
        load_tasks([make_task(tmp_path, [])])
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such data file"):
        load_tasks([EvalTask("t", "gen_kn", "nowhere.jsonl", "generate", "exact_match")])


@pytest.mark.parametrize(
    ("changes", "output"),
    [
        ({"title": "a/b"}, "also names a file"),
        ({"title": "a\n"}, "also names a file"),
        ({"title": "ä" * 101}, "at most 200 bytes"),
        ({"metric": "regex", "pattern": "("}, "no regular expression"),
        ({"metric": "regex", "pattern": "#### .*"}, "has no group"),
    ],
)
def test_a_task_that_cannot_be_used_is_named(tmp_path: Path, changes: dict[str, Any], output: str) -> None:
    with pytest.raises(UserError, match=output):
        load_tasks([make_task(tmp_path, [{"question": "Q?", "answer": "a"}], "generate", **changes)])


def test_two_tasks_may_not_share_a_title(tmp_path: Path) -> None:
    one, two = (make_task(tmp_path, [CHOICE], title=t, file=t) for t in ("test", "Test"))
    with pytest.raises(UserError, match=r"two tasks are called 'Test' .*test\.jsonl and .*Test\.jsonl"):
        load_tasks([one, two])


def test_a_missing_sentence_table_is_told_with_the_lines_that_need_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentences = COMMA | {
        "instruction_id_list": ["length_constraints:number_sentences"],
        "kwargs": [{"relation": "at least", "num_sentences": 2}],
    }
    task = make_task(tmp_path, [COMMA, sentences], "ifeval")
    monkeypatch.setattr(items_module, "punkt_is_there", lambda: False)
    with pytest.raises(UserError, match=r"1 of 2 items \(lines 2\).*nltk.downloader punkt_tab"):
        load_tasks([task])
    monkeypatch.setattr(items_module, "punkt_is_there", lambda: True)
    assert len(load_tasks([task])[0].items) == 2
    monkeypatch.setattr(items_module, "punkt_is_there", lambda: False)
    dropped = load_tasks([replace(task, on_bad_item="drop")])[0]
    assert ([item.line for item in dropped.items], dropped.unusable) == ([1], (2,))
    assert len(load_tasks([make_task(tmp_path, [COMMA], "ifeval")])[0].items) == 1  # nothing needs it here


def test_bad_items_are_dropped_and_counted_where_that_is_asked(tmp_path: Path) -> None:
    (loaded,) = load_tasks([make_task(tmp_path, [CHOICE | {"answer": 7}, CHOICE, {}], on_bad_item="drop")])
    assert ([item.line for item in loaded.items], loaded.unusable) == ([2], (1, 3))
    (loaded,) = load_tasks([make_task(tmp_path, ["{", CHOICE, '["a"]', '{"a": 1, "a": 2}'], on_bad_item="drop")])
    assert ([item.line for item in loaded.items], loaded.unusable) == ([2], (1, 3, 4)), "a line that is no JSON, too"
    with pytest.raises(DataError, match=r"holds no usable items \(1 cannot be asked or judged\)"):
        load_tasks([make_task(tmp_path, [{}], on_bad_item="drop")])


@pytest.mark.parametrize(
    ("kind", "rows", "changes", "unread"),
    [
        ("multiple_choice", [CHOICE | {"id": 7, "context": "A fact."}, CHOICE | {"note": None}], {}, (("id", 1),)),
        ("multiple_choice", [CHOICE | {"system": "Be kind."}] * 3, {}, (("system", 3),)),
        (
            "generate",
            [{"question": "a", "answer": "b", "output": "c", "input": "d"}],
            {},
            (("output", 1), ("input", 1)),
        ),
        ("generate", [{"instruction": "a", "input": "", "output": "b"}, {"question": "a", "answers": ["b"]}], {}, ()),
        ("generate", [{"instruction": "a", "gold": "b", "output": "c"}], {"answer_field": "gold"}, (("output", 1),)),
        ("loss", [CHOICE, {"instruction": "a", "output": "b", "history": []}], {}, (("history", 1),)),
        ("ifeval", [COMMA | {"source": "x"}], {}, (("source", 1),)),
    ],
)
def test_keys_that_nothing_reads_are_counted(
    tmp_path: Path, kind: str, rows: list[Any], changes: dict[str, Any], unread: tuple[tuple[str, int], ...]
) -> None:
    (loaded,) = load_tasks([make_task(tmp_path, rows, kind, **changes)])
    assert loaded.unread == unread
