"""The wheel is whole: built from the sdist, installed into a fresh environment, used in an empty folder."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from cofitune import __version__
from tests.helpers import REPOSITORY, write_jsonl

sys.path.insert(0, str(REPOSITORY / "scripts"))

import build_wheel

pytestmark = pytest.mark.processes
ITEMS = [{"instruction": f"Is contract {n} void?", "output": "Yes, it is void."} for n in range(8)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("wheel")
    made, sdist = build_wheel.build(folder)
    return made, sdist, build_wheel.install(made, folder / "env")


def test_the_wheel_and_the_sdist_hold_everything(built: tuple[Path, Path, Path]) -> None:
    made, sdist, _ = built
    names = set(zipfile.ZipFile(made).namelist())
    configs = {str(p.relative_to(REPOSITORY)) for p in (REPOSITORY / "configs").rglob("*") if p.is_file()}
    assert {f"cofitune/{name}" for name in configs} | {"cofitune/py.typed"} <= names
    assert made.name.startswith(f"cofitune-{__version__}-") and not [n for n in names if n.startswith("tests")]
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"tests/conftest.py", "scripts/test", "docs/conf.py", "constraints.txt", ".ci/run", *configs} <= inside


def test_the_wheel_works_in_an_empty_folder(
    built: tuple[Path, Path, Path], tmp_path: Path, tiny_model_folder: Path
) -> None:
    write_jsonl(tmp_path / "law_train.jsonl", ITEMS)
    commands = (
        f"init --model {tiny_model_folder} --data law_train.jsonl",
        "config validate law.yaml",
        "train law.yaml train.rehearsal=null train.max_steps=2",
    )
    for words in commands:
        done = subprocess.run(
            [built[2], *words.split()],
            cwd=tmp_path,
            env=build_wheel.clean_environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "runs/law/train/delta.safetensors").is_file()
    schema = (tmp_path / "law.yaml").read_text(encoding="utf-8").splitlines()[0].partition("$schema=")[2]
    assert Path(schema).is_file() and "site-packages" in schema


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"] and project["project"]["dynamic"] == ["version"]
