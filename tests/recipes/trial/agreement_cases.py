"""Two real ranks on machines of their own, whose copies of a search's data differ; each writes what it was told."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from rich.console import Console


def main() -> None:
    from cofitune.config.load import load_config
    from cofitune.errors import UserError
    from cofitune.ranks import this_rank
    from cofitune.recipes.trial.executor import TrialRequest
    from cofitune.recipes.trial.runner import TrialRunner

    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), this_rank().rank
    os.environ["COFITUNE_CACHE"] = str(folder / f"cache-{rank}")
    runner = TrialRunner(Console(quiet=True))
    told = {}
    for name, measure in (("training data", "score"), ("development items", "loss")):
        os.chdir(folder / name / str(rank))
        config = load_config(Path("config.yaml"), [f"search.measure={measure}"])
        try:
            runner.run(TrialRequest("1", config, config.run))
        except UserError as error:
            told[name] = str(error)
    (folder / f"told-{rank}.json").write_text(json.dumps(told))
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
