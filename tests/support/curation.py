"""A corpus with planted faults and duplicates, and the rules of curation as one plain loop over all pairs."""

from __future__ import annotations

import hashlib
import io
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from m2_encoder import M2EncoderConfig
from m2_encoder.checkpoints.export import export_model
from m2_encoder.curation.settings import CurationSettings, LengthLimit
from m2_encoder.curation.tables import read_table
from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from tests.support.models import random_model
from tests.support.shards import write_tar

SETTINGS = CurationSettings(
    lengths={"zh": LengthLimit(least=3, most=20), "en": LengthLimit(least=2, unit="words")},
    exempt_roles=("keyword",),
    max_aspect_ratio=3.0,
    min_side_px=16,
    languages=("zh", "en"),
    max_repeats=2,
    partition_rows=40,
    samples_per_shard=25,
)

_WORDS = ("red", "green", "old", "tiny", "cat", "dog", "house", "river", "moon", "tree")
_CHARACTERS = "红绿旧小猫狗房河月树山水"


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The file of an image."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def draw(number: int, *, width: int = 48, height: int = 40) -> Image.Image:
    """A picture that looks like no other: a few coloured shapes."""
    rng = np.random.default_rng(number)
    image = Image.new("RGB", (width, height), tuple(int(v) for v in rng.integers(0, 256, 3)))
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        x0, x1 = sorted(int(v) for v in rng.integers(0, width, 2))
        y0, y1 = sorted(int(v) for v in rng.integers(0, height, 2))
        shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle
        shape((x0, y0, x1 + 3, y1 + 3), fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
    return image


def write_corpus(folder: Path, *, shards: int = 4, samples: int = 30, seed: int = 0) -> Path:
    """Tars in which every rule has something to do; one of them ends in the middle."""
    rng = np.random.default_rng(seed)
    for shard in range(shards):
        members: list[tuple[str, bytes]] = []
        for number in range(samples):
            sample = _sample(rng, f"{number:04d}")
            if rng.random() < 0.08:  # the same pair again, in another sample
                sample += [(f"{number:04d}-again{name[4:]}", content) for name, content in sample]
            members += sample
        write_tar(folder / f"{shard:03d}.tar", members)
    last = folder / f"{shards - 1:03d}.tar"
    last.write_bytes(last.read_bytes()[: last.stat().st_size * 3 // 4])
    return folder


def _sample(rng: np.random.Generator, key: str) -> list[tuple[str, bytes]]:
    fate = rng.random()
    number = int(rng.integers(60))  # of 120 samples: many pictures come several times
    picture = draw(number)
    image, extension = encode(picture), "png"
    if fate < 0.1:
        image, extension = encode(picture.resize((96, 80)), "JPEG", quality=90), "jpg"
    elif fate < 0.15:
        image = encode(draw(number, width=150, height=40))
    elif fate < 0.2:
        image = encode(draw(number, width=15, height=15))
    elif fate < 0.23:
        image = image[: len(image) // 2]
    elif fate < 0.26:
        image = encode(Image.new("RGB", (40, 40), (number, 9, 9)))  # plain: no perceptual hash
    if fate > 0.97:
        return [(f"{key}.{extension}", image)]
    if fate > 0.9:
        return [(f"{key}.{extension}", image), (f"{key}.txt", _english(rng).encode())]
    metadata: dict[str, Any] = {"captions": {"en": [_english(rng)], "zh": [_chinese(rng), _chinese(rng)]}, "url": key}
    if fate > 0.85:
        metadata["captions"]["zh"].append({"text": "猫", "role": "keyword"})
    content = b"{" if fate > 0.83 and fate < 0.85 else json.dumps(metadata, ensure_ascii=False).encode()
    return [(f"{key}.{extension}", image), (f"{key}.json", content)]


def _english(rng: np.random.Generator) -> str:
    words = [_WORDS[i] for i in rng.integers(0, len(_WORDS), int(rng.integers(1, 4)))]
    text = " ".join(words)
    return text.upper() if rng.random() < 0.2 else text


def _chinese(rng: np.random.Generator) -> str:
    if rng.random() < 0.1:
        return "ねこがいます"
    return "".join(_CHARACTERS[i] for i in rng.integers(0, 4, int(rng.integers(2, 5))))


class Decision(NamedTuple):
    """What becomes of a pair.

    Attributes:
        reason: None if it is kept.
        first: shard and row of what it repeats.
    """

    reason: str | None
    first: tuple[int, int] | None


def read_decisions(output: Path) -> list[pa.Table]:
    """The tables of decisions, in the order of shards."""
    return [read_table(path) for path in sorted((output / "decisions").glob("*.arrow"), key=lambda p: p.stem[-6:])]


def decided(tables: list[pa.Table]) -> list[Decision]:
    """What the tables say about every pair."""
    found = []
    for table in tables:
        for row in table.select(["keep", "reason", "first_shard", "first_row"]).to_pylist():
            assert row["keep"] == (row["reason"] is None)
            place = None if row["first_shard"] is None else (row["first_shard"], row["first_row"])
            found.append(Decision(row["reason"], place))
    return found


def decide_plainly(tables: list[pa.Table], settings: CurationSettings) -> list[Decision]:
    """The rules once more: pair after pair, one rule after the other, everything in memory.

    Args:
        tables: by shard; only what was measured is used.
        settings: with lengths in characters or English words; without evaluation images and scores.
    """
    rows = [
        {**row, "shard": shard, "row": number, "reason": _reject_alone(row, settings), "first": None}
        for shard, table in enumerate(tables)
        for number, row in enumerate(table.to_pylist())
    ]
    _reject_copies(rows, "duplicate_pair", lambda row: (row["image_hash"], _normal(row["text"])), per_sample=False)
    if settings.duplicate_images == "drop":
        _reject_copies(rows, "duplicate_image", lambda row: row["image_hash"], per_sample=True)
    _reject_near(rows, settings)
    seen: dict[str, list[dict[str, Any]]] = {}
    for row in (row for row in rows if row["reason"] is None):
        same = seen.setdefault(_normal(row["text"]), [])
        if len(same) >= settings.max_repeats:
            row |= {"reason": "repeated_caption", "first": (same[0]["shard"], same[0]["row"])}
        else:
            same.append(row)
    return [Decision(row["reason"], row["first"]) for row in rows]


def _reject_alone(row: dict[str, Any], settings: CurationSettings) -> str | None:
    if row["fault"] is not None:
        return str(row["fault"])
    text = row["text"]
    names = " ".join(unicodedata.name(character, "") for character in text)
    if "HIRAGANA" in names:
        return "other_language"
    is_chinese = row["declared"] == "zh" or (row["declared"] is None and any("\u4e00" <= c <= "\u9fff" for c in text))
    limit = settings.lengths["zh" if is_chinese else "en"]
    if row["role"] not in settings.exempt_roles:
        length = len(text.split()) if limit.unit == "words" else len("".join(text.split()))
        if limit.least is not None and length < limit.least:
            return "too_short"
        if limit.most is not None and length > limit.most:
            return "too_long"
    sides = sorted((row["width"], row["height"]))
    if sides[1] / sides[0] > settings.max_aspect_ratio:
        return "absurd_shape"
    return "too_small" if sides[0] < settings.min_side_px else None


def _normal(text: str) -> str:
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).lower()).strip()


def _reject_copies(rows: list[dict[str, Any]], reason: str, key: Any, *, per_sample: bool) -> None:
    first: dict[Any, dict[str, Any]] = {}
    for row in (row for row in rows if row["reason"] is None):
        original = first.setdefault(key(row), row)
        if original is row or (per_sample and _sample_of(original) == _sample_of(row)):
            continue
        row |= {"reason": reason, "first": (original["shard"], original["row"])}


def _reject_near(rows: list[dict[str, Any]], settings: CurationSettings) -> None:
    heads: dict[bytes, dict[str, Any]] = {}
    for row in rows:
        if row["reason"] is None and row["perceptual_hash"] is not None:
            heads.setdefault(row["image_hash"], row)
    earlier: list[dict[str, Any]] = []
    fallen: dict[bytes, tuple[int, int]] = {}
    for image, head in heads.items():
        near = next((other for other in earlier if _are_near(head, other, settings)), None)
        if near is not None:
            fallen[image] = (near["shard"], near["row"])
        earlier.append(head)
    for row in rows:
        if row["reason"] is None and row["image_hash"] in fallen:
            row |= {"reason": "near_duplicate_image", "first": fallen[row["image_hash"]]}


def _are_near(a: dict[str, Any], b: dict[str, Any], settings: CurationSettings) -> bool:
    differing = (a["perceptual_hash"] ^ b["perceptual_hash"]).bit_count()
    channels = ((a["mean_color"] >> shift & 255, b["mean_color"] >> shift & 255) for shift in (16, 8, 0))
    return differing <= settings.near_images and all(abs(x - y) <= settings.near_color for x, y in channels)


def _sample_of(row: dict[str, Any]) -> tuple[int, int]:
    return row["shard"], row["sample"]


def file_hashes(output: Path) -> dict[str, str]:
    """Hash of every file of a finished curation, by name; not of indexes, which know when their tar was written."""
    files = (path for path in sorted(output.rglob("*")) if path.is_file() and path.suffix != ".index")
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def count_reasons(decisions: list[Decision]) -> Counter[str]:
    """How many pairs fell by each reason; kept ones under "kept"."""
    return Counter(decision.reason or "kept" for decision in decisions)


def export_scorer(folder: Path) -> Path:
    """A small model with random weights, as `m2-export` writes one."""
    config = M2EncoderConfig.from_name(
        "tiny", embed_dim=32, num_heads=2, num_layers=1, feature_dim=16, image_size=16, patch_size=8
    )
    tokenizer = SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=24)
    return export_model(folder, model=random_model(config), tokenizer=tokenizer)
