"""The files that other programs read about the project: citation, hooks, workflow, changelog."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import yaml

from cofitune import __version__
from tests.docs.documents import ROOT


def _yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_citation_names_this_version_and_the_readmes_paper() -> None:
    citation = _yaml("CITATION.cff")
    assert citation["version"] == __version__
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    paper = citation["preferred-citation"]
    assert paper["title"] in readme
    assert all(f"{author['family-names']}, {author['given-names']}" in readme for author in paper["authors"])


def test_hooks_and_workflow_start_what_there_is() -> None:
    hooks = [hook for repo in _yaml(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert {hook["entry"].split()[0] for hook in hooks} == {
        ".venv/bin/ruff",
        ".venv/bin/mypy",
        ".venv/bin/lint-imports",
    }
    steps = _yaml(".github/workflows/ci.yml")["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step][-1] == ".ci/run"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_the_extras_of_the_documents_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    install = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    table = install.partition("| extra | for |")[2].partition("\n\n")[0]
    assert set(
        re.findall(r"`([\w-]+)`", "".join(line.split("|")[1] for line in table.splitlines() if "|" in line))
    ) == set(project["optional-dependencies"])


def test_the_changelog_begins_with_what_is_unreleased() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased"
