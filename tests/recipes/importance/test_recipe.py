"""`cofitune importance` from the config to the files."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import cofitune
from cofitune.config.day import VARIABLE, begin_day
from cofitune.config.load import load_config
from cofitune.config.schema import Config
from cofitune.errors import ArtifactError, UserError
from cofitune.files import exclusive, read_tensors, sha256_file
from cofitune.importance import estimate
from cofitune.importance.normalize import zscore_tanh
from cofitune.importance.partial import load_sums, save_sums
from cofitune.importance_file import UNIT_KINDS, read_importance
from cofitune.model.anatomy import read_anatomy, read_model_config
from cofitune.model.weight_files import fingerprint
from cofitune.recipes.importance import recipe
from cofitune.recipes.importance.recipe import Rank, importance, plan_importance

pytestmark = pytest.mark.processes

ITEMS = [
    ("What is two plus two?", "Two plus two is four."),
    ("Name the capital of France.", "Paris."),
    ("May a tenant end the lease?", "A tenant may end the lease with three months' notice."),
    ("Say hello.", "hello world"),
    ("What did the court hold?", "The court held that the contract was void, and the seller had to pay."),
]


@pytest.fixture
def made(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A folder with a config file and its data."""
    lines = [json.dumps({"instruction": i, "output": o}) + "\n" for i, o in ITEMS]
    (tmp_path / "general.jsonl").write_text("".join(lines))
    (tmp_path / "one.jsonl").write_text(lines[0])
    config = {
        "model": {"name": str(tiny_model_folder)},
        "importance": {
            "data": [{"path": str(tmp_path / "general.jsonl")}],
            "per_device_batch_size": 2,
            "estimator": "kl_dropout",
            "dropout": 0.1,
        },
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    return tmp_path


def read(made: Path, *overrides: str) -> Config:
    return load_config(made / "config.yaml", list(overrides))


def quiet() -> Console:
    return Console(width=100, record=True, file=Path(os.devnull).open("w"))


def forbid_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("the weights were loaded")

    monkeypatch.setattr(recipe, "load_base", refuse)


@pytest.fixture
def pictures() -> None:
    """Where it is asked for, the picture is drawn."""


@pytest.fixture(autouse=True)
def _no_other_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere matplotlib is not there, as it may not be: a picture takes longer than all else of a tiny run."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(recipe, "can_draw", lambda: False)


@pytest.mark.usefixtures("pictures")
def test_it_writes_vectors_scores_and_a_manifest(made: Path, tiny_model_folder: Path) -> None:
    console = quiet()
    folder = importance(read(made), console=console)
    assert folder == made / "run" / "importance"
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml",
        "importance.png",
        "importance.safetensors",
        "importance.svg",
        "manifest.json",
        "scores.safetensors",
        "spread.csv",
    }
    anatomy = read_anatomy(read_model_config(str(tiny_model_folder)))
    base = fingerprint(str(tiny_model_folder))
    result = read_importance(folder, anatomy, base)
    scores = read_tensors(folder / "scores.safetensors", "scores")
    for kind in UNIT_KINDS:
        torch.testing.assert_close(result.vectors[kind], zscore_tanh(scores[kind]), rtol=1e-4, atol=1e-5)
        assert bool((scores[kind] != 0).all())
    tokens = sum(len(e.input_ids) for e in plan_importance(read(made), overwrite=True).examples)
    reliable = result.manifest.pop("reliability")
    assert list(reliable) == list(UNIT_KINDS)
    assert all(len(one["by_layer"]) == 4 and 0 <= one["whole"] <= 1 for one in reliable.values())
    assert result.manifest == {
        "format": 1,
        "sha256": sha256_file(folder / "importance.safetensors"),
        "base": str(tiny_model_folder),
        "base_fingerprint": base,
        "model_type": "llama",
        "sizes": {"num_layers": 4, "attention_heads": 4, "ffn_neurons": 48, "ffn_outputs": 32},
        "dtype": "bfloat16" if torch.cuda.is_available() else "float32",
        "estimator": "kl_dropout",
        "reduce": "signed",
        "normalize": "zscore_tanh",
        "dropout": 0.1,
        "passes": 2,
        "seed": 1234,
        "per_device_batch_size": 2,
        "items": 5,
        "tokens": tokens,
        "max_length": 512,
        "template": "chat",
        "chat_template": plan_importance(read(made), overwrite=True).chat_template,
        "data": [{"path": str(made / "general.jsonl"), "sha256": sha256_file(made / "general.jsonl")}],
        "cofitune": cofitune.__version__,
    }
    text = console.export_text()
    assert "As a soft mask" in text and "Reliability (1 is best): heads 0." in text
    assert "3/3" in text


def test_the_whole_conversation_counts_and_max_items_takes_the_first(made: Path, tiny_tokenizer: Any) -> None:
    plan = plan_importance(read(made, "importance.max_items=2"))
    chats = [[{"role": "user", "content": i}, {"role": "assistant", "content": o}] for i, o in ITEMS[:2]]
    expected = [tiny_tokenizer.apply_chat_template(c, tokenize=True, return_dict=False) for c in chats]
    assert [e.input_ids for e in plan.examples] == expected


def test_ranks_share_the_micro_batches_out_without_gap_or_overlap(made: Path) -> None:
    plan = plan_importance(read(made))
    alone = dict(plan.micro_batches(Rank(0, 0, 1)))
    shared = [dict(plan.micro_batches(Rank(rank, rank, 2))) for rank in (0, 1)]
    assert list(alone) == [0, 1, 2]
    assert [list(s) for s in shared] == [[0, 2], [1]]
    for part in shared:
        for index, batch in part.items():
            assert torch.equal(batch["input_ids"], alone[index]["input_ids"])


def rewritten(made: Path) -> list[str]:
    """Overrides: conversations under a template that rewrites earlier turns, so that each response is an example."""
    turns = [[{"role": r, "content": c} for r, c in zip(("user", "assistant"), pair, strict=True)] for pair in ITEMS]
    conversations = [turns[0] + turns[1], turns[2], turns[3] + turns[4] + turns[0]]
    (made / "chats.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in conversations))
    template = Path(__file__).parents[2] / "data" / "templates" / "qwen3.jinja"
    data = f"importance.data={made / 'chats.jsonl'}"
    return [data, f"data.template={template}", "importance.estimator=fisher", "importance.dropout=0.003"]


def test_an_item_of_several_examples_counts_once(made: Path) -> None:
    plan = plan_importance(read(made, *rewritten(made)))
    assert (plan.num_items, len(plan.examples)) == (3, 6)
    assert [len(batch) for batch in plan.batches] == [2, 1, 3], "no item is parted, though the batch size is 2"
    assert [b["items"].tolist() for _, b in plan.micro_batches(Rank())] == [[0, 0], [0], [0, 0, 0]]
    console = quiet()
    folder = importance(read(made, *rewritten(made)), console=console)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["items"], manifest["examples"], manifest["tokens"]) == (3, 6, plan.tokens)
    assert f"{plan.tokens:,} tokens of 3 items" in console.export_text()


def test_a_dry_run_shows_the_plan_and_writes_nothing(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_weights(monkeypatch)
    console = quiet()
    importance(read(made), dry_run=True, console=console)
    text = console.export_text()
    for expected in ("4 layers", "attention heads", "192", "5 items", "3 micro-batches", "memory", "manifest.json"):
        assert expected in text
    assert not (made / "run").exists()


def test_a_finished_folder_is_not_made_again(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = importance(read(made), console=quiet())
    before = (folder / "importance.safetensors").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        forbid_weights(patch)
        console = quiet()
        assert importance(read(made), console=console) == folder
        assert "finished already" in console.export_text()
        with pytest.raises(UserError, match="made by another config"):
            importance(read(made, "importance.seed=2"), console=quiet())
        with (made / "general.jsonl").open("a") as file:
            file.write(json.dumps({"instruction": "One more?", "output": "Yes."}) + "\n")
        with pytest.raises(ArtifactError, match=r"before .*general\.jsonl changed.*overwrite"):
            importance(read(made), console=quiet())
    importance(read(made, "importance.seed=2"), overwrite=True, console=quiet())
    assert (folder / "importance.safetensors").stat().st_mtime_ns != before
    assert json.loads((folder / "manifest.json").read_text())["items"] == 6


def test_an_interrupted_folder_is_made_again(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="were loaded"):
        forbid_weights(patch)
        importance(read(made), console=quiet())
    assert not (made / "run" / "importance" / "manifest.json").exists()
    assert (importance(read(made), console=quiet()) / "manifest.json").exists()


@pytest.mark.usefixtures("pictures")
def test_a_folder_whose_pictures_are_not_drawn_is_not_finished(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no room for pictures")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no room"):
        patch.setattr(recipe, "_draw", refuse)
        importance(read(made), console=quiet())
    folder = made / "run" / "importance"
    assert not (folder / "manifest.json").exists()
    importance(read(made), console=quiet())
    assert (folder / "manifest.json").exists() and (folder / "importance.png").exists()


def test_the_sums_are_named_by_the_layout_too(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def none_there(_: Path, identity: str) -> None:
        seen.append(identity)

    monkeypatch.setattr(recipe, "load_sums", none_there)
    importance(read(made), console=quiet())
    (identity,) = seen
    layout = plan_importance(read(made), overwrite=True).anatomy.layout
    assert json.dumps(asdict(layout)) in identity


KILLED = """
import os, signal, sys
from cofitune.config.load import load_config
from cofitune.recipes.importance import recipe
save = recipe.save_sums
def save_twice(path, sums, identity):
    save(path, sums, identity)
    if sums.micro_batches == 2:
        os.kill(os.getpid(), signal.SIGKILL)
recipe.save_sums = save_twice
recipe.importance(load_config(sys.argv[1], sys.argv[3:]), overwrite=sys.argv[2] == "overwrite")
"""


def begin_and_kill(made: Path, overrides: list[str], how: str = "") -> None:
    """Estimate in a process of its own, which is killed when it has saved its second micro-batch."""
    root = Path(cofitune.__file__).parents[1]
    command = [sys.executable, "-c", KILLED, str(made / "config.yaml"), how, "importance.save_steps=1", *overrides]
    killed = subprocess.run(command, check=False, cwd=root, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -9, killed.stderr


@pytest.mark.parametrize(("estimator", "dropout"), [("kl_dropout", 0.1), ("fisher", 0.003)])
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(
    made: Path, monkeypatch: pytest.MonkeyPatch, estimator: str, dropout: float
) -> None:
    overrides = ["importance.save_steps=1", f"importance.estimator={estimator}", f"importance.dropout={dropout}"]
    whole = importance(read(made, *overrides, f"output_dir={made / 'whole'}"), console=quiet())
    monkeypatch.setenv(VARIABLE, "2026-01-07")
    begin_and_kill(made, overrides)
    monkeypatch.setenv(VARIABLE, "2026-01-08")
    begin_day(made / "run")  # as each command does: it goes on under the first day
    folder = made / "run" / "importance"
    assert [p.name for p in folder.iterdir()] == ["partial"]
    seen: list[int] = []
    gradients = estimate.gate_gradients

    def counted(*arguments: Any) -> Any:
        seen.append(arguments[3])
        return gradients(*arguments)

    monkeypatch.setattr(estimate, "gate_gradients", counted)
    console = quiet()
    assert importance(read(made, *overrides), console=console) == folder
    assert seen == [2]
    assert "continuing after 2 micro-batches" in console.export_text()
    for file in ("scores.safetensors", "importance.safetensors"):
        assert sha256_file(folder / file) == sha256_file(whole / file)
    assert not (folder / "partial").exists()


@pytest.mark.parametrize(
    ("again", "overwrite"), [("importance.seed=2", True), ("importance.seed=2", False), ("importance.seed=0", False)]
)
def test_a_killed_overwrite_goes_on_whichever_way_it_is_called(made: Path, again: str, overwrite: bool) -> None:
    whole = importance(read(made, again, f"output_dir={made / 'whole'}"), console=quiet())
    folder = importance(read(made, "importance.seed=0"), console=quiet())
    finished = {p.name: sha256_file(p) for p in folder.iterdir()}
    begin_and_kill(made, [again], "overwrite")
    assert {p.name: sha256_file(p) for p in folder.iterdir() if p.is_file()} == finished, "kept until there is better"

    with pytest.raises(UserError, match="made by another config"):
        importance(read(made, "importance.seed=3"), console=quiet())
    if again != "importance.seed=0":
        console = quiet()
        importance(read(made, "importance.seed=0"), console=console)
        assert "finished already" in console.export_text()
    console = quiet()
    importance(read(made, again), overwrite=overwrite, dry_run=True, console=console)
    assert "continues from the sums of an interrupted computation" in console.export_text()
    importance(read(made, again), overwrite=overwrite, console=console)
    assert "continuing after 2 micro-batches" in console.export_text()
    for file in ("scores.safetensors", "importance.safetensors"):
        assert sha256_file(folder / file) == sha256_file(whole / file)
    assert not (folder / "partial").exists() and set(finished) == {p.name for p in folder.iterdir()}
    console = quiet()
    importance(read(made, again), console=console)
    assert "finished already" in console.export_text()


def test_sums_of_other_ranks_let_no_finished_folder_be_replaced(made: Path) -> None:
    folder = importance(read(made, "importance.seed=0"), console=quiet())
    begin_and_kill(made, ["importance.seed=2"], "overwrite")
    (sums,) = (folder / "partial").iterdir()
    sums.rename(sums.with_name("0-of-2.safetensors"))
    finished = {p.name: sha256_file(p) for p in folder.iterdir() if p.is_file()}
    for dry_run in (True, False):
        with pytest.raises(UserError, match="made by another config"):
            importance(read(made, "importance.seed=2"), dry_run=dry_run, console=quiet())
    console = quiet()
    importance(read(made, "importance.seed=2"), dry_run=True, ranks=2, console=console)
    assert "continues from the sums" in console.export_text()
    assert {p.name: sha256_file(p) for p in folder.iterdir() if p.is_file()} == finished


def test_overwrite_begins_anew_and_a_crash_while_writing_loses_no_sums(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = importance(read(made), console=quiet())
    (folder / "mine.png").touch()
    begin_and_kill(made, ["importance.seed=2"], "overwrite")
    settings = read(made, "importance.seed=3", "importance.save_steps=1")

    def refuse(*_: Any) -> None:
        raise RuntimeError("no room for pictures")

    console = quiet()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no room"):
        patch.setattr(recipe, "_draw", refuse)
        importance(settings, overwrite=True, console=console)
    assert "continuing after" not in console.export_text()
    assert not (folder / "manifest.json").exists() and not (folder / "importance.safetensors").exists()
    assert (folder / "mine.png").exists(), "only what we wrote is ever removed"
    importance(settings, console=console)
    assert "continuing after 3 micro-batches" in console.export_text()
    assert json.loads((folder / "manifest.json").read_text())["seed"] == 3


def test_the_sums_of_another_run_are_not_gone_on_from(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "sums.safetensors"
    sums = estimate.Sums({"ffn_neurons": torch.rand(2, 2, 3, dtype=torch.float64)}, 30, 4, 2)
    save_sums(path, sums, "this run")
    result = load_sums(path, "this run")
    assert result is not None and torch.equal(result.values["ffn_neurons"], sums.values["ffn_neurons"])
    assert (result.tokens, result.samples, result.micro_batches) == (30, 4, 2)
    assert load_sums(path, "another run") is None
    path.write_bytes(path.read_bytes()[:-5])
    assert load_sums(path, "this run") is None
    assert load_sums(tmp_path / "none", "this run") is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["importance.data=[]"], r"importance\.data: names no data.*general\.jsonl"),
        (["importance.data=nowhere.jsonl"], r"nowhere\.jsonl: no such data file"),
        (["model.name=./"], r"model\.name: \./ has no config\.json"),
        (["output_dir=general.jsonl/run"], "cannot be written"),
        (
            ["importance.estimator=kl_dropout", "model.attn_implementation=flex_attention"],
            "needs attention dropout, which flex_attention is not known to have",
        ),
    ],
)
def test_mistakes_are_found_before_the_weights_load(
    made: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    forbid_weights(monkeypatch)
    monkeypatch.chdir(made)
    with pytest.raises(UserError, match=message):
        importance(read(made, *overrides), console=quiet())
    assert not (made / "run").exists()


def test_a_bad_item_is_named_or_dropped_and_counted(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (made / "general.jsonl").open("a") as file:
        file.write("{broken\n")
    forbid_weights(monkeypatch)
    with pytest.raises(UserError, match=r"general\.jsonl:6: "):
        importance(read(made), console=quiet())
    console = quiet()
    importance(read(made, "data.on_bad_item=drop"), dry_run=True, console=console)
    assert "6 items read, 1 dropped" in console.export_text()


def test_long_items_are_cut_and_counted(made: Path) -> None:
    console = quiet()
    importance(read(made, "data.max_length=12"), dry_run=True, console=console)
    text = console.export_text()
    assert "60 tokens (longest 12)" in text
    assert "5 truncated" in text


def test_out_of_memory_is_one_message_that_says_what_would_take_less(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(recipe, "estimate", run_out)
    with pytest.raises(UserError) as refused:
        importance(read(made), console=quiet())
    output = str(refused.value)
    assert output.startswith("out of memory: CUDA out of memory. Tried to allocate 2.00 GiB.\nestimated were ")
    for way in ("per_device_batch_size: 1 ", "sharding: zero3, on several ranks", "data.max_length: "):
        assert way in output
    assert not (made / "run" / "importance" / "manifest.json").exists()


TWO_RANKS = """
import sys
import torch
from rich.console import Console
from cofitune.config.load import load_config
from cofitune.recipes.importance.recipe import importance
import os
torch.set_num_threads(1)
for case in sys.argv[2:]:
    name, port, *overrides = case.split()
    os.environ["MASTER_PORT"] = port
    importance(load_config(sys.argv[1], [f"output_dir={name}", *overrides]), console=Console(width=90))
"""


def test_two_ranks_equal_one(made: Path) -> None:
    """Really two processes: three micro-batches shared 2 to 1, one that leaves a rank idle, and items of several."""
    cases = {"shared": [], "idle": [f"importance.data={made / 'one.jsonl'}"], "rewritten": rewritten(made)}
    arguments = [" ".join([str(made / f"two-{n}"), str(_free_port()), *overrides]) for n, overrides in cases.items()]
    command = [sys.executable, "-c", TWO_RANKS, str(made / "config.yaml"), *arguments]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(cofitune.__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert "As a soft mask" in outputs[0]
    assert "soft mask" not in outputs[1]  # only rank 0 talks
    for name, overrides in cases.items():
        one = importance(read(made, f"output_dir={made / name}", *overrides), console=quiet())
        two = made / f"two-{name}" / "importance"
        for file in ("scores.safetensors", "importance.safetensors"):
            expected, result = read_tensors(one / file, "file"), read_tensors(two / file, "file")
            for kind in UNIT_KINDS:
                largest = float(expected[kind].abs().max())
                assert float((expected[kind] - result[kind]).abs().max()) <= 1e-5 * largest
        manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (one, two)]
        assert manifests[0]["tokens"] == manifests[1]["tokens"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_second_estimation_is_refused_before_it_loads_the_model(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_weights(monkeypatch)
    config = read(made)
    refused = pytest.raises(UserError, match="another estimation of importance is writing here")
    with exclusive(config.run / "importance", recipe.WHAT), refused:
        importance(config, console=quiet())
