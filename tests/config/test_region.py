"""The section `region` as a config says it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cofitune.config.load import load_config
from cofitune.errors import ConfigError


def test_an_unknown_key_without_a_value_is_not_dropped(tmp_path: Path) -> None:
    """YAML reads `{layers:8-14}`, without a space, as a key `layers:8-14` that has no value."""
    path = tmp_path / "config.yaml"
    path.write_text("model: {name: base}\noutput_dir: run\nregion: {layers:8-14}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"region\.layers:8-14: unknown key"):
        load_config(path)
    path.write_text("model: {name: base}\noutput_dir: run\nregion: {layers: null}\n", encoding="utf-8")
    assert load_config(path).region == load_config(path, ["region={layers: 25%-50%}"]).region
