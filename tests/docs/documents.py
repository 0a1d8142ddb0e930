"""The documents as tests read them: their code blocks, inline code, headings and links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from docs import reference

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^ *(`{3,})(\{?[\w-]*\}?)")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
INLINE = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, and where it stands."""

    language: str
    text: str
    where: str


def documents() -> list[Path]:
    """README, the pages and the other documents of the repository's root."""
    return [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]


def split(path: Path) -> tuple[list[Block], str]:
    """A document's fenced blocks, and the rest of its text."""
    blocks: list[Block] = []
    prose: list[str] = []
    inside: list[str] | None = None
    fence, language, began = "", "", 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        opened = FENCE.match(line)
        if inside is None and opened:
            inside, fence, language, began = [], opened[1], opened[2], number
        elif inside is not None and line.strip() == fence:
            blocks.append(Block(language, "\n".join(inside), f"{path.relative_to(ROOT)}:{began}"))
            inside = None
        elif inside is not None:
            inside.append(line)
        else:
            prose.append(line)
    assert inside is None, f"{path}: the block of line {began} does not end"
    return blocks, "\n".join(prose)


def blocks(*languages: str) -> list[Block]:
    """The blocks in these languages, of all documents."""
    return [block for path in documents() for block in split(path)[0] if block.language in languages]


def commands(block: Block) -> Iterator[str]:
    """A shell block's commands: continued lines joined, comments left out."""
    for line in re.sub(r"\\\n\s*", " ", block.text).splitlines():
        if (text := line.strip()) and not text.startswith("#"):
            yield text


def anchors(path: Path) -> set[str]:
    """The names by which a page's headings are linked to, as GitHub and MyST make them."""
    text = split(path)[1]
    generated = reference.fill_in(text) if path.is_relative_to(DOCS) else text
    headings = re.findall(r"^#{1,6} (.+)$", generated, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower().strip()).replace(" ", "-") for heading in headings}
