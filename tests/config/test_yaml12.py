"""YAML as people write it: scalars of 1.2, aliases, merges, tags, odd keys; each mistake one message with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cofitune.config.load import dump_config, load_config
from cofitune.config.override import parse_value
from cofitune.errors import ConfigError

SMALLEST = "model: {name: some/model}\noutput_dir: runs/x\n"


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    path = folder / "c.yaml"
    path.write_text(SMALLEST + text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    return [problem.removeprefix(f"{path}:") for problem in caught.value.problems]


def load(folder: Path, text: str, *overrides: str) -> Any:
    path = folder / "c.yaml"
    path.write_text(SMALLEST + text, encoding="utf-8")
    return load_config(path, list(overrides))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("+7", 7),
        ("-0", 0),
        ("1:3", "1:3"),
        ("1:30.5", "1:30.5"),
        ("1_000", "1_000"),
        ("2024-01-02", "2024-01-02"),
        ("=", "="),
        ("-.inf", float("-inf")),
        ("!!int '7'", 7),
        ("!!float 7", 7.0),
        ("!!str 7", "7"),
        ("!!bool true", True),
    ],
)
def test_numbers_are_read_as_yaml_1_2_has_them(text: str, value: Any) -> None:
    read = parse_value(text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("train: {learning_rate: !foo 1e-3}\n", "3: not valid YAML: a config has no tags, such as !foo"),
        ("train: {seed: !!int x}\n", "3: not valid YAML: 'x' is not a whole number"),
        ("train: {seed: !!bool 3}\n", "3: not valid YAML: '3' is not true or false"),
        ("train: !!set {a, b}\n", "3: not valid YAML: a config has no tags, such as !!set"),
        ("train: !!binary aGk=\n", "3: not valid YAML: a config has no tags, such as !!binary"),
        ("train: {seed: " + "9" * 5000 + "}\n", "3: not valid YAML: a number of 5,000 digits is too large"),
        ("train: {<<: x}\n", "3: << in train takes in a mapping"),
        ("search: &a {eval: *a}\n", "3: search.eval contains itself through an alias"),
        ("search: &a [*a]\n", "3: search.0 contains itself through an alias"),
        ("? [a, b]\n: 1\n", "3: a key of the config must be a text, not a list"),
        ("? {a: 1}\n: 1\n", "3: a key of the config must be a text, not a mapping"),
        ("train: { {a: 1}: 1}\n", "3: a key of train must be a text, not a mapping"),
        ("1: x\n", "3: a key of the config must be a text, not '1'; put it in quotes"),
        ("train: {null: x}\n", "3: a key of train must be a text, not 'null'"),
        ("train: {seed: {{ seed }}}\n", "3: {{ … }} is a placeholder that nothing fills in here"),
        ("train: {{ a }}/x\n", "3: not valid YAML: .*{{ … }} is a placeholder"),
        ("data: {train: ${HOME}/x}\n", "3: not valid YAML: .*a text with .* stands in quotes"),
        ("train: " + "[" * 100 + "]" * 100 + "\n", r"3: train.0.0… is nested more than 50 deep"),
        ("train: " + "[" * 20_000, "nested too deeply"),
        ("train: {seed: \0}\n", "not valid YAML: unacceptable character"),
        ("--- {}\n", "3: not valid YAML: but found another document"),
        ("train: *nothing\n", "3: not valid YAML: found undefined alias"),
    ],
)
def test_what_a_config_cannot_hold_has_its_line(tmp_path: Path, text: str, place: str) -> None:
    import re

    result = problems(tmp_path, text)
    assert any(re.search(place.replace("{{", r"\{\{").replace("}}", r"\}\}").replace("(", r"\("), p) for p in result), (
        result
    )


def test_a_mistake_is_told_once(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, "train: {<<: [1, 2]}\n")
    assert "3: << in train takes in a mapping" in problem


def test_an_empty_output_dir_is_refused(tmp_path: Path) -> None:
    assert (
        "override 'output_dir=''': output_dir: must not be empty (given: '')"
        in problems(tmp_path, "", "output_dir=''")[0]
    )


def test_an_alias_bomb_ends_at_once(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
    assert any("the aliases stand for more than 50,000 entries" in problem for problem in problems(tmp_path, bomb))


def test_an_override_changes_one_use_of_an_alias(tmp_path: Path) -> None:
    text = "eval: {speciality: &t {path: a.jsonl, kind: generate}, versatility: {gen_kn: *t}}\n"
    config = load(tmp_path, text, "eval.speciality.path=b.jsonl")
    assert config.eval.speciality[0].path == "b.jsonl"
    assert config.eval.versatility.gen_kn[0].path == "a.jsonl"


def test_a_merge_fills_in_and_keeps_its_lines(tmp_path: Path) -> None:
    base = "train: &t {seed: 7, max_steps: 3}\n"
    config = load(tmp_path, "search: {eval: &e {limit: 5, batch_size: 2}}\neval: {<<: *e, batch_size: 4}\n")
    assert (config.eval.limit, config.eval.batch_size) == (5, 4)
    (problem,) = problems(tmp_path, f"{base}search: {{<<: *t, train_steps: 3}}\n", "search.max_steps=1")[:1]
    assert problem.startswith("3: search.seed: unknown key")


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "'nan'", "1e400"])
def test_rates_are_finite(tmp_path: Path, value: str) -> None:
    (problem,) = problems(tmp_path, f"train: {{weight_decay: {value}}}\n")
    assert problem.startswith("3: train.weight_decay: must be a finite number")


@pytest.mark.parametrize("value", ["18446744073709551616", "'99999999999999999999'", "0xFFFFFFFFFFFFFFFF"])
def test_seeds_stay_below_what_generators_take(tmp_path: Path, value: str) -> None:
    (problem,) = problems(tmp_path, f"train: {{seed: {value}}}\n")
    assert problem.startswith("3: train.seed: must be a whole number below 2^63")


def test_numbers_in_raw_are_checked_too(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, "deepspeed: {raw: {zero_optimization: {reduce_bucket_size: .inf}}}\n")
    assert "deepspeed.raw.zero_optimization.reduce_bucket_size: must be a finite number" in problem


@pytest.mark.parametrize("name", [r'"\0"', r'"a\ud83d"'])
def test_texts_that_no_path_can_hold(tmp_path: Path, name: str) -> None:
    (problem,) = problems(tmp_path, f"data: {{train: {name}}}\n")
    assert problem.startswith("3: data.train: holds a character that no text can hold")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {seed: many}", "3: train.seed: must be a whole number (given: 'many')"),
        ("train: {seed: 1.5}", "must be a whole number (given: 1.5)"),
        ("train: {gradient_checkpointing: perhaps}", "must be true or false (given: 'perhaps')"),
        ("train: {learning_rate: [1]}", "must be a number (given: [1])"),
        ("train: 3", "3: train: must be a section with keys (given: 3) (accepted: learning_rate,"),
        (
            "search: {levels: [mha]}",
            "3: search.levels.0: must be a section with keys (given: 'mha')",
        ),
        ("search: {levels: 3}", "3: search.levels: must be a list (given: 3)"),
        ("region: 3", "3: region: must be a section with keys (given: 3)"),
        ("region: {modules: []}", "must have 1 or more entries"),
        ("softmask: {importance: '${NOT_SET_HERE}'}", "softmask.importance: ${NOT_SET_HERE}: the variable"),
        ("model: 3", "model is written twice"),
        ("compare: {methods: {a: 3}}", "compare.methods.a: must be a text (given: 3); put it in quotes"),
        ("deepspeed: {raw: 3}", "deepspeed.raw: must be a mapping of names (given: 3)"),
    ],
)
def test_messages_are_in_our_words(tmp_path: Path, text: str, message: str) -> None:
    result = problems(tmp_path, text + "\n")
    assert any(message in problem for problem in result), result
    assert not any("nput should" in problem or "alid dict" in problem for problem in result)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train..seed=1", "write it as section.key=value"),
        ("data.train.².path=1", "data.train.² is no section"),
        ("train.seed={{ x }}", "the value is not valid YAML"),
        ("train.seed=!foo 1", "the value is not valid YAML: a config has no tags"),
        (".".join("a" * 200) + "=1", "no setting lies 200 deep"),
        (
            "train.seed=18446744073709551616",
            "override 'train.seed=18446744073709551616': train.seed: must be a whole number below 2^63",
        ),
    ],
)
def test_an_odd_override_is_one_message(tmp_path: Path, override: str, message: str) -> None:
    result = problems(tmp_path, "data: {train: [{path: a.jsonl}]}\n", override)
    assert any(message in problem for problem in result), result


def test_paths_take_home_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/big")
    text = (
        "data: {train: ['~/a.jsonl', {path: '${SCRATCH}/b.jsonl'}]}\n"
        "eval: {data: /d, models: ['full=~/full@0.5'], speciality: {path: '~/t.jsonl', kind: generate}}\n"
        "train: {drift_data: '${SCRATCH}/r'}\n"
    )
    config = load(tmp_path, text, "output_dir=${SCRATCH}/runs", "model.name=~/m")
    assert [source.path for source in config.data.train] == ["/home/me/a.jsonl", "/big/b.jsonl"]
    assert (config.output_dir, config.model.name, config.train.drift_data) == ("/big/runs", "/home/me/m", "/big/r")
    assert config.eval.models[0].path == "/home/me/full" and config.eval.speciality[0].path == "/home/me/t.jsonl"
    (tmp_path / "again.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml") == config
    (tmp_path / "suite.yaml").write_text("eval: {speciality: {path: a.jsonl, kind: generate}}\n")
    monkeypatch.setenv("SUITES", str(tmp_path))
    assert load(tmp_path, "eval: {suite: '${SUITES}/suite.yaml'}\n").eval.speciality[0].path == "a.jsonl"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("'${NOT_SET_HERE}/a'", "the variable NOT_SET_HERE is not set"),
        ("'${}/a'", "${} is no variable; write ${NAME}"),
        ("'${A:-b}/a'", "${A:-b} is no variable; write ${NAME}"),
        ("'a/${A'", "${A is no variable; write ${NAME}"),
        ("$HOME/a", "write ${HOME} for the variable's value"),
        ("'{{ root }}/a'", "is a placeholder that nothing fills in here"),
    ],
)
def test_a_path_that_a_shell_would_not_take(tmp_path: Path, path: str, message: str) -> None:
    for text in (f"data: {{train: {path}}}", f"eval: {{suite: {path}}}"):
        assert any(message in problem for problem in problems(tmp_path, f"{text}\n"))


def test_other_dollars_and_tildes_stay(tmp_path: Path) -> None:
    assert load(tmp_path, "data: {train: 'a$.jsonl'}\n").data.train[0].path == "a$.jsonl"
    assert load(tmp_path, "data: {train: '~backup~.jsonl'}\n").data.train[0].path == "~backup~.jsonl"
