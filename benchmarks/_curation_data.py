"""A made-up crawl with a known truth: small distinct pictures, captions in two languages, planted faults and copies.

What becomes of a pair is a function of its number alone, so any process can make any shard, and a copy can be made
without the shard that holds its original.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

PAIRS_PER_SHARD = 10_000
PHRASES = 50
MAX_REPEATS = 10
MIN_SIDE_PX = 48
_SIDE = 64

# share of the pairs by fate; the rest is plain
SHARES = {
    "duplicate_image": 0.03,
    "near_duplicate_image": 0.03,
    "repeated_caption": 0.05,
    "too_short": 0.04,
    "absurd_shape": 0.02,
    "too_small": 0.01,
    "other_language": 0.02,
    "undecodable_image": 0.005,
    "missing_caption": 0.005,
    "bad_json": 0.002,
    "evaluation_image": 0.002,
    "duplicate_pair": 0.01,
}
PLAIN = "plain"
_COPIES = ("duplicate_image", "near_duplicate_image", "duplicate_pair")

_ADJECTIVES = ("red", "green", "blue", "old", "new", "tiny", "large", "wooden", "bright", "dark", "quiet", "busy")
_NOUNS = ("cat", "dog", "house", "river", "bridge", "car", "tree", "lamp", "boat", "horse", "chair", "street", "garden")
_VERBS = ("beside", "behind", "above", "under", "near", "against", "across", "along", "before", "within")
_HAN = "山水花鸟树木房屋街道汽车自行火红绿蓝黄白黑大小新旧高低男女老少春夏秋冬天地日月星云风雨雪海湖河江桥船马牛羊猫狗"
_CYRILLIC = "абвгдежзиклмнопрстуфхцчшэюя"


class WriteShard(NamedTuple):
    """A shard to make.

    Attributes:
        path: the tar.
        first: number of its first pair.
        count: how many pairs.
    """

    path: str
    first: int
    count: int


def write_crawl_shard(task: WriteShard) -> Counter[str]:
    """Make a shard, unless it is there; gives how many pairs of each fate are in it."""
    fates = {number: fate_of(number) for number in range(task.first, task.first + task.count)}
    if not Path(task.path).exists():
        partial = Path(f"{task.path}.partial")
        with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as archive:
            for number, fate in fates.items():
                for extension, content in _members(number, fate):
                    info = tarfile.TarInfo(f"{number:09d}.{extension}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        partial.rename(task.path)
    return Counter(fates.values())


def expected_repeats(count: int) -> int:
    """How many pairs fall because their caption has come too often."""
    seen = Counter(_phrase_of(number) for number in range(count) if fate_of(number) == "repeated_caption")
    return sum(max(0, times - MAX_REPEATS) for times in seen.values())


def write_evaluation_images(folder: Path, count: int) -> None:
    """The pictures that the crawl holds copies of."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        if fate_of(number) == "evaluation_image":
            (folder / f"{number}.jpg").write_bytes(_jpeg(_picture(number)))


def fate_of(number: int) -> str:
    """What is planted at a place; copies need an original before them."""
    draw = _rng(number, 0).random()
    for fate, share in SHARES.items():
        if draw < share:
            return fate if fate not in _COPIES or _original_of(number) is not None else PLAIN
        draw -= share
    return PLAIN


def _original_of(number: int) -> int | None:
    rng = _rng(number, 1)
    for _ in range(20):
        candidate = int(rng.integers(number)) if number else None
        # Copies of copies would make the count of survivors hang on thresholds: only plain pairs are copied.
        if candidate is not None and _rng(candidate, 0).random() >= sum(SHARES.values()):
            return candidate
    return None


def _members(number: int, fate: str) -> list[tuple[str, bytes]]:
    source = _original_of(number) if fate in _COPIES else number
    assert source is not None
    image = _picture(source)
    if fate == "near_duplicate_image":
        side = 72 + number % 17  # two copies of one picture should not be the same file
        content = _jpeg(image.resize((side, side), Image.Resampling.BICUBIC), quality=70 + number % 13)
    elif fate == "absurd_shape":
        content = _jpeg(image.resize((200, 50)))
    elif fate == "too_small":
        content = _jpeg(image.resize((MIN_SIDE_PX - 8, MIN_SIDE_PX - 8)))
    else:
        content = _jpeg(image)
    if fate == "undecodable_image":
        content = content[: len(content) // 2]
    metadata = b"{broken" if fate == "bad_json" else json.dumps(_metadata(number, fate, source)).encode()
    return [("jpg", content), ("json", metadata)]


def _metadata(number: int, fate: str, source: int) -> dict[str, Any]:
    caption = _caption(source if fate == "duplicate_pair" else number)
    if fate == "repeated_caption":
        caption = f"photo for sale number {_phrase_of(number)}"
    elif fate == "too_short":
        caption = caption[:3]
    elif fate == "other_language":
        caption = "".join(_CYRILLIC[i] for i in _rng(number, 3).integers(0, len(_CYRILLIC), 20))
    elif fate == "missing_caption":
        caption = "  "
    return {"caption": caption, "url": f"https://example.org/{number}.jpg"}


def _phrase_of(number: int) -> int:
    return int(_rng(number, 4).integers(PHRASES))


def _caption(number: int) -> str:
    rng = _rng(number, 2)
    if number % 2:
        return "".join(_HAN[i] for i in rng.integers(0, len(_HAN), int(rng.integers(8, 18))))
    words = [_ADJECTIVES, _NOUNS, _VERBS, _ADJECTIVES, _NOUNS]
    return " ".join(part[int(rng.integers(len(part)))] for part in words) + f", picture {number}"


def _picture(number: int) -> Image.Image:
    field = _rng(number, 5).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(field).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)


def _jpeg(image: Image.Image, *, quality: int = 85) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _rng(number: int, purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[number, purpose]))
