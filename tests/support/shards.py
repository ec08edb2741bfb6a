"""Small WebDataset tars, sound and damaged, written with the standard library alone."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], *, form: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar of members in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def make_image(number: int, *, side: int = 16, kind: str = "PNG") -> bytes:
    """A small picture whose top left pixel spells the number."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    pixels[0, 0] = (number & 255, number >> 8 & 255, number >> 16 & 255)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def make_sample(key: str, number: int, *, metadata: Mapping[str, Any] | None = None) -> list[tuple[str, bytes]]:
    """Members of a sample with a picture and a caption in each language."""
    value = metadata or {"captions": {"en": [f"number {number}"], "zh": [f"数字 {number}"]}}
    return [(f"{key}.png", make_image(number)), (f"{key}.json", json.dumps(value).encode())]


def write_numbers(folder: Path, counts: Sequence[int], *, first: int = 0) -> list[Path]:
    """Shards of consecutive numbers, so many in each; the key of a sample is its number."""
    paths = []
    for shard, count in enumerate(counts):
        members = [member for i in range(count) for member in make_sample(f"{first + i:06d}", first + i)]
        paths.append(write_tar(folder / f"{shard:06d}.tar", members))
        first += count
    return paths
