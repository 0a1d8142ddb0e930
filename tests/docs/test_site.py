"""The site: it builds without a warning, its references are whole, and its remedies are for messages that exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cofitune.config.schema import Config
from docs import reference
from tests.chromium import browser, find_chromium
from tests.docs.documents import DOCS, ROOT, split

REMEDY = re.compile(r"^\| (`.+?) \| ", re.MULTILINE)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("furo")  # the extra `docs`, which `dev` has
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.processes
def test_the_site_builds_without_a_warning(site: Path) -> None:
    assert "gradient_accumulation_steps" in (site / "config.html").read_text(encoding="utf-8")
    assert "<math" in (site / "method.html").read_text(encoding="utf-8")


@pytest.mark.processes
def test_no_link_of_the_site_is_dead(site: Path) -> None:
    dead = []
    for page in site.glob("*.html"):
        for target in re.findall(r'(?:href|src)="([^"#?:]+)(?:[#?][^"]*)?"', page.read_text(encoding="utf-8")):
            if not (page.parent / target).exists():
                dead.append(f"{page.name}: {target}")
    assert not dead


@pytest.mark.processes
def test_pages_fit_a_phone_and_a_desktop_in_light_and_dark(site: Path) -> None:
    path = find_chromium()
    if path is None:
        pytest.skip("no browser here")
    with browser(path) as tab:
        for page in sorted(site.glob("*.html")):
            for width, scheme in ((390, "light"), (1280, "dark")):
                tab.open(page, width, scheme)
                root = "document.documentElement"
                assert tab.run(f"{root}.scrollWidth - {root}.clientWidth") == 0, f"{page.name} is too wide for {width}"
                assert not tab.complaints, page.name
                assert not [r for r in tab.requests if not r.startswith(("file:", "data:"))], page.name
        tab.call("Page.navigate", url=(site / "search.html").as_uri() + "?q=rehearsal")
        found = "document.querySelectorAll('#search-results li a').length"
        wait = f"new Promise(ok => {{const t = setInterval(() => {{if ({found}) {{clearInterval(t); ok(1)}}}}, 50)}})"
        tab.run(f"Promise.race([{wait}, new Promise(ok => setTimeout(ok, 20000))])")
        assert tab.run(found)


def test_the_config_reference_has_every_key() -> None:
    text = reference.config_reference()
    missing = [
        f"{section}.{key}"
        for section, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields")
        for key in field.annotation.model_fields
        if f"| `{key}` |" not in text.partition(f"## `{section}`\n")[2].partition("\n## ")[0]
    ]
    assert not missing
    described = re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \|$", text, re.MULTILINE)
    assert described and not [key for key, meaning in described if not meaning.strip()]


def test_the_command_reference_has_every_command_and_option() -> None:
    text = reference.cli_reference()
    commands = dict(reference.cli_commands())
    assert len(commands) >= 13 and "config show" in commands
    for name, command in commands.items():
        part = text.partition(f"## `cofitune {name}`\n")[2].partition("\n## ")[0]
        options = [option for p in command.params for option in p.opts if option.startswith("--")]
        assert part and not [option for option in options if option not in part]


def test_the_architecture_has_a_word_on_every_room() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    rooms = [p for p in (ROOT / "cofitune").iterdir() if not p.name.startswith("__") and p.name != "py.typed"]
    assert len(rooms) > 15
    assert not [room.name for room in rooms if f"`cofitune/{room.name}" not in text]
    recipes = [p.name for p in (ROOT / "cofitune" / "recipes").iterdir() if p.is_dir() and p.name != "__pycache__"]
    part = text.partition("**`cofitune/recipes/`**")[2].partition("\n\n")[0]
    assert not [name for name in recipes if f"`{name}`" not in part]


def test_remedies_are_for_messages_that_exist() -> None:
    page = split(DOCS / "troubleshooting.md")[1]
    parts = [part for row in REMEDY.findall(page) for part in re.findall(r"`([^`]+)`", row)]
    assert len(parts) > 30
    words = "\n".join(text for path in (ROOT / "cofitune").rglob("*.py") for text in _messages(path))
    assert not [part for part in parts if part not in words]


def _messages(path: Path) -> Iterator[str]:
    """A file's literal texts, adjacent ones joined, as messages show them; what is filled in is left out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
