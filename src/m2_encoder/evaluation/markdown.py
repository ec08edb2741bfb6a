"""Markdown of measured numbers: tables, and sections of documents that a script keeps up to date."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def to_markdown(lines: Iterable[Sequence[str]]) -> str:
    """A table.

    Args:
        lines: cells of the header, of the rule below it (`---`, `--:`), and of every row.
    """
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replace_section(text: str, name: str, content: str) -> str:
    """Put `content` between the two markers of a section.

    Args:
        text: of the document, with `<!-- name:begin -->` and `<!-- name:end -->`.
        name: of the section.
        content: what takes the place of everything between them.

    Raises:
        ValueError: unless each marker is there exactly once, in order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the document must hold {begin} and then {end}, once each")
    head, rest = text.split(begin)
    return f"{head}{begin}\n\n{content.strip()}\n\n{end}{rest.split(end)[1]}"
