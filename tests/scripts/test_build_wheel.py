"""The wheel is whole: built from the sdist, installed into a fresh environment, used in an empty folder."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from cofitune import __version__
from tests.helpers import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))

import build_wheel

pytestmark = pytest.mark.processes


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


def test_the_page_of_an_index_has_no_dead_link(built: tuple[Path, Path, Path]) -> None:
    """No address of the repository is known, so a link into it became its text; the paper's address stayed."""
    archive = zipfile.ZipFile(built[0])
    [name] = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
    metadata = archive.read(name).decode()
    assert "Description-Content-Type: text/markdown" in metadata
    links = re.findall(r"\]\(([^)]*)\)", metadata)
    assert "https://arxiv.org/abs/2404.10306" in links and all(link.startswith("https://") for link in links)
    assert "Quickstart" in metadata, "the text of a link stays"


def test_links_of_an_index_page_lead_into_the_repository() -> None:
    spec = importlib.util.spec_from_file_location("cofitune_setup", REPOSITORY / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    readme = "![map](docs/map.png) [a](docs/a.md#b) [here](#top) [web](https://x.org/y.md) `[1, 2] (3)`"
    assert module.index_page(readme, "https://host/owner/name/") == (
        "![map](https://host/owner/name/raw/main/docs/map.png) [a](https://host/owner/name/blob/main/docs/a.md#b) "
        "[here](#top) [web](https://x.org/y.md) `[1, 2] (3)`"
    )
    assert module.index_page(readme, None) == "map a [here](#top) [web](https://x.org/y.md) `[1, 2] (3)`"


@pytest.mark.interpreter
def test_the_first_hour_needs_the_wheel_alone(
    built: tuple[Path, Path, Path], tmp_path: Path, tiny_model_folder: Path
) -> None:
    """From `init` to the exported model's answer, each command typed in a folder with data alone."""
    script, transcript = REPOSITORY / "scripts" / "bench" / "first_hour.py", tmp_path / "said.txt"
    sizes = ["--items", "8", "--tests", "2", "--prompts", "12", "--work", str(tmp_path / "work")]
    # a model of random weights repeats itself
    spoken = "rehearsal.max_repetition=1 rehearsal.temperature=1.0 rehearsal.max_new_tokens=8"
    done = subprocess.run(
        [
            sys.executable,
            script,
            "--borrow",
            "--wheel",
            built[0],
            "--model",
            tiny_model_folder,
            *sizes,
            "--overrides",
            spoken,
            "--out",
            transcript,
        ],
        env=build_wheel.clean_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    said = transcript.read_text(encoding="utf-8")
    typed = [line.split()[1:3] for line in said.splitlines() if line.startswith("$ ")]
    words = [["cofitune", word] for word in ("init", "config", "rehearse", "train", "eval", "chat", "export")]
    assert typed == [*words, ["cat", "answer.py"], ["python", "answer.py"]]
    assert str(tmp_path) not in said, "no path of this machine"
    place = tmp_path / "work" / "place"
    assert (place / "runs/ledger/train/delta.safetensors").is_file() and (place / "models/ledger/README.md").is_file()
    schema = (place / "ledger.yaml").read_text(encoding="utf-8").splitlines()[0].partition("$schema=")[2]
    assert Path(schema).is_file() and "site-packages" in schema


@pytest.mark.interpreter
def test_the_tests_of_the_sdist_run_where_it_is_unpacked(built: tuple[Path, Path, Path], tmp_path: Path) -> None:
    [unpacked] = built[1].parents[1].joinpath("unpacked").iterdir()
    some = ["tests/test_jsonl.py", "tests/docs/test_project_files.py", "tests/config/test_shipped.py"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        f"--basetemp={tmp_path}/t",
    ]
    where = "import cofitune, sys; sys.exit(not cofitune.__file__.startswith(sys.argv[1]))"
    for words in ([sys.executable, "-c", where, str(unpacked)], [*command, *some]):
        done = subprocess.run(
            words,
            cwd=unpacked,
            env=build_wheel.clean_environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"] and project["project"]["dynamic"] == ["readme", "version"]
