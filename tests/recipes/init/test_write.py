"""The settings that `cofitune init` chooses: by the model's size, the data and the machine."""

from __future__ import annotations

import pytest

from cofitune.recipes.init.look import DataFacts, Machine, ModelFacts
from cofitune.recipes.init.write import Settings, choose_settings

GIB = 1024**3


def settings(billions: float, items: int, gpus: int, gib: int = 80) -> Settings:
    weights = int(billions * 1e9)
    model = ModelFacts("m", 32, weights, weights // 10, 4096, None)
    return choose_settings(model, DataFacts("d", items, 200, 300, 50), Machine(gpus, gib * GIB, 8, 64 * GIB))


@pytest.mark.parametrize(
    ("billions", "gpus", "gib", "offload"),
    [(0.1, 0, 0, False), (7, 1, 80, False), (13, 8, 40, False), (13, 1, 24, True), (7, 8, 80, False)],
)
def test_weights_are_offloaded_where_they_must_be(billions: float, gpus: int, gib: int, offload: bool) -> None:
    assert settings(billions, 1000, gpus, gib).offload == offload


@pytest.mark.parametrize(("items", "gpus", "step"), [(40, 0, 8), (1200, 0, 32), (100_000, 8, 256), (10, 8, 8)])
def test_a_step_has_as_many_items_as_the_data_allow(items: int, gpus: int, step: int) -> None:
    chosen = settings(7, items, gpus)
    assert chosen.micro_batch * chosen.accumulation * max(1, gpus) == step


def test_small_models_learn_at_a_higher_rate() -> None:
    assert settings(0.1, 100, 0).learning_rate == "2e-4" and settings(7, 100, 1).learning_rate == "4e-5"
