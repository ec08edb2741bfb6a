"""Streams: order, batches, failures, and how far ahead they read."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m2_encoder.errors import ImageError
from m2_encoder.evaluation.embedding import Item, embed_images, embed_texts
from m2_encoder.types import TextTokens


class Model:
    """The feature of an image is its number; number 13 breaks it."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def encode_image(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        numbers = images[:, 0, 0, :1].float()
        return torch.where(numbers == 13, math.nan, numbers)

    def encode_text(self, text: TextTokens) -> Tensor:
        self.sizes.append(len(text.ids))
        return text.ids[:, :1].float()


def decode(path: Path) -> Tensor:
    number = int(path.name)
    time.sleep(0.002 * (number % 3))  # threads finish out of order
    if number % 5 == 4:
        raise ImageError(f"{path}: is damaged")
    if number % 11 == 10:
        raise PermissionError(13, "Permission denied")
    return torch.full((3, 1, 1), number)


def items(number: int) -> Iterator[Item]:
    return (Item(n, f"name {n}", Path(str(n)), "listed as bad" if n == 7 else "") for n in range(number))


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_images_in_order_without_the_bad_ones(num_workers: int) -> None:
    model = Model()
    batches = list(embed_images(model, items(30), decode, batch_size=4, num_workers=num_workers))
    bad = {n for n in range(30) if n % 5 == 4 or n % 11 == 10 or n in (7, 13)}
    good = [n for n in range(30) if n not in bad]
    assert torch.cat([batch.places for batch in batches]).tolist() == good
    assert torch.cat([batch.features for batch in batches if batch.names])[:, 0].tolist() == good
    assert [name for batch in batches for name in batch.names] == [f"name {n}" for n in good]
    reasons = {skipped.name: skipped.reason for batch in batches for skipped in batch.skipped}
    assert sorted(reasons) == sorted(f"name {n}" for n in bad)
    assert reasons["name 4"] == "is damaged"
    assert reasons["name 7"] == "listed as bad"
    assert "Permission denied" in reasons["name 10"]
    assert "not finite" in reasons["name 13"]
    assert max(model.sizes) <= 4


def test_a_batch_of_failures_alone_is_no_end() -> None:
    bad = (Item(n, str(n), Path(str(n)), "bad" if n < 6 else "") for n in range(8))
    batches = list(embed_images(Model(), bad, lambda path: torch.zeros(3, 1, 1), batch_size=3, num_workers=1))
    assert [len(batch.names) for batch in batches] == [0, 0, 2]
    assert [len(batch.skipped) for batch in batches] == [3, 3, 0]


def test_reading_ahead_is_bounded() -> None:
    opened: list[int] = []

    def endless() -> Iterator[Item]:
        for n in itertools.count():
            opened.append(n)
            yield Item(n, str(n), Path(str(n)))

    stream = embed_images(Model(), endless(), lambda path: torch.zeros(3, 1, 1), batch_size=4, num_workers=2)
    for _ in range(5):
        next(stream)
    assert len(opened) <= 5 * 4 + 4 + 1
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_texts_are_sorted_inside_a_window_only() -> None:
    def tokenize(texts: list[str]) -> TextTokens:
        lengths = torch.tensor([len(text) for text in texts])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return TextTokens(lengths[:, None].expand(-1, mask.shape[1]), mask)

    model = Model()
    lines = (Item(n, f"line {n}", "x" * (1 + n % 9), "blank" if n % 10 == 0 else "") for n in range(100))
    batches = list(embed_texts(model, lines, tokenize, batch_size=3))
    kept = [n for n in range(100) if n % 10]
    assert torch.cat([batch.places for batch in batches]).tolist() == kept
    assert torch.cat([batch.features for batch in batches])[:, 0].tolist() == [1 + n % 9 for n in kept]
    assert sum(len(batch.skipped) for batch in batches) == 10
    assert max(model.sizes) == 3
