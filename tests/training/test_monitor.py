"""What TensorBoard and W&B really get: the files that their own packages write, read again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cofitune.errors import UserError
from cofitune.ranks import VARIABLES
from cofitune.training import monitor
from cofitune.training.engine import start_distributed
from cofitune.training.monitor import Monitor, check_usable

pytestmark = pytest.mark.processes


def test_tensorboard_gets_every_figure_at_its_step(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    start_distributed()
    drawn = Monitor(["tensorboard"], tmp_path, "run")
    drawn.write(1, {"loss": 2.5, "mfu": None})
    drawn.write(2, {"loss": 2.25, "validation_loss": 3.0})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "validation_loss"}
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.5), (2, 2.25)]


def test_without_a_name_nothing_is_written(tmp_path: Path) -> None:
    start_distributed()
    Monitor([], tmp_path, "run").write(1, {"loss": 2.5})
    assert not list(tmp_path.iterdir())


WANDB = """
import sys
from pathlib import Path
import wandb
from cofitune.training.engine import start_distributed
from cofitune.training.monitor import Monitor
start_distributed()
drawn = Monitor(["wandb"], Path(sys.argv[1]), "law")
drawn.write(1, {"loss": 2.5})
drawn.write(2, {"loss": 2.25})
print(wandb.run.project, wandb.run.name)
"""


def test_wandb_writes_offline(tmp_path: Path) -> None:
    """In a process of its own, whose end is what closes the file, as after a training."""
    pytest.importorskip("wandb")
    kept = {k: v for k, v in os.environ.items() if k not in VARIABLES and not k.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", WANDB, str(tmp_path)],
        env=kept | {"WANDB_MODE": "offline"}, capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    assert "cofitune law" in done.stdout
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"loss" in written.read_bytes() and b"2.25" in written.read_bytes()


def test_a_missing_package_is_named_with_the_way_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"report_to: wandb is not installed: pip install -e '\.\[wandb\]' in the checkout"
    ):
        check_usable(["wandb"])


def test_wandb_without_a_login_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="wandb: no login; type `wandb login` once"):
        check_usable(["wandb"])


def test_mlflow_gets_every_figure_at_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package may not be here: a stub with its few calls stands in, and records them."""
    calls: list[tuple[Any, ...]] = []
    stub = SimpleNamespace(
        active_run=lambda: calls and calls[-1][0] != "end",
        end_run=lambda: calls.append(("end",)),
        set_experiment=lambda name: calls.append(("experiment", name)),
        start_run=lambda run_name: calls.append(("run", run_name)),
        log_metrics=lambda figures, step: calls.append((step, figures)),
    )
    monkeypatch.setitem(sys.modules, "mlflow", stub)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    start_distributed()
    Monitor(["mlflow"], tmp_path, "law").write(1, {"loss": 2.5, "mfu": None})
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "courts")
    Monitor(["mlflow"], tmp_path, "tax")
    first = [("experiment", "cofitune"), ("run", "law"), (1, {"loss": 2.5})]
    assert calls == [*first, ("end",), ("experiment", "courts"), ("run", "tax")]


MLFLOW = """
import sys
from pathlib import Path
import mlflow
from cofitune.training.engine import start_distributed
from cofitune.training.monitor import Monitor
start_distributed()
drawn = Monitor(["mlflow"], Path(sys.argv[1]), "law")
drawn.write(1, {"loss": 2.5, "mfu": None})
drawn.write(2, {"loss": 2.25})
[run] = mlflow.search_runs(experiment_names=["cofitune"], output_format="list")
history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
print(run.info.run_name, [(one.step, one.value) for one in history])
"""


def test_mlflow_itself_keeps_them_in_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")  # the extra `mlflow`, which `dev` has not
    kept = {k: v for k, v in os.environ.items() if k not in VARIABLES and not k.startswith("MLFLOW_")}
    done = subprocess.run(
        [sys.executable, "-c", MLFLOW, str(tmp_path)], cwd=tmp_path, check=True,
        env=kept | {"MLFLOW_TRACKING_URI": f"file://{tmp_path}/mlruns", "MLFLOW_ALLOW_FILE_STORE": "true"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "law [(1, 2.5), (2, 2.25)]"
