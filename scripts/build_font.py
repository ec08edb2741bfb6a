"""Builds the font of our pictures: `src/m2_encoder/assets/fonts/NotoSansSC-subset.ttf` and its licence.

Input, pinned (Noto Sans SC, SIL Open Font License 1.1)::

    npm install --prefix DIR @fontsource/noto-sans-sc@5.3.0
    pip install 'm2-encoder[build-data]'            # fonttools 4.68.0, brotli 1.2.1
    python scripts/build_font.py --node-modules DIR/node_modules

The same input gives the same bytes, in seconds. The subset holds Latin-1, the punctuation of both languages, full-width
letters and digits, level 1 of GB 2312 (the 3,755 most common simplified characters), every character of the built-in
captions, and of the others those that are most frequent in the dictionary of jieba 0.42.1.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from m2_encoder.data.emoji.dataset import load_emoji_concepts

PACKAGE, VERSION = "@fontsource/noto-sans-sc", "5.3.0"
REGULAR = "noto-sans-sc-{}-400-normal.woff2"
PUNCTUATION = "‐–—―‘’“”…‰′″※←↑→↓×÷±≤≥≈∞、。〈〉《》「」『』【】〔〕·！（），：；？％＋－＝～＆／￥"

FREQUENT = 850  # further characters, as many as 1.5 MB hold


def frequent_characters(known: set[str]) -> list[str]:
    """The most frequent ideographs of jieba's dictionary, without known ones; equally frequent ones in their order."""
    import jieba

    counts: Counter[str] = Counter()
    for line in jieba.get_dict_file().read().decode("utf-8").splitlines():
        word, count, *_ = line.split(" ")
        for character in {c for c in word if "\u4e00" <= c <= "\u9fff"}:
            counts[character] += int(count)
    ranked = sorted(counts.keys() - known, key=lambda character: (-counts[character], character))
    return ranked[:FREQUENT]


def wanted_characters() -> set[str]:
    latin = {chr(code) for code in (*range(0x20, 0x7F), *range(0xA0, 0x100))}
    # Rows 16 to 55 of GB 2312 are its level 1; the last five cells of row 55 are empty.
    level_1 = bytes(byte for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFF) for byte in (row, cell))
    captions = "".join(
        text for concept in load_emoji_concepts() for spoken in concept.captions.values() for text in spoken.texts()
    )
    full_width = {chr(code) for code in (*range(0xFF01, 0xFF5F), *range(0xFFE0, 0xFFE7))}
    known = latin | full_width | set(PUNCTUATION) | set(level_1.decode("gb2312", errors="ignore")) | set(captions)
    return known | set(frequent_characters(known))


def subset(path: Path, characters: Iterable[str]) -> Any:
    """One file of the package reduced to `characters`, without hinting and layout rules."""
    from fontTools import subset as font_subset
    from fontTools.ttLib import TTFont

    options = font_subset.Options()
    options.layout_features = []
    options.hinting = False
    options.notdef_outline = True
    options.name_IDs = ["*"]
    options.drop_tables += ["GSUB", "GPOS", "GDEF", "BASE", "vhea", "vmtx", "VORG", "STAT"]
    subsetter = font_subset.Subsetter(options)
    subsetter.populate(text="".join(sorted(characters)))
    font = TTFont(path, recalcTimestamp=False)
    font.flavor = None
    subsetter.subset(font)
    return font


def build(folder: Path) -> tuple[bytes, set[str]]:
    """The merged font, and the wanted characters that the package lacks."""
    from fontTools.merge import Merger
    from fontTools.ttLib import TTFont

    wanted = wanted_characters()
    parts, found = [], set[str]()
    # The package cuts the font by script and again into numbered slices; some characters are in slices alone.
    first = [folder / "files" / REGULAR.format(part) for part in ("latin", "chinese-simplified", "latin-ext")]
    slices = sorted(set((folder / "files").glob(REGULAR.format("*"))) - set(first))
    for path in (*first, *slices):
        here = {chr(code) for code in TTFont(path).getBestCmap()} & wanted - found
        if not here:
            continue
        found |= here
        part = io.BytesIO()
        subset(path, here).save(part)
        part.seek(0)
        parts.append(part)
    font = Merger().merge(parts)
    font.recalcTimestamp = False
    font["head"].created = font["head"].modified = TTFont(first[0])["head"].modified
    for record in font["name"].names:
        if record.nameID in (1, 16):
            record.string = "Noto Sans SC Subset"
        elif record.nameID in (4, 6):
            record.string = "NotoSansSCSubset-Regular"
    output = io.BytesIO()
    font.save(output)
    return output.getvalue(), wanted - found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--node-modules", type=Path, required=True, help="folder in which npm installed the font")
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("--output", type=Path, default=root / "src/m2_encoder/assets/fonts")
    arguments = parser.parse_args()
    try:
        import brotli  # noqa: F401
        import fontTools  # noqa: F401
    except ImportError as error:
        sys.exit(f"{error}; pip install 'm2-encoder[build-data]'")
    folder = arguments.node_modules / PACKAGE
    if not (folder / "package.json").is_file():
        sys.exit(f"{folder} is missing; the head of {Path(__file__).name} has the npm line that installs it")
    found = json.loads((folder / "package.json").read_text(encoding="utf-8"))["version"]
    if found != VERSION:
        sys.exit(f"{PACKAGE} is {found}, but the subset is built from {VERSION}; install that version")
    arguments.output.mkdir(parents=True, exist_ok=True)
    content, missing = build(folder)
    (arguments.output / "NotoSansSC-subset.ttf").write_bytes(content)
    shutil.copyfile(folder / "LICENSE", arguments.output / "OFL.txt")
    print(f"{len(content) / 1e6:.2f} MB; not in the font: {''.join(sorted(missing)) or 'nothing'}")


if __name__ == "__main__":
    main()
