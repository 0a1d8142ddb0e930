"""What a node does with an errand, here without a cluster and with a light trial."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cofitune.config.load import load_config
from cofitune.config.schema import Config
from cofitune.errors import UserError
from cofitune.executors.ray.node import (
    Errand,
    forget_search,
    measure_errand,
    needed_paths,
    read_files,
    run_errand,
    search_folder,
    write_files,
)
from cofitune.recipes.trial.executor import Order, Outcome

Trial = Callable[[Order, int], Outcome]


@pytest.fixture
def errand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Errand:
    """An order whose search is typed in `here`; the node's temporary folder is `there`."""
    for name in ("here", "there", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "there"))
    monkeypatch.chdir(tmp_path / "here")
    Path("law.jsonl").write_text("{}\n")
    Path("c.yaml").write_text(
        "model: {name: org/name}\ndata: {train: law.jsonl}\noutput_dir: run\n"
        f"eval: {{speciality: [{{path: {tmp_path}/here/law.jsonl, kind: generate, name: there}}]}}\n"
    )
    config = load_config(Path("c.yaml"))
    return Errand(
        id="a",
        search="cofitune-search",
        config=config.model_dump(mode="json"),
        train=True,
        until=None,
        cwd=str(tmp_path / "here"),
        needs=needed_paths(config),
        begin=True,
        ranks=2,
        environment={"COFITUNE_SEEN": "1"},
        files={"eval/cache/key/answers.jsonl": b"the base's"},
    )


def trial(order: Order, ranks: int) -> Outcome:
    """Leaves what a trial leaves; a second part finds what the first left."""
    cached = order.folder / "eval" / "cache" / "key" / "answers.jsonl"
    assert cached.read_text() == "the base's" and ranks == 2 and order.config.output_dir == str(order.folder)
    for name in ("train/delta.safetensors", "train/checkpoints/1/rank0.json", "eval/scores.json", "trial.log"):
        (order.folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (order.folder / name).open("a") as file:
            file.write(f"{order.until} ")
    return Outcome(order, "no memory" if order.id == "broken" else None, {"train": 1.0})


def test_what_the_search_reads_comes_back_and_nothing_stays(errand: Errand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COFITUNE_SEEN", "0")
    report = run_errand(errand, trial)
    assert (report.error, report.seconds) == (None, {"train": 1.0})
    assert sorted(report.files) == ["eval/cache/key/answers.jsonl", "eval/scores.json", "trial.log"]
    assert report.folder == str(search_folder("cofitune-search") / "a") and not Path(report.folder).exists()


def test_a_paused_trial_finds_its_state_and_a_lost_attempts_litter_is_swept(errand: Errand) -> None:
    first = run_errand(replace(errand, until=3), trial)
    assert (Path(first.folder) / "train/checkpoints").exists()
    second = run_errand(replace(errand, until=5, begin=False), trial)
    assert second.files["eval/scores.json"] == b"3 5 "
    assert run_errand(replace(errand, until=3), trial).files["eval/scores.json"] == b"3 ", "begun anew"
    forget_search(errand.search)
    assert not search_folder(errand.search).exists()


def test_a_trial_that_fails_names_its_node_and_leaves_nothing(errand: Errand) -> None:
    report = run_errand(replace(errand, id="broken", until=3), trial)
    assert report.error == f"on {socket.gethostname()}: no memory"
    assert report.files["trial.log"] == b"3 " and not Path(report.folder).exists()


def test_a_node_without_the_data_fails_the_trial_and_is_named(errand: Errand) -> None:
    assert errand.needs == (f"{errand.cwd}/law.jsonl",), "a name on the hub is no path, nor is a task's title"
    Path("law.jsonl").unlink()
    report = run_errand(errand, trial)
    assert report.error is not None
    assert report.error.startswith(f"{socket.gethostname()} has not {errand.cwd}/law.jsonl: data and model must lie")


def test_relative_paths_start_where_the_search_was_typed(
    errand: Errand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(order: Order, ranks: int) -> Outcome:
        assert Path(order.config.data.train[0].path).exists()
        return trial(order, ranks)

    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run_errand(errand, look).error is None


def test_a_trial_is_measured_on_its_ranks_where_the_data_is(errand: Errand, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("cofitune.executors.local.measure_trial", lambda config, ranks: asked.append((config, ranks)))
    measure_errand(errand)
    ((config, ranks),) = asked
    assert config.output_dir.endswith("/cofitune-search/a") and ranks.options == ("--num-processes", "2")
    Path("law.jsonl").unlink()
    with pytest.raises(UserError, match="has not"):
        measure_errand(errand)


def test_a_config_arrives_as_it_was_sent(errand: Errand) -> None:
    assert Config.model_validate(errand.config) == load_config(Path("c.yaml"))


def test_files_are_written_whole_and_the_scores_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr("cofitune.executors.ray.node.write_atomically", lambda path, _: written.append(path.name))
    write_files(tmp_path, {"eval/scores.json": b"", "trial.log": b"", "eval/a": b"", "train/metrics.jsonl": b""})
    assert written == ["a", "metrics.jsonl", "trial.log", "scores.json"]
    monkeypatch.undo()
    (tmp_path / "eval").mkdir(parents=True)
    (tmp_path / "eval/w.safetensors").write_bytes(b"heavy")
    write_files(tmp_path, {"eval/b/c": b"\x00\xff"})
    assert read_files(tmp_path, ("eval/**/*",)) == {"eval/b/c": b"\x00\xff"}
