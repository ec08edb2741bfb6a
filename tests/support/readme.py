"""The README, taken apart: fenced blocks, commands in them, links, and code in running text."""

from __future__ import annotations

import re
import shlex
from typing import NamedTuple

KINDS = ("python", "bash", "yaml", "bibtex")
"""Kinds of blocks that a test takes care of."""

_FENCE = re.compile(r"^```(.*)$")
_FILE = re.compile(r"# ((?:my|conf|src)/\S+\.(?:py|yaml))")


class Block(NamedTuple):
    """One fenced block.

    Attributes:
        kind: what stands behind the opening fence.
        text: the lines between the fences.
        line: where it starts in the README, from 1.
    """

    kind: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The file that the block shows, named by a comment at its top (Hydra wants its own comment first)."""
        found = (_FILE.fullmatch(line) for line in self.text.splitlines()[:2])
        return next((match[1] for match in found if match), None)


def split_blocks(readme: str) -> tuple[list[Block], str]:
    """All blocks, and the text around them."""
    blocks: list[Block] = []
    prose: list[str] = []
    kind, start, inside = None, 0, list[str]()
    for number, line in enumerate(readme.splitlines(), start=1):
        fence = _FENCE.match(line)
        if fence and kind is None:
            kind, start, inside = fence[1].strip(), number, []
        elif fence:
            assert not fence[1], f"README.md:{number}: a block begins inside the one of line {start}"
            blocks.append(Block(kind or "", "\n".join(inside) + "\n", start))
            kind = None
        else:
            (prose if kind is None else inside).append(line)
    assert kind is None, f"README.md:{start}: the block does not end"
    return blocks, "\n".join(prose)


def commands(block: Block) -> list[list[str]]:
    """Command lines of a bash block as arguments, comments left out."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def inline_code(prose: str) -> list[str]:
    """What stands between single backticks."""
    return re.findall(r"`([^`\n]+)`", prose)


def links(prose: str) -> list[str]:
    """Targets of links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", prose)


def anchors(prose: str) -> set[str]:
    """Anchors that a code-hosting page gives to the headings."""
    headings = re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
