"""The build's one step that pyproject.toml cannot say: configs/ travels in the wheel, as cofitune/configs.

An editable install needs no copy: `cofitune.config.shipped` finds the folder beside the package.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CONFIGS = Path("configs")


class BuildWithConfigs(build_py):
    """Copies configs/ below the package that is built."""

    def run(self) -> None:
        """Build, and put the configs in."""
        super().run()
        if not self.editable_mode:
            shutil.copytree(CONFIGS, Path(self.build_lib) / "cofitune" / "configs", dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithConfigs})
