"""Builds the built-in bilingual emoji set: `src/m2_encoder/assets/emoji/{concepts.jsonl,<style>.webps}`.

Inputs, pinned (another version builds another set, and the tests of the set say what changed)::

    npm install --prefix DIR cldr-annotations-full@48.2.0 cldr-annotations-derived-full@48.2.0 \
        @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5 \
        @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/openmoji@1.2.29
    pip install 'm2-encoder[build-data]'            # resvg-py 0.5.0, emoji 2.16.0, pillow 13.0.0
    python scripts/build_emoji_data.py --node-modules DIR/node_modules

The same inputs give the same bytes; it takes about a minute on one core.

A concept is a fully-qualified emoji without skin tone that CLDR names in both languages and that both Twemoji
and OpenMoji draw: 1,914 of 1,923 (Twemoji lacks the nine newest). Those two are the complete sets. Noto's
icons have no country flags; Fluent's have no flags, hardly any couples and families, and no emoji of the last
years, so 1,594 concepts exist in all four styles.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops

from m2_encoder.data.emoji.dataset import EMOJI_STYLES, IMAGE_SIZE_PX

VERSIONS = {
    "cldr-annotations-full": "48.2.0",
    "cldr-annotations-derived-full": "48.2.0",
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/twemoji": "1.2.5",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/openmoji": "1.2.29",
}
ICON_PACKAGES = {style: f"@iconify-json/{style}" for style in EMOJI_STYLES} | {
    "fluent": "@iconify-json/fluent-emoji-flat"
}
COMPLETE_STYLES = ("twemoji", "openmoji")
RENDER_SIZE_PX = 4 * IMAGE_SIZE_PX
MARGIN = 0.03
WEBP_QUALITY = 80

# The seed was searched for split sizes of 1,494, 267 and 153 concepts with the three largest families (man,
# woman, person) all in training: many of their 122 concepts differ in that word alone. No model took part.
SPLIT_SEED = "m2-encoder-emoji-6116"
SPLIT_SHARES = (("heldout", 0.08), ("val", 0.14))  # the rest is "train"

JOINER, VARIATION = "\u200d", "\ufe0f"
SKIN_TONES = tuple(chr(code) for code in range(0x1F3FB, 0x1F400))
HAN = re.compile(r"[\u3007\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]")
SHORT_CODE = re.compile(r"[A-Za-z]\d")  # "clock530", "u7a7a" and "dog2" are for typing, not words
KANA = re.compile(r"[\u3040-\u30ff]")


def to_key(character: str) -> str:
    return "-".join(f"{ord(c):x}" for c in character.replace(VARIATION, ""))


def to_family(key: str) -> str:
    """The part before the first joiner or skin tone; sequences without one (flags, keycaps) are whole."""
    cut = {f"{ord(c):x}" for c in (JOINER, *SKIN_TONES)}
    codes = key.split("-")
    stop = next((i for i, code in enumerate(codes) if i and code in cut), len(codes))
    return "-".join(codes[:stop])


def to_split(family: str) -> str:
    number = int.from_bytes(hashlib.sha256(f"{SPLIT_SEED}/{family}".encode()).digest()[:8], "big") / 2**64
    for split, share in SPLIT_SHARES:
        if number < share:
            return split
        number -= share
    return "train"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def check_versions(modules: Path) -> None:
    for name, wanted in VERSIONS.items():
        path = modules / name / "package.json"
        if not path.is_file():
            sys.exit(f"{path} is missing; the head of {Path(__file__).name} has the npm line that installs it")
        found = read_json(path)["version"]
        if found != wanted:
            sys.exit(f"{name} is {found}, but the set is built from {wanted}; install that version")


def read_annotations(modules: Path, language: str) -> dict[str, dict[str, list[str]]]:
    """CLDR's names ("tts") and keywords ("default") by key."""
    merged: dict[str, dict[str, list[str]]] = {}
    for package, folder in (
        ("cldr-annotations-full", "annotations"),
        ("cldr-annotations-derived-full", "annotationsDerived"),
    ):
        entries = read_json(modules / package / folder / language / "annotations.json")[folder]["annotations"]
        merged |= {to_key(character): entry for character, entry in entries.items()}
    return merged


def read_icons(modules: Path, style: str) -> dict[str, str]:
    """One square SVG document by key. Icons that are not square are centred, never stretched."""
    folder = modules / ICON_PACKAGES[style]
    icons, characters = read_json(folder / "icons.json"), read_json(folder / "chars.json")
    documents = {}
    for codes, name in characters.items():
        key = to_key("".join(chr(int(code, 16)) for code in codes.split("-")))
        icon = icons["icons"][name]
        box = [icon.get(side, icons.get(side, 0)) for side in ("left", "top", "width", "height")]
        documents[key] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{RENDER_SIZE_PX}" height="{RENDER_SIZE_PX}" '
            f'viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'
        )
    return documents


def read_groups(modules: Path) -> dict[str, str]:
    folder = modules / ICON_PACKAGES["twemoji"]
    names = {
        name: group for group, members in read_json(folder / "metadata.json")["categories"].items() for name in members
    }
    characters = read_json(folder / "chars.json")
    return {
        to_key("".join(chr(int(c, 16)) for c in codes.split("-"))): names[name] for codes, name in characters.items()
    }


def clean_caption(text: str, language: str) -> str:
    """One caption as people write it: straight quotes in English, full-width colons in Chinese."""
    text = re.sub(r"^:(.+):$", r"\1", text.strip()).replace("_", " " if language == "en" else "：")
    text = text.replace("’", "'").replace("‘", "'")
    text = re.sub(r"\s*[:：]\s*", "：", text) if language == "zh" else text.replace("“", '"').replace("”", '"')
    return re.sub(r"\s+", " ", text).strip()


def is_usable(text: str, language: str, emoji_library: Any) -> bool:
    """Keeps captions in the script of their language: Han for Chinese; two letters or digits for English."""
    if emoji_library.emoji_count(text) or KANA.search(text):
        return False
    if language == "zh":
        return bool(HAN.search(text))
    return not HAN.search(text) and sum(character.isalnum() for character in text) >= 2


def fold(text: str) -> str:
    """What two spellings of one caption share: letters and digits, without case."""
    return "".join(character for character in text.casefold() if character.isalnum())


def make_captions(
    annotation: Mapping[str, Sequence[str]], variants: Sequence[str], language: str, library: Any
) -> dict[str, Any]:
    """Name, aliases and keywords of one concept in one language, each text once."""
    name = clean_caption(annotation["tts"][0], language)
    seen = {fold(name)}

    def distinct(texts: Sequence[str]) -> list[str]:
        kept = []
        for text in (clean_caption(text, language) for text in texts):
            if is_usable(text, language, library) and fold(text) not in seen:
                seen.add(fold(text))
                kept.append(text)
        return kept

    aliases = distinct([variant for variant in variants if not SHORT_CODE.search(variant)])
    return {"name": name, "aliases": aliases, "keywords": distinct(annotation["default"])}


def build_concepts(modules: Path, icons: Mapping[str, Mapping[str, str]]) -> list[dict[str, Any]]:
    import emoji

    emoji.config.load_language("zh")
    qualified = {
        to_key(character): record
        for character, record in emoji.EMOJI_DATA.items()
        if record["status"] == emoji.STATUS["fully_qualified"] and not any(tone in character for tone in SKIN_TONES)
    }
    annotations = {language: read_annotations(modules, language) for language in ("en", "zh")}
    groups = read_groups(modules)
    concepts = []
    for key in sorted(qualified, key=lambda key: [int(code, 16) for code in key.split("-")]):
        named = all(key in annotations[language] for language in annotations)
        if not named or not all(key in icons[style] for style in COMPLETE_STYLES):
            continue
        record = qualified[key]
        variants = {"en": [record["en"], *record.get("alias", [])], "zh": [record["zh"]]}
        captions = {
            language: make_captions(annotations[language][key], variants[language], language, emoji)
            for language in annotations
        }
        family = to_family(key)
        styles = [style for style in EMOJI_STYLES if key in icons[style]]
        head = {
            "key": key,
            "family": family,
            "group": groups[key],
            "split": to_split(family),
            "styles": styles,
        }
        concepts.append(head | captions)
    return concepts


def trim(image: Image.Image) -> Image.Image:
    """A square with the drawing in its middle and `MARGIN` of the drawing's longer side around it."""
    box = ImageChops.difference(image, Image.new("RGB", image.size, "white")).getbbox()
    if box is None:
        raise ValueError("the drawing is blank")
    drawing = image.crop(box)
    side = round(max(drawing.size) * (1 + 2 * MARGIN))
    square = Image.new("RGB", (side, side), "white")
    square.paste(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2))
    return square


def rasterise(document: str) -> bytes:
    """One SVG as WebP: drawn large on white, trimmed to its ink, centred in a square, then reduced.

    Each set leaves another margin around its drawings (the median drawing covers 73 % of OpenMoji's canvas and all of
    Twemoji's). The margin is a property of the canvas and not of the drawing, so all styles get the same one.
    """
    import resvg_py

    drawn = Image.open(
        io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=document, background="#ffffff", skip_system_fonts=True))),
        formats=("PNG",),
    )
    image = trim(drawn.convert("RGB")).resize((IMAGE_SIZE_PX, IMAGE_SIZE_PX), Image.Resampling.LANCZOS)
    if np.asarray(image).std() < 1.0:
        raise ValueError(f"an icon is blank: {document[:200]}")
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=WEBP_QUALITY, method=6)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--node-modules", type=Path, required=True, help="folder in which npm installed the inputs")
    root = Path(__file__).resolve().parents[1]
    parser.add_argument(
        "--output", type=Path, default=root / "src/m2_encoder/assets/emoji", help="default: %(default)s"
    )
    arguments = parser.parse_args()
    try:
        import emoji  # noqa: F401
        import resvg_py  # noqa: F401
    except ImportError as error:
        sys.exit(f"{error}; pip install 'm2-encoder[build-data]'")
    check_versions(arguments.node_modules)
    arguments.output.mkdir(parents=True, exist_ok=True)

    icons = {style: read_icons(arguments.node_modules, style) for style in EMOJI_STYLES}
    concepts = build_concepts(arguments.node_modules, icons)
    lines = [json.dumps(concept, ensure_ascii=False, separators=(",", ":")) for concept in concepts]
    (arguments.output / "concepts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(concepts)} concepts:", dict(Counter(concept["split"] for concept in concepts)))
    for style in EMOJI_STYLES:
        keys = [concept["key"] for concept in concepts if style in concept["styles"]]
        blob = b"".join(rasterise(icons[style][key]) for key in keys)
        (arguments.output / f"{style}.webps").write_bytes(blob)
        print(f"{style}: {len(keys)} images, {len(blob) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
