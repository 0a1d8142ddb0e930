"""Curves elsewhere than in metrics.jsonl: TensorBoard and W&B through DeepSpeed's own writers, and MLflow.

The writers are DeepSpeed's, the figures ours: its engine would draw the loss as it is scaled for the backward pass, so
it is not told of them.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from cofitune.distributed import rank_or_zero
from cofitune.errors import UserError, install


def check_installed(names: Sequence[str]) -> None:
    """Raise a UserError where a package is missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        extras = ",".join(missing)
        raise UserError(f"train.report_to: {extras} is not installed: {install(extras)}")


def check_usable(names: Sequence[str]) -> None:
    """Find out before any weight is read whether the packages are there, and whether W&B knows who we are.

    Raises:
        UserError: one is not, or it does not.
    """
    check_installed(names)
    if "wandb" in names and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        if not wandb.login(prompt=False):
            raise UserError(
                "train.report_to: wandb: no login; type `wandb login` once, or set WANDB_API_KEY or WANDB_MODE=offline"
            )


class Monitor:
    """Draws figures over optimizer steps; without names it draws nothing. Every rank may have one: rank 0's writes."""

    def __init__(self, names: Sequence[str], folder: Path, run: str) -> None:
        """Open what is named.

        Args:
            names: of `tensorboard`, `wandb` and `mlflow`.
            folder: TensorBoard's files go into its subfolder `tensorboard`, W&B's into `wandb`.
            run: the run's name at W&B, whose project is WANDB_PROJECT, or `cofitune`; likewise at MLflow, by
                MLFLOW_EXPERIMENT_NAME, on the server that MLFLOW_TRACKING_URI names.
        """
        from deepspeed.monitor.config import get_monitor_config
        from deepspeed.monitor.monitor import MonitorMaster

        os.environ.setdefault("WANDB_NAME", run)
        os.environ.setdefault("WANDB_DIR", str(folder))
        project = os.environ.get("WANDB_PROJECT", "cofitune")
        config: dict[str, object] = {
            "tensorboard": {
                "enabled": "tensorboard" in names, "output_path": str(folder), "job_name": "tensorboard",
            },
            "wandb": {"enabled": "wandb" in names, "project": project},
        }  # fmt: skip
        self._writers = MonitorMaster(get_monitor_config(config)) if {"tensorboard", "wandb"} & {*names} else None
        self._mlflow = _start_mlflow(run) if "mlflow" in names and rank_or_zero() == 0 else None

    def write(self, step: int, figures: Mapping[str, float | None]) -> None:
        """Draw each figure at this step, under its name; what is None is left out."""
        known = {name: value for name, value in figures.items() if value is not None}
        if self._writers:
            self._writers.write_events([(name, value, step) for name, value in known.items()])
        if self._mlflow:
            self._mlflow.log_metrics(known, step=step)


def _start_mlflow(run: str) -> ModuleType:
    """The package, with a run of this name begun; it ends with the process, or where a next one begins."""
    import mlflow

    if mlflow.active_run():  # of an earlier training in this process
        mlflow.end_run()
    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "cofitune"))
    mlflow.start_run(run_name=run)
    package: ModuleType = mlflow
    return package
