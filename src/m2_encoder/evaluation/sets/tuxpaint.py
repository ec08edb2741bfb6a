"""Stamps of Tux Paint, as Debian's `tuxpaint-stamps-default` installs them, with captions in many languages.

Beside each `.png` or `.svg` lies a `.txt`: the English caption, then `<language>.utf8=<caption>` lines. They are under
the GPL: read where they lie, and never copied. Stamps of equal captions are all right for that caption.
Letters, numbers, coins and other signs are the subset "symbols", everything else is "pictures".
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from m2_encoder.data.shards.names import walk_files
from m2_encoder.errors import UserError, name_some
from m2_encoder.evaluation.sets.base import EvaluationSet, Texts
from m2_encoder.evaluation.sets.layouts import expect
from m2_encoder.evaluation.sets.pictures import FilePictures, is_picture
from m2_encoder.evaluation.sets.published import compare_size
from m2_encoder.evaluation.sets.texts import count_texts, pair_rows, read_text

DEBIAN_FOLDER: Final = "/usr/share/tuxpaint/stamps"
"""Where Debian's package puts the stamps."""

_LINE = re.compile(r"(?P<language>[a-z]{2,3}(?:_[A-Z]{2})?(?:@\w+)?)\.utf8=(?P<caption>.*)")
_SYMBOLS: Final = "symbols/"
_SVG, _TEXT = ".svg", ".txt"


class _Stamp(NamedTuple):
    picture: str  # path below the root
    captions: Mapping[str, str]  # by language


def read_tuxpaint(
    path: str | os.PathLike[str] = DEBIAN_FOLDER,
    *,
    languages: Sequence[str] | None = None,
    name: str = "tuxpaint",
) -> EvaluationSet:
    """Read the stamps of a folder.

    A stamp without a picture that can be read (some have an `.svg` alone), and a picture without a caption (such as a
    mirrored one), are left out and counted.

    Args:
        path: of the folder.
        languages: which ones, as they are called there, such as ["zh_CN", "en"]; None takes all.
        name: in tables.

    Raises:
        UserError: if the package is not installed, for another layout, an unknown language, and texts that are not
            UTF-8.
    """
    if os.fspath(path) == DEBIAN_FOLDER and not Path(path).is_dir():
        raise UserError(
            f"{DEBIAN_FOLDER} is not there; install it with: apt-get install tuxpaint-stamps-default, or give the "
            "folder of its stamps"
        )
    root = expect(path, "tuxpaint")
    stamps, left_out = _list_stamps(root)
    known = {language for stamp in stamps for language in stamp.captions}
    if unknown := [language for language in languages or () if language not in known]:
        raise UserError(f"{root}: has no captions in {name_some(unknown)}; it has {name_some(sorted(known), 100)}")
    texts, rows = _texts(stamps, sorted(known) if languages is None else languages)
    is_symbol = torch.tensor([stamp.picture.startswith(_SYMBOLS) for stamp in stamps])
    return compare_size(
        EvaluationSet(
            name=name,
            pictures=FilePictures(root, [stamp.picture for stamp in stamps]),
            texts=texts,
            subsets={"symbols": is_symbol.nonzero().flatten(), "pictures": (~is_symbol).nonzero().flatten()},
            parallel=_translations(rows),
            source=str(root),
            counts={"pictures": len(stamps), "left_out": dict(left_out), **count_texts(texts)},
        )
    )


def _list_stamps(root: Path) -> tuple[list[_Stamp], Counter[str]]:
    stamps: list[_Stamp] = []
    left_out: Counter[str] = Counter()
    for folder, names in walk_files(root):
        kinds: dict[str, list[str]] = {}
        for file in names:
            stem, suffix = os.path.splitext(file)
            if is_picture(file) or suffix in (_SVG, _TEXT):
                kinds.setdefault(stem, []).append(suffix)
        for stem, suffixes in sorted(kinds.items()):
            pictures = [suffix for suffix in suffixes if suffix not in (_SVG, _TEXT)]
            if not pictures:
                left_out["only an .svg" if _SVG in suffixes else "a caption without a picture"] += 1
            elif _TEXT not in suffixes:
                left_out["a picture without a caption"] += 1
            else:
                captions = _read_captions(Path(folder, stem + _TEXT))
                place = os.path.relpath(os.path.join(folder, stem + pictures[0]), root).replace(os.sep, "/")
                stamps.append(_Stamp(place, captions))
    return stamps, left_out


def _read_captions(file: Path) -> dict[str, str]:
    lines = read_text(file).split("\n")
    found = {"en": lines[0].strip()}
    for line in lines[1:]:
        match = _LINE.fullmatch(line.strip())
        if match is None and line.strip():
            raise UserError(f"{file}: {line.strip()[:60]!r} is no translation; wanted <language>.utf8=<caption>")
        if match is not None:
            found.setdefault(match["language"], match["caption"].strip())
    return {language: caption for language, caption in found.items() if caption}


def _texts(stamps: Sequence[_Stamp], languages: Sequence[str]) -> tuple[dict[str, Texts], dict[str, list[int]]]:
    """Each caption of a language once, with all its stamps; and the row of each stamp's caption, -1 without one."""
    texts, rows = {}, {}
    for language in languages:
        distinct: dict[str, int] = {}
        own = [
            distinct.setdefault(stamp.captions[language], len(distinct)) if language in stamp.captions else -1
            for stamp in stamps
        ]
        pairs = sorted((row, picture) for picture, row in enumerate(own) if row >= 0)
        texts[language] = Texts(tuple(distinct), pair_rows(*zip(*pairs, strict=True)))
        rows[language] = own
    return texts, rows


def _translations(rows: Mapping[str, Sequence[int]]) -> dict[tuple[str, str], Tensor]:
    """Captions of one stamp in a language and in English, each pair of rows once."""
    if "en" not in rows:
        return {}
    found = {}
    for language, own in rows.items():
        pairs = sorted({(row, other) for row, other in zip(own, rows["en"], strict=True) if min(row, other) >= 0})
        if language != "en":
            found[language, "en"] = pair_rows(*zip(*pairs, strict=True))
    return found
