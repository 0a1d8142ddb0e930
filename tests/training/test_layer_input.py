"""A forward pass that begins above the frozen prefix, in every family: the same bits, or refused before it trains."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from cofitune.config.schema import Config
from cofitune.errors import UserError
from cofitune.model.anatomy import read_anatomy
from cofitune.model.kind import OTHERS, auto_class
from cofitune.recipes.train.recipe import train
from cofitune.training.layer_input import LayerInput, replay_difference
from cofitune.training.prefix_cache import changing_prefix
from tests.families import make_folder, tiny_config
from tests.helpers import write_jsonl

FAMILIES = {kind.model_type: kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING}
MORE = "it is given more than the hidden states of the layers below"
STREAMS = "what enters it has 4 dimensions, not those of batch, tokens and hidden size"
REFUSED = {  # before the first step; all others give the same
    "blt": MORE, "glm_moe_dsa": MORE, "inkling2_text": MORE, "zaya": MORE, "deepseek_v4": STREAMS, "hy_v4": STREAMS,
    "hrm_text": "it runs 6 times in one pass",
}  # fmt: skip


def _model(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def _logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in OTHERS])
def test_a_family_begins_at_its_last_layer_with_the_same_or_not_at_all(family: str) -> None:
    config = tiny_config(FAMILIES[family])
    try:
        anatomy = read_anatomy(config)
    except UserError:
        pytest.skip("it is refused altogether")
    if not anatomy.modules or anatomy.num_layers < 2 or changing_prefix(config):
        pytest.skip("the plan refuses a prefix cache")
    model = _model(config)
    ids = torch.randint(5, 400, (1, 12), generator=torch.Generator().manual_seed(1))
    layer_input = LayerInput(model, anatomy.layout.layers, anatomy.num_layers - 1)
    with torch.no_grad():
        reason = replay_difference(layer_input, lambda: _logits(model, ids).square().sum())
    assert (reason or "") == REFUSED.get(family, "")
    if reason:
        return
    batch = torch.randint(5, 400, (2, 9), generator=torch.Generator().manual_seed(2))
    kept: list[Tensor] = []
    with layer_input.capture(kept.append):
        expected = _logits(model, batch)
    with layer_input.replay(kept[0]):
        assert torch.equal(_logits(model, batch), expected)
    assert torch.equal(_logits(model, batch), expected), "the model is whole again"


@pytest.mark.processes
def test_what_cannot_begin_there_is_one_message_before_the_first_step(tmp_path: Path, tiny_tokenizer: Any) -> None:
    config = _run(tmp_path, tiny_tokenizer, "glm_moe_dsa", "memory")
    with pytest.raises(UserError, match=r"train.prefix_cache: model type glm_moe_dsa cannot begin at layer 1 .* none$"):
        train(config, console=Console(quiet=True))
    assert not (tmp_path / "run" / "train" / "metrics.jsonl").exists()


@pytest.mark.processes
@pytest.mark.parametrize("family", ["falcon"])
def test_layers_that_answer_with_a_tuple_train_the_same(family: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    losses = []
    for kind in ("none", "memory"):
        train(_run(tmp_path / kind, tiny_tokenizer, family, kind), console=Console(quiet=True))
        lines = (tmp_path / kind / "run" / "train" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses.append([json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and len(losses[0]) == 4


def _run(folder: Path, tokenizer: Any, family: str, prefix_cache: str) -> Config:
    """Two epochs of two steps on the upper of two layers."""
    used = make_folder(tiny_config(FAMILIES[family]), folder / "model", tokenizer)
    upper = [name for name in used if ".1." in name]
    words = ("court", "lease", "Paris", "buyer")
    data = write_jsonl(folder / "data.jsonl", ({"instruction": f"Say {w}", "output": w} for w in words))
    return Config.model_validate(
        {
            "model": {"name": str(folder / "model"), "dtype": "float32"},
            "data": {"train": str(data), "max_length": 48},
            "region": {"match": "|".join(map(re.escape, upper))},
            "softmask": {"apply_to": "none"},
            "train": {
                "learning_rate": 1e-2, "num_train_epochs": 2, "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 1, "prefix_cache": prefix_cache, "gradient_checkpointing": False,
            },
            "deepspeed": {"zero_stage": 2},
            "output_dir": str(folder / "run"),
        }
    )  # fmt: skip
