"""What two real ranks compute with the weights shared between them, every case in one start."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from tests.helpers import freeze_imports

CASES: dict[str, tuple[str, ...]] = {
    "signed": (),
    "absolute": ("importance.reduce=absolute",),
    "fisher": ("importance.estimator=fisher", "importance.dropout=0.003"),
    "idle": ("importance.max_items=1",),  # one micro-batch for two ranks
    "wanda": ("importance.estimator=wanda", "importance.dropout=0.003"),
    "gpt2": ("model.name={folder}/gpt2",),  # Conv1D, positions that are learnt, a head tied to the embedding
}


def run_case(folder: Path, name: str, *overrides: str) -> None:
    from cofitune.config.load import load_config
    from cofitune.recipes.importance.recipe import importance

    given = [override.format(folder=folder) for override in overrides]
    console = Console(width=100, record=True)
    importance(load_config(folder / "config.yaml", [f"output_dir={folder}/two-{name}", *given]), console=console)


def run_interrupted(folder: Path) -> None:
    """Both ranks fail in their second micro-batch; rank 0 has saved the first one and rank 1 has not."""
    from cofitune.recipes.importance import recipe

    rank, save = torch.distributed.get_rank(), recipe.save_sums

    def fail(path: Path, sums: Any, identity: str) -> None:
        if sums.micro_batches == 2:
            raise InterruptedError
        if rank == 0:
            save(path, sums, identity)

    recipe.save_sums = fail
    overrides = ("importance.sharding=zero3", "importance.per_device_batch_size=1", "importance.save_steps=1")
    with suppress(InterruptedError):
        run_case(folder, "interrupted", *overrides)
    recipe.save_sums = save
    run_case(folder, "interrupted", *overrides)
    run_case(folder, "uninterrupted", *overrides)


def watch_memory(watched: list[tuple[str, int]]) -> None:
    """Have no weight too small to be sharded, and note what is gathered as each layer's forward and backward ends."""
    from cofitune.recipes.importance import recipe as importance
    from cofitune.training import frozen as module
    from cofitune.zero import gathered_weights

    recipe: Any = importance
    frozen: Any = module
    message, share = frozen.frozen_config, recipe.share_frozen

    def shard_all(*arguments: Any) -> dict[str, Any]:
        config = message(*arguments)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return config

    def watch(*arguments: Any) -> Any:
        engine = share(*arguments)
        model = engine.module

        def after_layer(layer: nn.Module, inputs: Any, output: Any) -> None:
            state: Tensor = output if torch.is_tensor(output) else output[0]
            watched.append(("forward", gathered_weights(model)))
            if state.requires_grad:
                state.register_hook(lambda _: watched.append(("backward", gathered_weights(model))))

        for one in model.modules():
            if one.__class__.__name__.endswith(("DecoderLayer", "Block")):
                one.register_forward_hook(after_layer)
        return engine

    frozen.frozen_config, recipe.share_frozen = shard_all, watch


def main() -> None:
    from cofitune.training.engine import start_distributed

    torch.set_num_threads(1)
    folder, watched = Path(sys.argv[1]), list[tuple[str, int]]()
    start_distributed()
    freeze_imports()
    watch_memory(watched)
    for name, overrides in CASES.items():
        watched.clear()
        run_case(folder, name, "importance.sharding=zero3", *overrides)
        torch.distributed.barrier()
        (folder / f"{name}-{torch.distributed.get_rank()}.json").write_text(json.dumps(watched))
    run_interrupted(folder)
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
