"""The built-in drawings as picture files, for whoever has no pictures at hand to search in."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from m2_encoder.data.emoji.dataset import EMOJI_STYLES, EmojiConcept, load_emoji_concepts, load_emoji_images
from m2_encoder.files import atomic_folder

_UNSAFE: Final = re.compile(r"[^\w ,&()'’.!-]+")  # what not every disk takes, or a shell reads


def write_drawings(folder: str | os.PathLike[str]) -> Path:
    """Unpacks the drawings of all styles, unless the folder is there, and returns it.

    The files are `<style>/<chapter of Unicode>/<English name>.webp`, RGB of 64 x 64 pixels.

    Raises:
        UserError: for a disk that does not take them; there is no half-written folder then.
    """
    target = Path(folder)
    if target.is_dir():
        return target
    concepts = load_emoji_concepts()
    with atomic_folder(target) as partial:
        for style in EMOJI_STYLES:
            images = load_emoji_images(style)
            for concept in concepts:
                if concept.key in images:
                    file = partial / style / concept.group / f"{_file_name(concept)}.webp"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(images[concept.key])
    return target


def _file_name(concept: EmojiConcept) -> str:
    """The name, if every disk takes it; else what is left of it, made unique by the code points."""
    name = concept.captions["en"].name
    safe = _UNSAFE.sub("", name).strip()
    return name if safe == name else f"{safe} {concept.key}"
