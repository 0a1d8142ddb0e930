"""The build's two steps that pyproject.toml cannot say.

configs/ travels in the wheel, as cofitune/configs; an editable install needs no copy: `cofitune.config.shipped` finds
the folder beside the package. And README, whose links are files of the repository, becomes the page of a package index.
"""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
CONFIGS = Path("configs")
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)")  # to a file of the repository


class BuildWithConfigs(build_py):
    """Copies configs/ below the package that is built."""

    def run(self) -> None:
        """Build, and put the configs in."""
        super().run()
        if not self.editable_mode:
            shutil.copytree(CONFIGS, Path(self.build_lib) / "cofitune" / "configs", dirs_exist_ok=True)


def index_page(readme: str, repository: str | None) -> str:
    """README as an index shows it, where a relative link leads nowhere.

    Links and pictures lead into the repository. Without its address (`Repository` of [project.urls]) a link becomes its
    text, since a dead link is worse than none.
    """

    def rewritten(link: re.Match[str]) -> str:
        mark, text, target = link.groups()
        if repository is None:
            return text
        return f"{mark}[{text}]({repository.rstrip('/')}/{'raw' if mark else 'blob'}/main/{target})"

    return _LINK.sub(rewritten, readme)


if __name__ == "__main__":
    urls = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    page = index_page((HERE / "README.md").read_text(encoding="utf-8"), urls.get("Repository"))
    setup(
        cmdclass={"build_py": BuildWithConfigs},
        long_description=page,
        long_description_content_type="text/markdown",
    )
