"""Build the sdist and, from it, the wheel; and make an environment that has the wheel and borrows what it depends on.

    python scripts/build_wheel.py FOLDER    # FOLDER/dist/*.whl, FOLDER/dist/*.tar.gz, FOLDER/env/bin/cofitune

Nothing is downloaded: the environment sees the packages of the one that runs this, but not its cofitune.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
_LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", ".cache", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache"
)
_CALL = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def build(folder: Path) -> tuple[Path, Path]:
    """Build both from a copy of the checkout, the wheel from what the sdist holds. Returns the wheel and the sdist."""
    dist = folder / "dist"
    dist.mkdir(parents=True)
    shutil.copytree(REPOSITORY, folder / "source", ignore=_LEFT_OUT, symlinks=True)
    _run([sys.executable, "-c", _CALL, "build_sdist", str(dist)], folder / "source")
    [sdist] = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    [unpacked] = (folder / "unpacked").iterdir()
    _run([sys.executable, "-c", _CALL, "build_wheel", str(dist)], unpacked)
    [wheel] = dist.glob("*.whl")
    return wheel, sdist


def install(wheel: Path, folder: Path) -> Path:
    """Make a virtual environment with the wheel in it. Returns its `cofitune`."""
    _run([sys.executable, "-m", "venv", "--without-pip", str(folder)], wheel.parent)
    [packages] = folder.glob("lib/python3*/site-packages")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "--python", str(folder / "bin/python")]
    _run([*pip, "install", "--no-deps", "--no-index", str(wheel)], wheel.parent)
    # a path in a .pth is searched, but the .pth files there are not read: an editable cofitune there stays unseen
    (packages / "borrowed.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n", encoding="utf-8")
    return folder / "bin" / "cofitune"


def clean_environment() -> dict[str, str]:
    """The environment's variables without what would lead back to the checkout."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, env=clean_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    built, source = build(target)
    print(built, source, install(built, target / "env"), sep="\n")
