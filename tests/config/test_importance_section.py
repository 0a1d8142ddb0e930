"""What the sections `importance` and `softmask` accept."""

from __future__ import annotations

from pathlib import Path

import pytest

from cofitune.config.load import load_config
from cofitune.config.schema import Config
from cofitune.errors import ConfigError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text("model: {name: m}\noutput_dir: run\nimportance: {data: general.jsonl}\nsoftmask: {}\n")
    return file


def read(path: Path, *overrides: str) -> Config:
    return load_config(path, list(overrides))


@pytest.mark.parametrize(
    ("estimator", "reduce", "normalize", "reduced_by", "normalized_by"),
    [
        ("kl_dropout", None, None, "signed", "zscore_tanh"),
        ("kl_dropout", "signed", "rank", "signed", "rank"),
        ("kl_dropout", "absolute", None, "absolute", "rank"),
        ("kl_dropout", "absolute", "rank", "absolute", "rank"),
        ("fisher", None, None, "squared", "rank"),
        ("fisher", "squared", "rank", "squared", "rank"),
        ("wanda", None, None, "squared", "rank"),
        ("kl_dropout", "absolute", "zscore_tanh", None, "whose scores are never negative"),
        ("fisher", None, "zscore_tanh", None, "whose scores are never negative"),
        ("kl_dropout", "squared", None, None, "squared does not fit estimator: kl_dropout"),
        ("fisher", "signed", None, None, "signed does not fit estimator: fisher"),
        ("wanda", "signed", None, None, "signed does not fit estimator: wanda"),
        ("wanda", "squared", "zscore_tanh", None, "zscore_tanh does not fit reduce: squared"),
        ("fisher", "absolute", "rank", None, "absolute does not fit estimator: fisher"),
    ],
)
def test_each_estimator_has_reductions_and_each_of_them_normalisations(
    path: Path, estimator: str, reduce: str | None, normalize: str | None, reduced_by: str | None, normalized_by: str
) -> None:
    given = {"estimator": estimator, "reduce": reduce, "normalize": normalize}
    overrides = [f"importance.{key}={value}" for key, value in given.items() if value is not None]
    if reduced_by is None:
        with pytest.raises(ConfigError) as refused:
            read(path, *overrides)
        (problem,) = refused.value.problems
        assert "importance: " in problem and normalized_by in problem
    else:
        requested = read(path, *overrides).importance
        assert (requested.reduced_by, requested.normalized_by) == (reduced_by, normalized_by)


@pytest.mark.parametrize(
    ("override", "place", "message"),
    [
        ("importance.data=[{path: a.jsonl, weight: 2}]", "importance.data", "importance counts every item once"),
        ("importance.reduce=mean", "importance.reduce", "'signed', 'absolute' or 'squared'"),
        ("importance.normalize=softmax", "importance.normalize", "'zscore_tanh' or 'rank'"),
        ("importance.estimator=taylor", "importance.estimator", "'kl_dropout', 'fisher' or 'wanda'"),
        ("importance.passes=3", "importance.passes", "2"),
        ("importance={data: g.jsonl, passes: 4}", "importance", "passes: 4 is for estimator: kl_dropout"),
        ("importance={data: g.jsonl, dropout: 0.1}", "importance", "Say estimator: kl_dropout, or leave it out"),
        ("importance={data: g.jsonl, estimator: wanda, dropout: 0.1}", "importance", "wanda drops nothing"),
        ("softmask.axis=heads", "softmask.axis", "'rows' or 'columns'"),
        ("importance.reduce=signed", "importance", "does not fit estimator: fisher"),
        ("importance.dropout=0", "importance.dropout", "must be above 0"),
        ("importance.dropout=1", "importance.dropout", "must be below 1"),
        ("importance.sharding=zero2", "importance.sharding", "'auto', 'none' or 'zero3'"),
        ("softmask.strength=0", "softmask.strength", "must be above 0"),
        ("softmask.strength=-0.5", "softmask.strength", "must be above 0"),
        ("softmask.strength=1.01", "softmask.strength", "must be at most 1"),
        ("softmask.threshold=0", "softmask.threshold", "must be above 0"),
        ("softmask={apply_to: none, threshold: 0.9}", "softmask", "asks for no mask"),
        ("softmask.apply_to=weights", "softmask.apply_to", "'update', 'gradient' or 'none'"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_path(path: Path, override: str, place: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read(path, override)
    (problem,) = refused.value.problems
    assert place in problem and message in problem


def test_strength_and_weight_at_the_edge_of_what_makes_sense(path: Path) -> None:
    config = read(path, "softmask.strength=1e-3", "importance.data=[{path: a.jsonl, weight: 1}]")
    assert config.softmask.strength == 0.001
    assert read(path).softmask.strength == 1.0
    assert [source.path for source in config.importance.data] == ["a.jsonl"]
