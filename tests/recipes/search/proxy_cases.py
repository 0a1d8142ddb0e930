"""What two real ranks take of a search's proxy, with whole weights and with shared ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers import freeze_imports

# name → overrides
CASES: dict[str, tuple[str, ...]] = {
    "shared": ("deepspeed.zero_stage=3",),
    "idle": ("deepspeed.zero_stage=3", "importance.max_items=1"),  # one general item for two ranks
    "gpt2": ("deepspeed.zero_stage=3", "model.name={folder}/gpt2"),  # Conv1D, fused q, k and v
    "experts": ("deepspeed.zero_stage=3", "model.name={folder}/experts"),  # tensors of three dimensions
    "whole": ("deepspeed.zero_stage=2",),
}


def watch_memory(watched: list[int]) -> None:
    """Have no weight too small to be sharded, and note what is gathered as each layer's forward and backward ends."""
    from cofitune.recipes.search import gradient_statistics
    from cofitune.training import frozen as module
    from cofitune.zero import gathered_weights

    recipe: Any = gradient_statistics
    frozen: Any = module
    config_of, share = frozen.frozen_config, recipe.share_frozen

    def shard_all(*arguments: Any) -> dict[str, Any]:
        config = config_of(*arguments)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return dict(config)

    def watch(*arguments: Any) -> Any:
        engine = share(*arguments)

        def after_layer(layer: nn.Module, inputs: Any, output: Any) -> None:
            state: Tensor = output if torch.is_tensor(output) else output[0]
            watched.append(gathered_weights(engine.module))
            state.register_hook(lambda _: watched.append(gathered_weights(engine.module)))

        for one in engine.module.modules():
            if one.__class__.__name__.endswith(("DecoderLayer", "Block")):
                one.register_forward_hook(after_layer)
        return engine

    frozen.frozen_config, recipe.share_frozen = shard_all, watch


def main() -> None:
    from cofitune.config.load import load_config
    from cofitune.recipes.search.gradient_statistics import take_statistics
    from cofitune.training.engine import start_distributed

    torch.set_num_threads(1)
    folder, watched = Path(sys.argv[1]), list[int]()
    rank, _ = start_distributed()
    freeze_imports()
    watch_memory(watched)
    for name, overrides in CASES.items():
        watched.clear()
        given = [override.format(folder=folder) for override in overrides]
        config = load_config(folder / "config.yaml", given) if rank == 0 else None
        take_statistics(config, folder / f"two-{name}.json")
        (folder / f"{name}-{rank}.json").write_text(json.dumps(watched))
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
