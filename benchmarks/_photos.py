"""Photo-like JPEGs in WebDataset tars, for measuring how fast they are loaded.

A picture is a field whose spectrum falls as that of natural images does, with shapes and grain on it. Sides are spread
evenly over 256 to 512 px; the grain makes the files as large as photographs of the web are: 39 KB on average.
"""

from __future__ import annotations

import io
import json
import tarfile
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

SHARDS = 20
_SIDE = 768
_LEAST, _MOST = 256, 512
_QUALITY = 85
_GRAIN = 6.5
_WORDS = (
    *("the", "of", "on", "in", "with", "near", "under", "old", "young", "red", "green", "blue", "small", "wooden"),
    *("street", "river", "mountain", "dog", "cat", "bird", "horse", "child", "woman", "man", "table", "window"),
    *("garden", "beach", "snow", "train", "boat", "market", "flower", "bread", "coffee", "night", "morning", "a"),
)


def make_shards(folder: Path, *, count: int, processes: int) -> Path:
    """Tars of photo-like JPEGs with an English caption each, made once.

    Args:
        folder: keeps one subfolder for each count.
        count: images over all tars.
        processes: that make them.

    Returns:
        The subfolder with `SHARDS` tars and `photos.json`: {"count", "mean_kb"}.
    """
    made = folder / f"photos-{count}-v2"
    facts = made / "photos.json"
    if not facts.is_file():
        made.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(processes) as pool:
            sizes = list(pool.map(partial(_write_shard, made, count), range(SHARDS)))
        facts.write_text(json.dumps({"count": count, "mean_kb": sum(sizes) / count / 1e3}))
    return made


def _write_shard(folder: Path, count: int, shard: int) -> int:
    """Write one tar; the bytes of its images."""
    total = 0
    path = folder / f"{shard:06d}.tar"
    with tarfile.open(path.with_suffix(".partial"), "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(count * shard // SHARDS, count * (shard + 1) // SHARDS):
            rng = np.random.default_rng(number)
            image = _encode(_draw(rng))
            words = rng.choice(_WORDS, int(rng.integers(8, 17)))
            for extension, content in (("jpg", image), ("txt", " ".join(words).encode())):
                member = tarfile.TarInfo(f"{number:08d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            total += len(image)
    path.with_suffix(".partial").replace(path)
    return total


@lru_cache(maxsize=1)
def _fields() -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.float32]]:
    """Four random fields of mean 0 and deviation 1, (side, side, 3), and grain, (side, side, 1)."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(_SIDE)[:, None], np.fft.rfftfreq(_SIDE)[None])
    fields = []
    for _ in range(4):
        spectrum = rng.normal(size=(3, *frequency.shape)) + 1j * rng.normal(size=(3, *frequency.shape))
        field = np.fft.irfft2(spectrum / np.maximum(frequency, 1 / _SIDE) ** 1.6, s=(_SIDE, _SIDE))
        field /= field.std(axis=(1, 2), keepdims=True)
        fields.append(field.transpose(1, 2, 0).astype(np.float32))
    return fields, rng.normal(size=(_SIDE, _SIDE, 1)).astype(np.float32)


def _draw(rng: np.random.Generator) -> Image.Image:
    height, width = (int(side) for side in rng.integers(_LEAST, _MOST + 1, 2))
    fields, grain = _fields()

    def part(field: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        top, left = rng.integers(0, _SIDE - height + 1), rng.integers(0, _SIDE - width + 1)
        return field[top : top + height, left : left + width]

    levels = rng.uniform(80, 170, 3) + 45 * part(fields[int(rng.integers(len(fields)))])
    image = Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))
    drawing = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(2, 7))):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        wide, high = rng.uniform(10, width / 2), rng.uniform(10, height / 2)
        color = tuple(int(level) for level in rng.integers(0, 256, 3))
        shape = drawing.ellipse if rng.random() < 0.5 else drawing.rectangle
        shape((x, y, x + wide, y + high), fill=color)
    levels = np.asarray(image) + _GRAIN * part(grain)
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


def _encode(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "JPEG", quality=_QUALITY)
    return content.getvalue()
