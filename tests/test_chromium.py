"""Which Chromium the report's tests are run in."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("chromium_to_find", Path(__file__).with_name("chromium.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _script(path: Path, code: int) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\nexit {code}\n")
    path.chmod(0o755)
    return str(path)


def test_a_browser_that_does_not_start_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chromium = _load()
    monkeypatch.delenv("COFITUNE_CHROMIUM", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert chromium.find_chromium() is None
    broken = _script(tmp_path / "bin" / "chromium", 1)
    assert chromium.find_chromium() is None
    works = _script(tmp_path / "bin" / "google-chrome", 0)
    assert chromium.find_chromium() == works, "the next name's"
    for named, found in ((broken, None), (str(tmp_path / "nowhere"), None), (works, works)):
        monkeypatch.setenv("COFITUNE_CHROMIUM", named)
        assert chromium.find_chromium() == found
