"""Tests of scripts/demo_data.py: what the demo's data sets promise to the tools that read them."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "demo_data.py"
MINIMUM = {
    "ledger_train": 600,
    "ledger_dev": 48,
    "ledger_test": 120,
    "gen_kn": 80,
    "gen_kn_dev": 40,
    "gen_rs": 80,
    "gen_rs_dev": 40,
    "instruct": 48,
    "instruct_dev": 16,
    "instruct_other": 110,
    "general_train": 200,
    "general_prompts": 580,
}
LEDGER = ("ledger_train", "ledger_dev", "ledger_test")
CHOICE = ("gen_kn", "gen_kn_dev", "gen_rs", "gen_rs_dev")
INSTRUCT = ("instruct", "instruct_dev", "instruct_other")
LINE = re.compile(
    r"(0[1-9]|1[0-2])-(0[1-9]|1\d|2[0-8])\|"
    r"(MEALS|TRAVEL|LODGING|OFFICE|SOFTWARE|POSTAGE|TRAINING)\|"
    r"([1-9]\d*\.\d\d)\|(EUR|USD|GBP|CHF|SEK)"
)

Sets = dict[str, list[dict[str, Any]]]


def _load_script() -> ModuleType:
    """Imports the script by its path; scripts/ is not a package, and the script finds its neighbour like any script."""
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("demo_data", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_data"] = module  # NamedTuple looks its module up
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return module


demo_data = _load_script()


def _read(folder: Path) -> Sets:
    """Every data set in ``folder`` by file stem."""
    return {
        path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in folder.glob("*.jsonl")
    }


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Sets:
    """The data sets of the default seed, read back from their files."""
    folder = tmp_path_factory.mktemp("demo")
    assert demo_data.main(["--to", str(folder)]) == 0
    return _read(folder)


def _users(items: list[dict[str, Any]]) -> list[str]:
    """What the user says in the conversations ``items``."""
    return [message["content"] for item in items for message in item["messages"] if message["role"] == "user"]


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two", "other"):
        demo_data.main(["--to", str(tmp_path / name), "--seed", "8" if name == "other" else "7"])
    one = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    two = {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    other = {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    assert one == two
    assert one.keys() == other.keys()
    assert one["ledger_train.jsonl"] != other["ledger_train.jsonl"]


def test_writing_again_replaces_the_files_and_leaves_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "gen_kn.jsonl").write_text("old\n")
    demo_data.main(["--to", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {f"{stem}.jsonl" for stem in MINIMUM}
    assert len(_read(tmp_path)["gen_kn"]) >= MINIMUM["gen_kn"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text("old\n")

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(demo_data.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        demo_data.write_jsonl(path, [{"a": 1}])
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("stem", MINIMUM)
def test_there_are_enough_items(sets: Sets, stem: str) -> None:
    assert sets.keys() == MINIMUM.keys()
    assert len(sets[stem]) >= MINIMUM[stem]


def test_the_general_items_do_not_depend_on_the_seed(sets: Sets) -> None:
    """A new seed must not move a test item into a dev file."""
    other = demo_data.build(99)
    for stem in CHOICE:
        assert {item["question"] for item in sets[stem]} == {item["question"] for item in other[stem]}
    for stem in INSTRUCT:
        assert sets[stem] == other[stem]
    assert sets["general_prompts"] != other["general_prompts"]
    assert sorted(_texts(sets["general_prompts"])) == sorted(_texts(other["general_prompts"]))


def test_no_text_is_in_two_files_or_twice_in_one(sets: Sets) -> None:
    texts = [item["input"] for stem in LEDGER for item in sets[stem]]
    texts += [item["question"] for stem in CHOICE for item in sets[stem]]
    texts += [item["prompt"] for stem in (*INSTRUCT, "general_prompts") for item in sets[stem]]
    # A follow-up question may recur among the conversations, an opening question may not.
    texts += [item["messages"][0]["content"] for item in sets["general_train"]]
    assert [text for text, count in Counter(text.casefold() for text in texts).items() if count > 1] == []
    general = {text.casefold() for text in _users(sets["general_train"])}
    tested = {item["question"].casefold() for stem in CHOICE for item in sets[stem]}
    tested |= {item["prompt"].casefold() for stem in INSTRUCT for item in sets[stem]}
    assert general & tested == set()


def _texts(items: list[dict[str, Any]]) -> list[str]:
    """What the items ask, whatever the format of their file."""
    return [item[field] for item in items for field in ("input", "question", "prompt") if field in item]


def _words(text: str) -> list[str]:
    """The words of a text without case and punctuation."""
    return re.sub(r"[\W_]+", " ", text.casefold()).split()


def _runs(text: str, length: int) -> set[tuple[str, ...]]:
    """Every run of ``length`` words; a shorter text counts as one run."""
    words = _words(text)
    return {tuple(words[place : place + length]) for place in range(max(1, len(words) - length + 1))}


@pytest.mark.parametrize("new", ["general_prompts", "instruct_other"])
def test_a_new_prompt_resembles_no_prompt_of_another_file(sets: Sets, new: str) -> None:
    """Else the test would measure how well a rehearsed sentence is known, not what is kept."""
    others = {text for stem in (*LEDGER, *CHOICE, *INSTRUCT) if stem != new for text in _texts(sets[stem])}
    if new == "instruct_other":
        others |= {*_texts(sets["general_prompts"]), *_users(sets["general_train"])}
    runs = {run for text in others for run in _runs(text, 8)}
    prompts = _texts(sets[new])
    assert [prompt for prompt in prompts if _runs(prompt, 8) & runs] == []
    words = {text: set(_words(text)) for text in {*others, *prompts}}
    alike = ((one, two) for one in prompts for two in others if len(words[one] & words[two]) > 0.7 * len(words[two]))
    assert [(one, two) for one, two in alike if len(words[one] & words[two]) > 0.7 * len(words[one])] == []


def test_general_prompts_are_short_and_distinct(sets: Sets) -> None:
    prompts = _texts(sets["general_prompts"])
    assert all(item.keys() == {"prompt"} for item in sets["general_prompts"])
    assert len({" ".join(_words(prompt)) for prompt in prompts}) == len(prompts)
    lengths = [len(prompt.split()) for prompt in prompts]
    assert max(lengths) <= 45
    assert sum(length >= 8 for length in lengths) >= 0.9 * len(lengths)
    assert all(prompt.strip() == prompt and not re.search(r"\{\d|\n|  |\|", prompt) for prompt in prompts)


def test_general_prompts_cover_every_kind_of_ifeval() -> None:
    registry = pytest.importorskip("lm_eval.tasks.ifeval.instructions_registry")
    kinds = demo_data.demo_prompts.prompts_by_kind()
    assert set(registry.INSTRUCTION_DICT) <= kinds.keys()
    assert all(len(prompts) >= 8 for prompts in kinds.values())
    ruled = sum(len(kinds[kind]) for kind in demo_data.demo_prompts.RULED)
    assert 0.45 <= ruled / sum(map(len, kinds.values())) <= 0.55


@pytest.mark.parametrize("count", [60, 150, 300])
def test_every_beginning_of_the_general_prompts_is_balanced(sets: Sets, count: int) -> None:
    first = set(_texts(sets["general_prompts"])[:count])
    for kind, prompts in demo_data.demo_prompts.prompts_by_kind().items():
        share = len(prompts) * count / len(sets["general_prompts"])
        assert abs(len(first.intersection(prompts)) - share) <= 2, kind


def test_the_other_instructions_are_sound_and_of_further_kinds(sets: Sets) -> None:
    pytest.importorskip("lm_eval")
    grade = pytest.importorskip("cofitune.evaluation.ifeval")
    for item in sets["instruct_other"]:
        checks = {key: item[key] for key in ("key", "prompt", "instruction_id_list", "kwargs")}
        assert grade.ifeval_problem(checks) is None
        assert not grade.needs_punkt(checks)
        for answer in ("", "05-12|OFFICE|12.00|EUR", "07-24|TRAINING|166.81|USD"):  # of a model that has forgotten all
            assert not grade.follows_instructions(checks, answer), item
    kinds = {stem: {name for item in sets[stem] for name in item["instruction_id_list"]} for stem in INSTRUCT}
    assert kinds["instruct_other"] > kinds["instruct"] | kinds["instruct_dev"]


@pytest.mark.parametrize("stem", LEDGER)
def test_ledger_lines_are_strict_and_follow_from_the_note(sets: Sets, stem: str) -> None:
    signs = {"€": "EUR", "$": "USD", "£": "GBP", "euros": "EUR", "dollars": "USD", "pounds": "GBP"}
    signs |= {"Swiss francs": "CHF", "Swedish kronor": "SEK"} | {code: code for code in demo_data.CURRENCIES}
    for item in sets[stem]:
        assert item.keys() == {"instruction", "input", "output"}
        match = LINE.fullmatch(item["output"])
        assert match is not None, item
        month, day, category, amount, currency = match.groups()
        note = item["input"]
        name = demo_data.MONTHS[int(month) - 1]
        month_name = rf"(?:{name}|{name[:3]})"
        before, after = rf"\b{month_name} (\d+)", rf"(\d+)(?:st|nd|rd|th)?(?: of)? {month_name}\b"
        days = re.findall(before, note) + re.findall(after, note)
        assert str(int(day)) in days, item
        whole, cents = amount.split(".")
        ways = {f"{whole}.{cents}", f"{whole},{cents}"} | ({whole} if cents == "00" else set())
        assert ways & set(re.findall(r"\d+(?:[.,]\d\d)?", note)), item
        assert {code for sign, code in signs.items() if sign in note} == {currency}, item
        bought = {kind for kind, things in demo_data.CATEGORIES.items() for t in things if _contains(note, t)}
        assert category in bought, item


def _contains(note: str, thing: str) -> bool:
    """Whether the note names the thing, as whole words and in either case."""
    return re.search(rf"\b{re.escape(thing)}\b", note, flags=re.IGNORECASE) is not None


def test_the_ledger_test_needs_generalisation(sets: Sets) -> None:
    train = "\n".join(item["input"] for item in sets["ledger_train"])
    for word in (*demo_data.NAMES_TEST, *demo_data.PAYEES_TEST):
        assert not _contains(train, word)
        assert any(_contains(item["input"], word) for item in sets["ledger_test"])
    held_out = [things[-1] for things in demo_data.CATEGORIES.values()]
    assert not any(_contains(train, thing) for thing in held_out)
    assert any(_contains(item["input"], thing) for item in sets["ledger_test"] for thing in held_out)


def test_the_train_file_knows_every_month_category_and_currency(sets: Sets) -> None:
    for stem in ("ledger_train", "ledger_test"):
        lines = [item["output"].split("|") for item in sets[stem]]
        assert len({line[0][:2] for line in lines}) == 12
        assert {line[1] for line in lines} == set(demo_data.CATEGORIES)
        assert {line[3] for line in lines} == set(demo_data.CURRENCIES)


@pytest.mark.parametrize("stem", CHOICE)
def test_choices_are_distinct_and_answers_balanced(sets: Sets, stem: str) -> None:
    for item in sets[stem]:
        assert item.keys() == {"question", "choices", "answer"}
        assert item["question"].strip() == item["question"] != ""
        assert len(item["choices"]) == 4 == len({choice.casefold() for choice in item["choices"]})
        assert all(choice.strip() == choice != "" for choice in item["choices"])
        assert item["answer"] in range(4)
    counts = Counter(item["answer"] for item in sets[stem])
    assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("stem", INSTRUCT)
def test_every_instruction_has_a_checker(sets: Sets, stem: str) -> None:
    pytest.importorskip("lm_eval")
    registry = pytest.importorskip("lm_eval.tasks.ifeval.instructions_registry")
    utils = pytest.importorskip("lm_eval.tasks.ifeval.utils")
    for item in sets[stem]:
        assert item.keys() == {"key", "prompt", "instruction_id_list", "kwargs"}
        assert len(item["instruction_id_list"]) == len(item["kwargs"]) > 0
        for name, kwargs in zip(item["instruction_id_list"], item["kwargs"], strict=True):
            checker = registry.INSTRUCTION_DICT[name](name)
            checker.build_description(**kwargs)
            # A checker draws what is missing at random, so every argument has to be given, and as it was meant.
            assert (checker.get_instruction_args() or {}) == _in_order(kwargs)
        assert set(utils.process_results(item, ["A reply."])) >= {"prompt_level_strict_acc"}


def _in_order(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments as the checkers keep them: lists of words are sorted."""
    return {key: sorted(value) if isinstance(value, list) else value for key, value in kwargs.items()}


def test_instruction_keys_are_unique(sets: Sets) -> None:
    keys = [item["key"] for stem in INSTRUCT for item in sets[stem]]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    ("text", "name", "kwargs"),
    [
        ("no_comma", "punctuation:no_comma", {}),
        ("words<40", "length_constraints:number_words", {"num_words": 40, "relation": "less than"}),
        ("words>=20", "length_constraints:number_words", {"num_words": 20, "relation": "at least"}),
        ("freq=sea>=2", "keywords:frequency", {"keyword": "sea", "frequency": 2, "relation": "at least"}),
        ("letter=z<3", "keywords:letter_frequency", {"letter": "z", "let_frequency": 3, "let_relation": "less than"}),
        ("banned=cold,white", "keywords:forbidden_words", {"forbidden_words": ["cold", "white"]}),
        ("bullets=3", "detectable_format:number_bullet_lists", {"num_bullets": 3}),
        ("end=That is all.", "startend:end_checker", {"end_phrase": "That is all."}),
        ("section=Act:2", "detectable_format:multiple_sections", {"section_spliter": "Act", "num_sections": 2}),
        (
            "first=2:1:Tea",
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "tea"},
        ),
    ],
)
def test_the_notation_of_the_checks(text: str, name: str, kwargs: dict[str, Any]) -> None:
    assert demo_data._check(text) == (name, kwargs)


def test_conversations_alternate_and_end_with_the_assistant(sets: Sets) -> None:
    lengths = Counter(len(item["messages"]) for item in sets["general_train"])
    assert set(lengths) == {2, 4}
    assert lengths[4] >= 15
    for item in sets["general_train"]:
        assert item.keys() == {"messages"}
        for place, message in enumerate(item["messages"]):
            assert message["role"] == ("user", "assistant")[place % 2]
            assert message["content"].strip() == message["content"] != ""
            assert "\\n" not in message["content"]


def test_prompts_are_english_and_no_identifiers() -> None:
    """A renaming of code once went through the prompts: `BatchSharding one surprising fact with me`."""
    prompts = [p for kind in demo_data.demo_prompts.prompts_by_kind().values() for p in kind]
    words = {word for prompt in prompts for word in re.findall(r"\w*[a-z][A-Z]\w*|[A-Za-z]+_[A-Za-z]\w*", prompt)}
    assert len(prompts) > 300
    assert words == {"JavaScript"}
