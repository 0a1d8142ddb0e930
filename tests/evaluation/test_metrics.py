"""Metrics, each against a value worked out by hand or the same measure computed another way."""

from __future__ import annotations

import math
from collections import Counter
from decimal import Decimal

import pytest

from cofitune.evaluation.metrics import METRICS, corpus_score, last_number, pick, text_score, unreachable


def test_acc_norm_can_pick_another_choice_than_acc() -> None:
    assert pick([-4.0, -6.0], ["a", "long one"], "acc") == 0
    assert pick([-4.0, -6.0], ["a", "long one"], "acc_norm") == 1
    assert pick([-4.0, -6.0], ["aa", "éé"], "acc_norm") == 1  # bytes, not characters


def test_exact_match_leaves_out_white_space_only_and_any_reference_counts() -> None:
    assert text_score("exact_match", " two\n", ["one", "two "]) == 1
    assert text_score("exact_match", "Two", ["one", "two"]) == 0


def test_squad_match_leaves_out_case_punctuation_and_articles() -> None:
    assert text_score("squad_match", "The Buyer's  cat.", ["x", "buyers cat"]) == 1
    assert text_score("squad_match", "two cats", ["two dogs"]) == 0
    assert text_score("squad_match", "《红楼梦》。", ["红楼梦"], tokenize="zh") == 1


@pytest.mark.parametrize(
    ("answer", "right"),
    [("so #### 480 .", 1), ("#### 48", 0), ("480", 0), ("#### 12 #### 480", 0), ("####   480\n", 1)],
)
def test_regex_takes_the_first_match_and_none_is_wrong(answer: str, right: int) -> None:
    assert text_score("regex", answer, ["480"], r"####\s*(\d+)") == right
    assert text_score("f1", f"buyer {answer}", ["480"], r"####\s*(\d+)") == right  # of any metric


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 12, no: 1,480.", "1480"),
        ("$3.50 each", "3.5"),
        ("-7 degrees", "-7"),
        ("44.69 %", "44.69"),
        ("She pays 480.00", "480"),
        ("5 apples ...", "5"),
        ("version 1.2.3", None),
        ("none at all", None),
    ],
)
def test_the_last_number_is_read_and_compared_as_a_number(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))
    assert text_score("number", text, ["one", number or "1"]) == int(number is not None)


def test_numbers_are_found_where_the_harness_finds_them() -> None:
    from lm_eval.filters.extraction import RegexFilter

    texts = ["#### 72", "a 5 and $1,080.50", "x -3 y", "7", "costs 12.", "100% of 18 people"]
    result = RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1).apply([[t] for t in texts], [{}] * len(texts))
    for text, (harness,) in zip(texts, result, strict=True):
        assert last_number(text) == Decimal(harness.replace("$", "").replace(",", "").rstrip("."))


def word_f1(answer: list[str], reference: list[str]) -> float:
    common = sum((Counter(answer) & Counter(reference)).values())
    return 2 * common / (len(answer) + len(reference))


def test_f1_is_the_overlap_of_words_with_the_best_reference() -> None:
    expected = word_f1(["buyer", "pays", "cat"], ["buyer", "paid", "cat"])
    assert text_score("f1", "The buyer pays the cat!", ["nothing", "buyer paid a cat"]) == pytest.approx(expected)
    chinese = word_f1(list("北京大学3"), list("北京3"))
    assert text_score("f1", "北京大学 3", ["北京 3"], tokenize="zh") == pytest.approx(chinese)
    assert text_score("f1", "北京大学", ["北京"]) == 0  # without Chinese words it is one word that differs


def longest_common(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + longest_common(a[:-1], b[:-1])
    return max(longest_common(a[:-1], b), longest_common(a, b[:-1]))


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    for answer, reference, tokenize in (
        ("the cat sat on a mat", "a cat on the mat sat", "default"),
        ("我今天去北京", "我去了北京大学", "zh"),
    ):
        a, b = (list(t) if tokenize == "zh" else t.split() for t in (answer, reference))
        common = longest_common(a, b)
        expected = 2 * common / (len(a) + len(b))
        assert text_score("rouge_l", answer, ["x", reference], tokenize=tokenize) == pytest.approx(expected)


def test_a_sentences_bleu_is_the_smoothed_geometric_mean_of_precisions() -> None:
    answer, reference = "a b c d e f", "a b c d x f g"
    # by hand: 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples; one word shorter than the reference
    expected = math.exp(1 - 7 / 6) * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert text_score("bleu", answer, [reference]) == pytest.approx(expected)
    assert text_score("bleu", "a b", ["a b"]) == 1  # too short for triples: those orders are left out
    spaced = text_score("bleu", " ".join("我今天去北京大"), [" ".join("我今天去上海大")])
    assert text_score("bleu", "我今天去北京大", ["我今天去上海大"], tokenize="zh") == pytest.approx(spaced)
    assert 0 < spaced < 1


def test_chrf_is_the_f2_of_character_n_grams() -> None:
    answer, reference = "abcab", "abcb"

    def grams(text: str, n: int) -> Counter[str]:
        return Counter(text[i : i + n] for i in range(len(text) - n + 1))

    precisions, recalls = [], []
    for n in range(1, 5):  # longer ones are not in both
        a, b = grams(answer, n), grams(reference, n)
        precisions.append(sum((a & b).values()) / sum(a.values()))
        recalls.append(sum((a & b).values()) / sum(b.values()))
    p, r = sum(precisions) / 4, sum(recalls) / 4
    assert text_score("chrf", answer, [reference]) == pytest.approx(5 * p * r / (4 * p + r))


def test_the_corpus_figure_is_no_mean_of_sentences_and_references_may_vary() -> None:
    answers, references = ["the cat sat on the mat", "hello"], [["the cat sat on a mat"], ["hello there", "hello"]]
    mean = sum(text_score("bleu", a, r) for a, r in zip(answers, references, strict=True)) / 2
    whole = corpus_score("bleu", answers, references)
    # by hand: 5 + 1 of 7 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples; no shorter than the references
    assert whole == pytest.approx((6 / 7 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert whole != pytest.approx(mean)
    assert corpus_score("f1", answers, references) is None


@pytest.mark.parametrize("metric", ["f1", "squad_match", "rouge_l", "bleu", "chrf", "exact_match"])
def test_an_empty_answer_scores_nothing(metric: str) -> None:
    assert text_score(metric, "", ["word"]) == 0


def test_a_reference_that_no_answer_could_match_is_told() -> None:
    assert unreachable("number", ["twelve", "12"]) is None
    assert "no number in 'twelve'" in (unreachable("number", ["twelve"]) or "")
    assert "tokenize: zh" in (unreachable("rouge_l", ["北京"]) or "")
    assert unreachable("rouge_l", ["北京"], "zh") is None
    assert unreachable("f1", ["the"]) is not None  # an article is all that it is


def test_what_the_figures_mean() -> None:
    nats = {"nats_per_token", "nats_per_byte", "drift", "kl"}
    assert {m.name for m in METRICS.values() if not m.higher_is_better} == nats
    assert {m.name for m in METRICS.values() if m.unit == "nats"} == nats
    binary = {"acc", "acc_norm", "exact_match", "squad_match", "regex", "number", "prompt_strict"}
    assert {m.name for m in METRICS.values() if m.binary} == binary
