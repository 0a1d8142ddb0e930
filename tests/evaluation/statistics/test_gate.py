"""Requirements: how they are typed, what is refused, and when they are met."""

from __future__ import annotations

import pytest

from cofitune.errors import UserError
from cofitune.evaluation.statistics.gate import judge, read_requirements

TASKS = {"law": "speciality", "arc.low": "gen_rs", "gen kn": "gen_kn"}


def test_a_requirement_is_read_in_every_form() -> None:
    texts = [
        "versatility>=-1.0",
        "speciality >= +10",
        "full:unified.low<=2",
        "arc.low>=0",
        "arc.low.high<=−3",
        "gen kn>=1",
    ]
    result = read_requirements(texts, TASKS, ["run", "full"], "run")
    assert [(r.model, r.score, r.end, r.sign, r.bound) for r in result] == [
        ("run", "versatility", "value", ">=", -1),
        ("run", "speciality", "value", ">=", 10),
        ("full", "unified", "low", "<=", 2),
        ("run", "arc.low", "value", ">=", 0),
        ("run", "arc.low", "high", "<=", -3),
        ("run", "gen kn", "value", ">=", 1),
    ]
    assert result[2].text == "full:unified.low<=+2"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("versatility>-1", "write .MODEL:.SCORE>=POINTS"),
        ("versatility", "write .MODEL:.SCORE>=POINTS"),
        ("versatility>=", "write"),
        ("versatility>=much", "write"),
        ("versatility>=nan", "write"),
        ("versatility>=1>=2", "write"),
        ("versatilty>=1", "no score is called 'versatilty'; did you mean 'versatility'"),
        ("instruct>=1", "there is no task that instruct could be taken from"),
        ("rum:versatility>=1", "no model is called 'rum'; did you mean 'run'"),
    ],
)
def test_a_mistake_is_told_with_what_would_be_right(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_requirements([text], TASKS, ["run"], "run")


def test_a_gate_needs_something_to_hold_against_the_base() -> None:
    with pytest.raises(UserError, match="no model to compare"):
        read_requirements(["versatility>=1"], TASKS, [], None)
    with pytest.raises(UserError, match="say of which model, as in 'a:versatility>=1'"):
        read_requirements(["versatility>=1"], TASKS, ["a", "b"], None)
    with pytest.raises(UserError, match="no task that unified"):
        read_requirements(["unified>=1"], {"law": "speciality"}, ["run"], "run")


def test_a_requirement_holds_its_own_end_against_its_bound() -> None:
    changes = {"run": {"versatility": {"value": -0.5, "low": -2.0, "high": 1.0, "p": 0.3}}}
    texts = ["versatility>=-1", "versatility>=-0.5", "versatility.low>=-1", "versatility<=-1", "versatility.high<=1"]
    verdicts = judge(read_requirements(texts, TASKS, ["run"], "run"), changes)
    assert [v.met for v in verdicts] == [True, True, False, False, True]
    assert verdicts[2].as_dict() == {
        "require": "run:versatility.low>=-1", "met": False, "value": -0.5, "low": -2.0, "high": 1.0
    }  # fmt: skip
