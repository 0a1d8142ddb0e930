"""One trial of a search: a short training of one region, then the small evaluation, as `search` wrote the config."""

from __future__ import annotations

import gc

import torch
from rich.console import Console

from cofitune.config.schema import Config
from cofitune.recipes.evaluate import evaluate
from cofitune.recipes.train import train


def trial(config: Config, *, train_first: bool, console: Console) -> None:
    """Train on every rank, then score on rank 0 into `<output_dir>/eval`; without training, score the base itself.

    Raises:
        UserError: a mistake in the config or the data.
    """
    rank = 0
    if train_first:
        train(config, console=console)
        rank = torch.distributed.get_rank()
        gc.collect()  # the engine's memory must be back before the evaluation loads a model of its own
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if rank == 0:
        evaluate(config, console=console)
