"""The proxy's gradient statistics: two real ranks, with shared and with whole weights, against one process."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, MixtralConfig

from cofitune.config.load import load_config
from cofitune.errors import UserError
from cofitune.files import read_json
from cofitune.launch.command import start_proxy
from cofitune.launch.launcher import Ranks
from cofitune.model.anatomy import read_anatomy, read_model_config
from cofitune.recipes.search.gradient_statistics import take_statistics
from cofitune.search.proxy import Statistics, statistics_from_json
from cofitune.search.space import whole_model
from cofitune.training.memory import gathered_at_once
from tests.helpers import run_ranks, write_jsonl
from tests.recipes.search import proxy_cases as cases

pytestmark = pytest.mark.processes

RELATIVE = 1e-5  # of a layer's statistic: sums of fp32 gradients in another order


def write_config(folder: Path, model: Path) -> Path:
    """Eleven items of the speciality, two micro-batches of unequal size; three general ones, for two ranks."""
    law = [{"instruction": f"Say {w} {i} times.", "output": f"{w} " * (i + 1)} for i, w in enumerate("abcdefghijk")]
    general = [{"instruction": f"Who is {w}?", "output": f"{w} is {w}."} for w in ("she", "he", "it")]
    write_jsonl(folder / "law.jsonl", law)
    write_jsonl(folder / "general.jsonl", general)
    config = {
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"train": str(folder / "law.jsonl")},
        "importance": {"data": str(folder / "general.jsonl")},
        "output_dir": str(folder / "run"),
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """Start two ranks once; they take every case's statistics."""
    folder = tmp_path_factory.mktemp("proxy-ranks")
    write_config(folder, tiny_model_folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 400}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, config in {
            "gpt2": GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=400, eos_token_id=None, bos_token_id=None),
            "experts": MixtralConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=2),
        }.items():
            AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
            AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder / name)
    run_ranks("recipes.search.proxy_cases", folder)
    return folder


def read(path: Path) -> Statistics:
    return statistics_from_json(read_json(path, "file of gradient statistics"), str(path))


@pytest.mark.parametrize("name", cases.CASES)
def test_two_ranks_take_the_statistics_that_one_process_takes(name: str, two_ranks: Path) -> None:
    given = [override.format(folder=two_ranks) for override in cases.CASES[name]]
    config = load_config(two_ranks / "config.yaml", given)
    take_statistics(config, two_ranks / f"one-{name}.json")
    one, two = read(two_ranks / f"one-{name}.json"), read(two_ranks / f"two-{name}.json")
    for expected, result in ((one.gain, two.gain), (one.harm, two.harm)):
        assert expected.keys() == result.keys()
        for module, values in expected.items():
            assert result[module] == pytest.approx(values, rel=RELATIVE), module
        assert all(value > 0 for values in expected.values() for value in values)
    anatomy = read_anatomy(read_model_config(config.model.name))
    half = whole_model(anatomy.num_layers // 2, anatomy.modules)
    assert two.proxy_score(half, 0.3) == pytest.approx(one.proxy_score(half, 0.3), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("name", cases.CASES)
def test_no_rank_holds_a_model_that_is_shared(name: str, two_ranks: Path) -> None:
    given = [override.format(folder=two_ranks) for override in cases.CASES[name]]
    config = load_config(two_ranks / "config.yaml", given)
    anatomy = read_anatomy(read_model_config(config.model.name))
    largest = max(math.prod(shape) for shape in anatomy.shapes.values())
    for rank in (0, 1):
        watched = json.loads((two_ranks / f"{name}-{rank}.json").read_text())
        if config.deepspeed.zero_stage == 2:
            assert not watched, "each rank has the model whole"
        else:
            # fetching ahead may go one weight beyond what DeepSpeed was told
            assert max(watched) <= gathered_at_once(anatomy) + largest < anatomy.num_parameters


def test_a_search_takes_them_on_the_ranks_of_its_trials(tmp_path: Path, tiny_model_folder: Path) -> None:
    config = load_config(write_config(tmp_path, tiny_model_folder), ["deepspeed.zero_stage=3"])
    two = Ranks(2, (), ("--num-processes", "2"))
    start_proxy(config, tmp_path / ".proxy.json", two)
    take_statistics(config, tmp_path / "one.json")
    one, result = read(tmp_path / "one.json"), read(tmp_path / ".proxy.json")
    for module, values in one.harm.items():
        assert result.harm[module] == pytest.approx(values, rel=RELATIVE), module
    (tmp_path / "general.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"search\.proxy: .*general\.jsonl.*exit 2; .*\.proxy\.log"):
        start_proxy(config, tmp_path / ".proxy.json", two)
