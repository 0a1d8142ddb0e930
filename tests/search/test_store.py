"""The store: torn lines, other configs, and two searches at once."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cofitune.errors import ArtifactError, RepairWarning, UserError
from cofitune.files import exclusive
from cofitune.model.region import Region
from cofitune.search.store import open_store, read_trials, with_stored
from cofitune.search.trial import Trial
from cofitune.search.winner import read_winner, write_winner

IDENTITY = {"model": "abc", "train": {"learning_rate": 4e-5, "betas": (0.9, 0.95)}, "data": ["d"]}
FIRST = Trial("a", Region.span(0, 1, ("up_proj",)), "done", 1, 1, 10, 2.0, unified=5.0)
SECOND = replace(FIRST, id="b", region=Region.span(2, 3, ("up_proj",)))
FAILED = replace(SECOND, status="failed", unified=None, reason="no memory")


def test_what_is_appended_is_read_back_in_order(tmp_path: Path) -> None:
    store = open_store(tmp_path, IDENTITY)
    store.append(FIRST)
    store.append(SECOND)
    again = open_store(tmp_path, IDENTITY)
    assert again.trials() == store.trials() == [FIRST, SECOND]
    assert again.get("a") == FIRST
    assert again.get("c") is None
    assert (tmp_path / "trials.jsonl").read_bytes().count(b"\n") == 2


def test_the_latest_line_of_a_trial_counts_and_its_failures_are_counted(tmp_path: Path) -> None:
    store = open_store(tmp_path, IDENTITY)
    for trial in (FAILED, FIRST, FAILED):
        store.append(trial)
    assert open_store(tmp_path, IDENTITY).failures("b") == store.failures("b") == 2
    store.append(SECOND)
    assert store.get("b") == SECOND
    assert open_store(tmp_path, IDENTITY).trials() == [SECOND, FIRST]


def test_a_line_torn_at_any_byte_is_ignored_and_mended_by_the_next_append(tmp_path: Path) -> None:
    whole = (FIRST.to_json() + "\n").encode()
    torn = (replace(SECOND, reason="ü").to_json() + "\n").encode()
    for cut in (0, 1, *range(2, len(torn) - 1, 23), len(torn) - 1):
        folder = tmp_path / str(cut)
        folder.mkdir()
        open_store(folder, IDENTITY)
        (folder / "trials.jsonl").write_bytes(whole + torn[:cut])
        store = open_store(folder, IDENTITY)
        assert store.trials() == [FIRST], cut
        store.append(SECOND)
        assert read_trials(folder / "trials.jsonl") == [FIRST, SECOND], cut


def test_a_store_torn_in_its_very_first_line_is_an_empty_one(tmp_path: Path) -> None:
    open_store(tmp_path, IDENTITY)
    (tmp_path / "trials.jsonl").write_bytes(b'{"id": "a"')
    store = open_store(tmp_path, IDENTITY)
    assert store.trials() == []
    store.append(FIRST)
    assert read_trials(tmp_path / "trials.jsonl") == [FIRST]


def test_a_damaged_line_is_named_left_out_and_taken_away(tmp_path: Path) -> None:
    store = open_store(tmp_path, IDENTITY)
    store.append(FIRST)
    path = tmp_path / "trials.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b"rubbish\n" + SECOND.to_json().encode() + b"\n")
    with pytest.raises(ArtifactError, match=r"trials\.jsonl:2: .*damaged"):
        read_trials(path)
    for repair in (False, True):
        with pytest.warns(RepairWarning, match=r"trials\.jsonl:2: .*damaged.*; that trial is run again"):
            assert open_store(tmp_path, IDENTITY, repair=repair).lines() == [FIRST, SECOND]
    assert path.read_bytes() == whole + SECOND.to_json().encode() + b"\n"


def test_one_changed_digit_is_found(tmp_path: Path) -> None:
    """It could make another trial the winner."""
    for trial in (FIRST, SECOND):
        open_store(tmp_path, IDENTITY).append(trial)
    path = tmp_path / "trials.jsonl"
    text = path.read_text()
    digits = [place for place, character in enumerate(text.partition("\n")[0]) if character.isdigit()]
    for place in digits[::7]:
        path.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
        with pytest.raises(ArtifactError, match=r"trials\.jsonl:1: "):
            read_trials(path)


def test_trials_that_are_gone_beside_their_card_are_told(tmp_path: Path) -> None:
    open_store(tmp_path, IDENTITY).append(FIRST)
    (tmp_path / "trials.jsonl").unlink()
    with pytest.raises(ArtifactError, match=r"trials\.jsonl: is gone, .*--overwrite starts over"):
        open_store(tmp_path, IDENTITY)


def test_another_config_is_refused_and_told_what_differs(tmp_path: Path) -> None:
    open_store(tmp_path, IDENTITY).append(FIRST)
    other = {**IDENTITY, "train": {"learning_rate": 1e-4, "betas": (0.9, 0.95)}, "new": 1}
    with pytest.raises(ArtifactError) as caught:
        open_store(tmp_path, other)
    assert "train.learning_rate is 4e-05 there and 0.0001 here" in str(caught.value)
    assert "new is None there and 1 here" in str(caught.value)
    assert "betas" not in str(caught.value)
    assert read_trials(tmp_path / "trials.jsonl") == [FIRST]


def test_a_damaged_or_missing_card_is_refused(tmp_path: Path) -> None:
    open_store(tmp_path, IDENTITY).append(FIRST)
    (tmp_path / "store.json").write_text('{"version": 99}', encoding="utf-8")
    with pytest.raises(ArtifactError, match="of another version"):
        open_store(tmp_path, IDENTITY)
    (tmp_path / "store.json").unlink()
    with pytest.raises(ArtifactError, match=r"no store\.json"):
        open_store(tmp_path, IDENTITY)


def test_the_same_region_has_the_same_id_whatever_store_object_is_asked(tmp_path: Path) -> None:
    region = Region.span(0, 1, ("up_proj",))
    fresh = open_store(tmp_path, IDENTITY)
    assert fresh.id_of(region) == open_store(tmp_path, IDENTITY).id_of(region) != fresh.id_of(SECOND.region)


def test_two_searches_cannot_hold_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "search"
    refused = pytest.raises(UserError, match=r"another search is writing here \(process \d+\)")
    with exclusive(folder, "search"), refused, exclusive(folder, "search"):
        pass
    with exclusive(folder, "search"):
        pass  # free again


@pytest.mark.processes
def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path: Path) -> None:
    folder = tmp_path / "search"
    code = (
        "import sys, time; from pathlib import Path; from cofitune.files import exclusive\n"
        "with exclusive(Path(sys.argv[1]), 'search'):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("held" in line for line in iter(process.stdout.readline, ""))
        with pytest.raises(UserError, match=f"process {process.pid}"), exclusive(folder, "search"):
            pass
        process.kill()
        process.wait(timeout=300)
    with exclusive(folder, "search"):
        pass


def test_the_lock_outlives_the_emptying_of_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "search"
    folder.mkdir()
    with exclusive(folder, "search"):
        folder.rmdir()
        with pytest.raises(UserError), exclusive(folder, "search"):
            pass


def test_the_winner_is_read_back_as_train_wants_it(tmp_path: Path) -> None:
    path = write_winner(
        tmp_path, replace(FIRST, region=Region.span(8, 15, ("up_proj", "down_proj"))), "because: »x«", "f00"
    )
    assert path == tmp_path / "region.yaml"
    assert read_winner(tmp_path) == ("8-15", ("up_proj", "down_proj"))
    assert read_winner(tmp_path, model="f00") == ("8-15", ("up_proj", "down_proj"))
    text = path.read_text(encoding="utf-8")
    assert "unified: 5.0" in text and "because" in text
    with pytest.raises(ArtifactError, match="another base model"):
        read_winner(tmp_path, model="bad")


def test_a_missing_winner_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no finished search here; run `cofitune search`"):
        read_winner(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "[", "layers: 1-2\n", "modules: [up_proj]\n", "layers: 1-2\nmodules: []\n", "layers: 1-2\nmodules: [upp]\n"],
)
def test_a_damaged_winner_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "region.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match="damaged"):
        read_winner(tmp_path)


def test_the_base_cannot_win(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        write_winner(tmp_path, replace(FIRST, region=None), "", "f00")


def test_trials_of_another_torch_are_refused_and_older_stores_go_on(tmp_path: Path) -> None:
    now = {**IDENTITY, "computed_with": {"device": "cpu", "torch": "2.13.0"}}
    region = Region.span(0, 0, ("up_proj",))
    earlier = open_store(tmp_path / "earlier", IDENTITY)
    assert open_store(tmp_path / "earlier", now).id_of(region) == earlier.id_of(region)
    open_store(tmp_path / "now", now)
    newer = {**IDENTITY, "computed_with": {"device": "cpu", "torch": "2.14.0"}}
    assert with_stored(tmp_path / "now", newer, "computed_with") == now, "for who only looks"
    with pytest.raises(ArtifactError, match=r"computed_with.torch is '2.13.0' there and '2.14.0' here"):
        open_store(tmp_path / "now", newer)
