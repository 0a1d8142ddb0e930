"""Metrics: what a task's figure means, and what one answer is worth. The measures themselves are kept libraries'."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import BLEU, CHRF

# as the harness's gsm8k finds numbers (its filter `flexible-extract`)
NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
SACREBLEU_TOKENIZERS = {"default": "13a", "zh": "zh"}
SQUAD_LANGUAGES = {"default": "en", "zh": "zh"}


@dataclass(frozen=True)
class Metric:
    """One metric; a task's raw figure is the mean of its items' scores, so that items can be paired and resampled.

    Attributes:
        name: as configs and tables call it.
        unit: `share`: 0 to 1, 1 is all right, and s' = 100·(s − chance)/(1 − chance) puts it on the scale of the means;
            `nats`: a cross-entropy, and `own`: another scale of a harness task: neither has such a scale, and both are
            shown beside and enter no mean.
        higher_is_better: whether a larger figure is a better one.
        binary: each item is right (1) or wrong (0), which is what McNemar's test asks for.
    """

    name: str
    unit: Literal["share", "nats", "own"] = "share"
    higher_is_better: bool = True
    binary: bool = True


METRICS = {
    metric.name: metric
    for metric in (
        Metric("acc"),
        Metric("acc_norm"),
        Metric("exact_match"),
        Metric("squad_match"),
        Metric("regex"),
        Metric("number"),
        Metric("f1", binary=False),
        Metric("rouge_l", binary=False),
        Metric("bleu", binary=False),
        Metric("chrf", binary=False),
        Metric("nats_per_token", "nats", higher_is_better=False, binary=False),
        Metric("nats_per_byte", "nats", higher_is_better=False, binary=False),
        Metric("prompt_strict"),
        Metric("drift", "nats", higher_is_better=False, binary=False),
        Metric("kl", "nats", higher_is_better=False, binary=False),
    )
}


def pick(log_likelihoods: Sequence[float], choices: Sequence[str], metric: str) -> int:
    """Index of the likeliest choice; acc_norm divides by the choice's UTF-8 bytes. The first of equals wins."""
    values = list(log_likelihoods)
    if metric == "acc_norm":
        values = [v / len(c.encode("utf-8")) for v, c in zip(values, choices, strict=True)]
    return values.index(max(values))


def text_score(
    metric: str, answer: str, references: Sequence[str], pattern: str | None = None, tokenize: str = "default"
) -> float:
    """What an answer is worth, 0 to 1, against the reference that fits it best.

    Args:
        metric: exact_match (white space around either left out) | squad_match and f1 (of words; both leave out case,
            punctuation and articles, as SQuAD does) | regex (exact_match of what `pattern` finds) | number (the last
            number of both, as numbers) | rouge_l (F-measure) | bleu (of one sentence: smoothed, orders that it is too
            short for left out) | chrf.
        pattern: what is compared is its first group, searched in the answer; an answer without is worth nothing.
        tokenize: default, or zh: each Chinese character is a word.
    """
    if pattern is not None:
        result = extract(answer, pattern)
        return 0.0 if result is None else text_score(metric, result, references, None, tokenize)
    match metric:
        case "exact_match" | "regex":
            return float(answer.strip() in {reference.strip() for reference in references})
        case "number":
            number = last_number(answer)
            return float(number is not None and number in {last_number(reference) for reference in references})
        case "squad_match" | "f1":
            squad, language = _squad(), SQUAD_LANGUAGES[tokenize]
            measure = squad.f1_score if metric == "f1" else squad.exact_match_score
            return max(float(measure(answer, reference, language)) for reference in references)
        case "rouge_l":
            return float(_rouge(tokenize).score_multi(references, answer)["rougeL"].fmeasure)
        case "bleu" | "chrf":  # rounding leaves a perfect BLEU a hair above 100
            return min(1.0, float(_sacrebleu(metric, tokenize).sentence_score(answer, list(references)).score) / 100)
    raise ValueError(f"no metric of texts: {metric}")


def extract(answer: str, pattern: str | None) -> str | None:
    """The first group of `pattern`, searched in the answer; without a pattern all of it, without a match None."""
    if pattern is None:
        return answer
    result = re.search(pattern, answer)
    return None if result is None else result.group(1) or ""


def corpus_score(
    metric: str, answers: Sequence[str], references: Sequence[Sequence[str]], tokenize: str = "default"
) -> float | None:
    """BLEU or chrF of all answers together, 0 to 1, as papers report it; None for metrics that have no such form."""
    if metric not in ("bleu", "chrf"):
        return None
    most = max(map(len, references))
    padded = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    return float(_sacrebleu(metric, tokenize).corpus_score(list(answers), padded).score / 100)  # type: ignore[arg-type] # sacrebleu leaves a None out


def last_number(text: str) -> Decimal | None:
    """The last number that a text says, `$` and thousands separators left out; units and what follows are not read."""
    for result in reversed(list(NUMBER.finditer(text))):
        try:
            return Decimal(re.sub(r"[$,]", "", result.group()).removesuffix("."))
        except InvalidOperation:  # the pattern finds `...` and `1.2.3`, too
            continue
    return None


def unreachable(metric: str, references: Sequence[str], tokenize: str = "default") -> str | None:
    """Why no answer can be right, if so: not one reference would get full marks if it were the answer."""
    if any(text_score(metric, r, [r], None, tokenize) > 0.99 for r in references):
        return None
    if metric == "number":
        return f"there is no number in {references[0]!r}"
    hint = "; for Chinese give tokenize: zh" if tokenize == "default" else ""
    return f"nothing of {references[0]!r} is left that {metric} could compare{hint}"


def _squad() -> ModuleType:
    """MLQA's official script, which is SQuAD's for English and knows Chinese; the harness carries it."""
    return import_module("lm_eval.tasks.mlqa.utils")


@cache
def _rouge(tokenize: str) -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_ChineseWords() if tokenize == "zh" else None)


class _ChineseWords:
    """sacrebleu's Chinese tokenisation in the form that rouge_score asks for."""

    def __init__(self) -> None:
        from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

        self._split = TokenizerZh()

    def tokenize(self, text: str) -> list[str]:
        return [str(word) for word in self._split(text.lower()).split()]


@cache
def _sacrebleu(metric: str, tokenize: str) -> CHRF | BLEU:
    from sacrebleu import BLEU, CHRF

    return CHRF() if metric == "chrf" else BLEU(tokenize=SACREBLEU_TOKENIZERS[tokenize], effective_order=True)
