"""Finding a model's weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from cofitune.errors import UserError
from cofitune.model.weight_files import weight_files


def test_weights_in_gguf_alone_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no safetensors weights"):
        weight_files(str(tmp_path))
    (tmp_path / "model-q4.gguf").touch()
    with pytest.raises(UserError, match="weights in GGUF.*convert it to safetensors once"):
        weight_files(str(tmp_path))
