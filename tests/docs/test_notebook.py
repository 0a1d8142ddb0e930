"""The notebook of the documentation: its cells run one after the other, as a notebook runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import REPOSITORY


def test_every_cell_of_the_notebook_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((REPOSITORY / "docs/notebook.ipynb").read_text("utf-8"))
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "outputs are not kept: they would age"
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert "did you mean 'learning_rate'" in capsys.readouterr().out
    assert list(names["scored"].scores) == ["base", "run"]
    assert (names["exported"].folder / "model.safetensors").is_file()
