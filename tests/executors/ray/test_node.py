"""What a node does with an errand, here without a cluster and with a light trial."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cofitune.config.load import load_config
from cofitune.errors import UserError
from cofitune.executors.ray.node import (
    RemoteTrial,
    forget_search,
    measure_errand,
    needed_paths,
    read_files,
    run_errand,
    search_folder,
    write_files,
)
from cofitune.recipes.trial.executor import TrialRequest, TrialResult

Trial = Callable[[TrialRequest, int], TrialResult]


@pytest.fixture
def errand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemoteTrial:
    """A request whose search is typed in `here`; the node's temporary folder is `there`."""
    for name in ("here", "there", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "there"))
    monkeypatch.chdir(tmp_path / "here")
    Path("law.jsonl").write_text("{}\n")
    Path("c.yaml").write_text(
        "model: {name: org/name}\ndata: {train: law.jsonl}\noutput_dir: run\n"
        f"eval: {{speciality: [{{path: {tmp_path}/here/law.jsonl, kind: generate, name: there}}]}}\n"
    )
    request = TrialRequest("a", load_config(Path("c.yaml")), Path("run"))
    return RemoteTrial(
        search="cofitune-search",
        request=request.to_json(),
        cwd=str(tmp_path / "here"),
        needs=needed_paths(request),
        begin=True,
        ranks=2,
        environment={"COFITUNE_SEEN": "1"},
        files={"eval/cache/key/answers.jsonl": b"the base's"},
    )


def asked(errand: RemoteTrial, **update: Any) -> RemoteTrial:
    """The same with other fields of its request."""
    return replace(errand, request=errand.request | update)


def trial(request: TrialRequest, ranks: int) -> TrialResult:
    """Leaves what a trial leaves; a second part finds what the first left."""
    cached = request.folder / "eval" / "cache" / "key" / "answers.jsonl"
    assert cached.read_text() == "the base's" and ranks == 2 and request.config.output_dir == str(request.folder)
    for name in ("train/delta.safetensors", "train/checkpoints/1/rank0.json", "eval/scores.json", "trial.log"):
        (request.folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (request.folder / name).open("a") as file:
            file.write(f"{request.stop_step} ")
    return TrialResult(request, "no memory" if request.id == "broken" else None, {"train": 1.0})


def test_what_the_search_reads_comes_back_and_nothing_stays(
    errand: RemoteTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COFITUNE_SEEN", "0")
    report = run_errand(errand, trial)
    assert (report.result["error"], report.result["seconds"]) == (None, {"train": 1.0})
    assert sorted(report.files) == ["eval/cache/key/answers.jsonl", "eval/scores.json", "trial.log"]
    assert report.folder == str(search_folder("cofitune-search") / "a") and not Path(report.folder).exists()


def test_a_paused_trial_finds_its_state_and_a_lost_attempts_is_removed(errand: RemoteTrial) -> None:
    first = run_errand(asked(errand, stop_step=3), trial)
    assert (Path(first.folder) / "train/checkpoints").exists()
    second = run_errand(replace(asked(errand, stop_step=5), begin=False), trial)
    assert second.files["eval/scores.json"] == b"3 5 "
    assert run_errand(asked(errand, stop_step=3), trial).files["eval/scores.json"] == b"3 ", "begun anew"
    forget_search(errand.search)
    assert not search_folder(errand.search).exists()


def test_a_trial_that_fails_names_its_node_and_leaves_nothing(errand: RemoteTrial) -> None:
    report = run_errand(asked(errand, id="broken", stop_step=3), trial)
    assert report.result["error"] == f"on {socket.gethostname()}: no memory"
    assert report.files["trial.log"] == b"3 " and not Path(report.folder).exists()


def test_a_node_without_the_data_fails_the_trial_and_is_named(errand: RemoteTrial) -> None:
    assert errand.needs == (f"{errand.cwd}/law.jsonl",), "a name on the hub is no path, nor is a task's title"
    Path("law.jsonl").unlink()
    report = run_errand(errand, trial)
    error = str(report.result["error"])
    assert error.startswith(f"{socket.gethostname()} has not {errand.cwd}/law.jsonl: data and model must lie")


def test_relative_paths_start_where_the_search_was_typed(
    errand: RemoteTrial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(request: TrialRequest, ranks: int) -> TrialResult:
        assert Path(request.config.data.train[0].path).exists()
        return trial(request, ranks)

    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run_errand(errand, look).result["error"] is None


def test_a_trial_is_measured_on_its_ranks_where_the_data_is(
    errand: RemoteTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("cofitune.executors.local.measure_trial", lambda request, ranks: asked.append((request, ranks)))
    measure_errand(errand)
    ((request, ranks),) = asked
    assert request.config.output_dir.endswith("/cofitune-search/a") and ranks.options == ("--num-processes", "2")
    Path("law.jsonl").unlink()
    with pytest.raises(UserError, match="has not"):
        measure_errand(errand)


def test_a_config_arrives_as_it_was_sent(errand: RemoteTrial) -> None:
    here = TrialRequest.from_json(json.loads(json.dumps(errand.request)))
    assert here == TrialRequest("a", load_config(Path("c.yaml")), Path("run"))


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
