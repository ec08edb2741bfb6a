"""Open Clip Art of Debian (public domain) as a table of pictures with English captions, as their authors wrote them."""

from __future__ import annotations

import json
import re
from collections import Counter
from html import unescape
from pathlib import Path

PICTURES = Path("/usr/share/openclipart/png")  # of openclipart-png
TITLES = Path("/usr/share/openclipart/svg")  # of openclipart-svg; the same names
NO_PICTURES = ("special", "shapes/stars", "shapes/arrows")  # patterns, gradients, and series of one shape
MOST_ALIKE = 3  # pictures of one caption; more have that of their collection

_TITLE = re.compile(r"<dc:title>([^<]*)</dc:title>")
_WORD = re.compile(r"<rdf:li>([^<]*)</rdf:li>")


def write_table(path: Path) -> int:
    """A row for each picture, "title, keyword, keyword", but for titles of whole collections; returns how many."""
    captions = {}
    for picture in sorted(PICTURES.rglob("*.png")):
        place = picture.relative_to(PICTURES)
        if place.as_posix().startswith(NO_PICTURES):
            continue
        source = (TITLES / place).with_suffix(".svg").read_text(encoding="utf-8", errors="replace")
        captions[picture] = read_caption(source)
    often = Counter(captions.values())
    rows = [
        {"image": str(picture), "captions": {"en": caption}}
        for picture, caption in captions.items()
        if caption and often[caption] <= MOST_ALIKE
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


def read_caption(source: str) -> str:
    """Title and keywords that add a word to it; empty for none."""
    found = _TITLE.search(source)
    title = " ".join(unescape(found[1]).lower().split()) if found else ""
    if not title:
        return ""
    said = [title]
    for word in map(unescape, _WORD.findall(source)):
        word = " ".join(word.lower().split())
        if word and " " not in word and word not in ", ".join(said):
            said.append(word)
    return ", ".join(said[:4])
