"""A small set of real files, and a model that needs no library."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.evaluation.models.base import EvaluatedModel, ModelFacts
from m2_encoder.evaluation.sets.base import Classes, EvaluationSet, Picture, Texts
from m2_encoder.types import TextTokens

WIDTH = 6


class CountingTowers(nn.Module):
    """Features of means of pixels and of letters; counts what it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(3 * 16, WIDTH)
        self.letters = nn.Embedding(128, WIDTH)
        self.images_seen = self.texts_seen = 0

    def encode_image(self, images: Tensor) -> Tensor:
        self.images_seen += len(images.unique(dim=0))  # a batch may be filled up
        pooled = functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)
        return functional.normalize(self.image(pooled - 0.5), dim=-1)

    def encode_text(self, text: TextTokens) -> Tensor:
        self.texts_seen += len(text.ids)
        letters = self.letters(text.ids) * text.mask[..., None]
        return functional.normalize(letters.sum(dim=1) / text.mask.sum(dim=1, keepdim=True), dim=-1)


def letters_of(texts: Any) -> TextTokens:
    """Their letters."""
    rows = [[ord(letter) % 128 for letter in text] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return TextTokens(ids, torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None])


def counting_model(*, seed: int = 0) -> EvaluatedModel:
    """Such a model; `model.model` counts."""
    torch.manual_seed(seed)
    facts = ModelFacts("test", 0, 0, WIDTH, 16, 99, {}, {})
    return EvaluatedModel(
        name="counting",
        model=CountingTowers(),
        preprocess=EvalTransform(16).to_uint8,
        tokenizer=letters_of,
        facts=facts,
        fingerprint=f"{seed:064d}",
    )


def small_set(folder: Path, number: int, *, broken: tuple[int, ...] = ()) -> EvaluationSet:
    """Files of one colour each with two texts in en and one in zh, two classes, and a subset of the even ones.

    Those in `broken` hold no picture; the last of them is missing.
    """
    pictures = []
    for row in range(number):
        path = folder / f"{row}.png"
        buffer = io.BytesIO()
        Image.new("RGB", (20 + row, 20), (row * 40 % 256, row * 90 % 256, 200 - row)).save(buffer, "png")
        path.write_bytes(b"no picture" if row in broken else buffer.getvalue())
        pictures.append(Picture(path.name, _reader(path)))
    if broken:
        (folder / f"{broken[-1]}.png").unlink()
    rows = torch.arange(number)
    en = Texts(
        tuple(f"text {row} of {number}" for row in range(2 * number)),
        torch.stack([torch.arange(2 * number), torch.arange(2 * number) // 2], dim=1),
    )
    zh = Texts(tuple(f"图 {row}" for row in range(number)), torch.stack([rows, rows], dim=1))
    return EvaluationSet(
        name="small",
        pictures=pictures,
        texts={"en": en, "zh": zh},
        classes=Classes("two", {"en": ("even", "odd")}, rows % 2),
        subsets={"even": rows[::2]},
        parallel={("zh", "en"): torch.stack([rows, 2 * rows], dim=1)},
    )


def _reader(path: Path) -> Callable[[], bytes]:
    return path.read_bytes
