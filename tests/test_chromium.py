"""Which Chromium the report's tests are run in."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import chromium


def _script(path: Path, code: int, does: str = "") -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{does}\nexit {code}\n")
    path.chmod(0o755)
    return str(path)


def test_a_browser_that_does_not_start_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COFITUNE_CHROMIUM", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert chromium.find_chromium() is None
    broken = _script(tmp_path / "bin" / "chromium", 1)
    assert chromium.find_chromium() is None
    works = _script(tmp_path / "bin" / "google-chrome", 0)
    assert chromium.find_chromium() == works, "the next name's"
    for named, result in ((broken, None), (str(tmp_path / "nowhere"), None), (works, works)):
        monkeypatch.setenv("COFITUNE_CHROMIUM", named)
        assert chromium.find_chromium() == result


@pytest.mark.parametrize(("code", "installs"), [(0, False), (1, True)])
def test_ci_installs_a_browser_where_none_starts(tmp_path: Path, code: int, installs: bool) -> None:
    (tmp_path / ".ci").mkdir()
    script = shutil.copy(Path(__file__).parents[1] / ".ci" / "run", tmp_path / ".ci" / "run")
    _script(tmp_path / "scripts" / "test", 0, "echo tested")
    _script(tmp_path / "bin" / "chromium", code)
    _script(tmp_path / "bin" / "id", 0, "echo 0")
    _script(tmp_path / "bin" / "apt-get", 0, 'echo apt-get "$@"')
    environment = {key: value for key, value in os.environ.items() if key != "COFITUNE_CHROMIUM"}
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
    done = subprocess.run(["bash", script], check=True, capture_output=True, text=True, env=environment)
    assert done.stdout.endswith("tested\n")
    assert ("chromium" in done.stdout) == installs
    assert ("does not start" in done.stderr) == installs, "the package was a stub, too"
