"""`eval.engine: vllm`: the same table as with transformers; a run is merged for it, and what cannot be is refused.

With the real one, in an environment that has vLLM beside cofitune's packages:
COFITUNE_VLLM=/other/venv/bin/python pytest tests/recipes/evaluate/test_vllm.py
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from cofitune import cli
from cofitune.config.load import dump_config
from cofitune.config.schema import Config
from cofitune.errors import ConfigError, UserError
from cofitune.launch import launcher
from cofitune.model import vllm_engine
from cofitune.model.load import load_tokenizer
from cofitune.recipes.compare.plan import plan_compare
from cofitune.recipes.evaluate import recipe
from cofitune.recipes.evaluate.plan import plan_eval
from cofitune.recipes.search.measure import choose_measure
from tests.recipes.evaluate.test_recipe import Place
from tests.vllm_stand_in import LLM, VERSION, vllm_stand_in

__all__ = ["vllm_stand_in"]

pytestmark = pytest.mark.processes
OTHER = os.environ.get("COFITUNE_VLLM")


@pytest.fixture
def place(tmp_path: Path, tiny_model_folder: Path) -> Place:
    """A base whose choices are no coin flips, and a run of it."""
    tokenizer = load_tokenizer(str(tiny_model_folder))
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=64, vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip  # vLLM knows heads of 64 numbers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    result = Place(tmp_path, tmp_path / "model")
    result.train(3)
    return result


def answers(place: Place) -> dict[str, list[dict[str, Any]]]:
    """What every model answered, by file."""
    files = sorted((place.folder / "run/eval/samples").rglob("*.jsonl"))
    return {str(file.relative_to(place.folder)): [json.loads(line) for line in file.open()] for file in files}


def check_alike(one: dict[str, list[dict[str, Any]]], other: dict[str, list[dict[str, Any]]]) -> None:
    assert one.keys() == other.keys() and len(one) == 6
    for name, samples in one.items():
        for a, b in zip(samples, other[name], strict=True):
            assert a.pop("log_likelihoods", ()) == pytest.approx(b.pop("log_likelihoods", ()), rel=1e-4), name
            assert a == b, name


@pytest.mark.usefixtures("vllm_stand_in")
def test_vllm_gives_the_table_of_transformers(place: Place) -> None:
    place.evaluate()
    before, first = place.scores(), answers(place)
    for alpha in (1.0, 0.5):
        models = [{"path": str(place.folder / "run"), "alpha": alpha, "name": "half"}] if alpha < 1 else []
        place.evaluate(config=place.config(engine="vllm", models=models), overwrite=True)
    now = place.scores()
    kept = {name: lines for name, lines in answers(place).items() if "/half/" not in name}
    check_alike(first, kept)
    assert now["models"]["run"]["unified"] == pytest.approx(before["models"]["run"]["unified"])
    assert now["settings"]["engine"] == "vllm" and now["settings"]["versions"]["vllm"] == VERSION
    assert "attn_implementation" not in now["settings"] and "engine" not in before["settings"]
    assert not list((place.folder / "run/eval").glob("merged-*")), "merged models are taken away"


def test_each_model_is_loaded_whole_and_ended_before_the_next(place: Place, vllm_stand_in: type[LLM]) -> None:
    place.evaluate(config=place.config(engine="vllm"))
    base, run = vllm_stand_in.loaded
    assert base.options["model"] == str(place.model)
    assert Path(run.options["model"]).parent == place.folder / "run/eval" and run.options["revision"] is None
    for model in (base, run):
        assert model.ended and model.options["dtype"] == "float32" and model.options["enforce_eager"] is True
        longest = max(len(ids) + sampling.max_tokens for ids, sampling in model.asked)
        assert longest <= model.options["max_model_len"] <= longest + 3
    place.evaluate(config=place.config(engine="vllm"))
    assert len(vllm_stand_in.loaded) == 2 and "6 of 6 results as scored before" in place.said.getvalue()
    place.evaluate(config=place.config(engine="vllm"), overwrite=True, dry_run=True)
    assert f"by vLLM {VERSION}" in place.said.getvalue() and "merged one after the other" in place.said.getvalue()


@pytest.mark.usefixtures("vllm_stand_in")
def test_batch_size_is_what_vllm_is_given_at_once(place: Place) -> None:
    chosen = plan_eval(place.config(engine="vllm", batch_size="auto")).batch_sizes
    assert set(chosen.values()) == {1024}
    assert set(plan_eval(place.config(engine="vllm")).batch_sizes.values()) == {2}


def test_what_vllm_cannot_do_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch, rehearsal_folder: Path) -> None:
    config = place.config(engine="vllm")
    with pytest.raises(UserError, match=r"eval\.engine: vllm is not installed here; use transformers"):
        place.evaluate(config=config)
    monkeypatch.setattr(vllm_engine, "is_installed", lambda: True)
    with pytest.raises(UserError, match=r"eval\.engine: vllm is one process .*leave out --num-processes"):
        recipe.takes_all_gpus(config, asked_for_ranks=True)
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="torchrun and srun"):
        plan_eval(config)


@pytest.mark.usefixtures("vllm_stand_in")
def test_drift_is_not_measured_with_vllm(place: Place, rehearsal_folder: Path) -> None:
    with pytest.raises(UserError, match=r"eval\.engine: vllm cannot measure 'drift': .*leave eval\.drift out"):
        plan_eval(place.config(engine="vllm", drift=[str(rehearsal_folder)]))


def test_trials_and_comparisons_ask_in_memory(place: Place) -> None:
    config = place.config(engine="vllm")
    assert choose_measure(config).tasks.engine == "transformers"
    data = {"data": {"train": str(place.folder / "law.jsonl")}, "region": {"layers": "1"}}
    compared = (
        config.model_dump(exclude_unset=True) | data | {"compare": {"methods": ["cofitune"], "learning_rates": [1e-4]}}
    )
    plan = plan_compare(Config.model_validate(compared), dry_run=True)
    assert plan.eval_config([]).eval.engine == "transformers"
    for_search = {"search": {"eval": {"engine": "vllm"}}}
    with pytest.raises(ValueError, match=r"vllm is for `cofitune eval`; a trial is asked in memory"):
        Config.model_validate(config.model_dump(exclude_unset=True) | for_search)


@pytest.mark.usefixtures("vllm_stand_in")
def test_no_ranks_are_started_for_it(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place.folder / "config.yaml"
    path.write_text(dump_config(place.config(engine="vllm")))
    monkeypatch.setattr(launcher, "launch_ranks_if_needed", lambda *_: pytest.fail("ranks were started"))
    assert CliRunner().invoke(cli.app, ["eval", str(path)], catch_exceptions=False).exit_code == 0
    with pytest.raises((UserError, ConfigError), match="leave out --num-processes"):
        CliRunner().invoke(cli.app, ["eval", str(path), "--num-processes", "2"], catch_exceptions=False)


@pytest.mark.skipif(OTHER is None, reason="needs COFITUNE_VLLM, the python of an environment with vLLM")
def test_the_real_one_gives_the_table_of_transformers(place: Place) -> None:
    place.evaluate()
    first = answers(place)
    path = place.folder / "config.yaml"
    path.write_text(dump_config(place.config(engine="vllm")))
    repository = Path(__file__).parents[3]
    own = {**os.environ, "PYTHONPATH": str(repository), "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [str(OTHER), "-m", "cofitune", "eval", str(path), "--overwrite"]
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert place.scores()["settings"]["engine"] == "vllm"
    check_alike(first, answers(place))
