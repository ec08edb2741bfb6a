"""Features of streams of image files or texts, and what was skipped and why.

One batch is in memory, and the images decoded for the next one, so that a folder of any size fits.

Letters: B batch · E feature dim · S image side in pixels.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from m2_encoder.errors import UserError
from m2_encoder.evaluation.encode import FeatureModel, Tokenize, encode_texts, evaluation_mode

_TEXT_WINDOW = 16  # batches of texts that are sorted by length together

_Input = TypeVar("_Input")
_Result = TypeVar("_Result")


class Item(NamedTuple):
    """One input."""

    place: int  # in the input, from 0
    name: str  # in the output and in messages
    content: Path | str  # a file to decode, or a text
    problem: str = ""  # why it cannot be used, found while listing; empty if it may be usable


class Skipped(NamedTuple):
    """An input without a feature."""

    name: str
    reason: str


class EmbeddedBatch(NamedTuple):
    """Features of some inputs."""

    places: Tensor  # of the items in the input, (B,) int64
    names: tuple[str, ...]  # length B
    features: Tensor  # (B, E) fp32 on the CPU
    skipped: tuple[Skipped, ...]  # inputs between these that have no feature


def embed_images(
    model: FeatureModel, items: Iterable[Item], decode: Callable[[Path], Tensor], *, batch_size: int, num_workers: int
) -> Iterator[EmbeddedBatch]:
    """Encodes image files, in the order given.

    Args:
        model: on any device.
        items: files.
        decode: a file to (3, S, S); raises `UserError` for one that is no image.
        batch_size: images per forward pass.
        num_workers: threads that decode ahead; 0 decodes in the calling thread.
    """
    decoded = map_ahead(partial(_decode_item, decode), items, num_workers=num_workers, ahead=batch_size)
    with evaluation_mode(model) as device:
        while batch := list(itertools.islice(decoded, batch_size)):
            good = [(item, result) for item, result in batch if isinstance(result, Tensor)]
            skipped = [Skipped(item.name, reason) for item, reason in batch if isinstance(reason, str)]
            features = torch.empty((0, 0))
            if good:
                images = torch.stack([image for _, image in good]).to(device)
                features = model.encode_image(images).float().cpu()
            yield _finish([item for item, _ in good], features, skipped)


def embed_texts(
    model: FeatureModel, items: Iterable[Item], tokenizer: Tokenize, *, batch_size: int
) -> Iterator[EmbeddedBatch]:
    """Encodes texts, in the order given; texts of similar length share a forward pass."""
    stream = iter(items)
    while window := list(itertools.islice(stream, batch_size * _TEXT_WINDOW)):
        good = [item for item in window if not item.problem]
        skipped = [Skipped(item.name, item.problem) for item in window if item.problem]
        features = torch.empty((0, 0))
        if good:
            texts = [str(item.content) for item in good]
            features = encode_texts(model, texts, tokenizer, batch_size=batch_size)
        yield _finish(good, features, skipped)


def _decode_item(decode: Callable[[Path], Tensor], item: Item) -> tuple[Item, Tensor | str]:
    if item.problem:
        return item, item.problem
    try:
        return item, decode(Path(item.content))
    except (UserError, OSError) as error:
        return item, " ".join(str(error).split()).removeprefix(f"{item.content}: ")  # messages name the item


def _finish(items: list[Item], features: Tensor, skipped: list[Skipped]) -> EmbeddedBatch:
    finite = features.isfinite().all(dim=1).tolist() if items else []
    skipped += [
        Skipped(item.name, "its feature is not finite: the model is broken")
        for item, usable in zip(items, finite, strict=True)
        if not usable
    ]
    kept = [number for number, usable in enumerate(finite) if usable]
    return EmbeddedBatch(
        places=torch.tensor([items[number].place for number in kept], dtype=torch.long),
        names=tuple(items[number].name for number in kept),
        features=features[kept],
        skipped=tuple(skipped),
    )


def map_ahead(
    function: Callable[[_Input], _Result], items: Iterable[_Input], *, num_workers: int, ahead: int
) -> Iterator[_Result]:
    """`map` on threads, in order, with at most `ahead` results waiting; 0 threads: on the calling one."""
    if num_workers == 0:
        yield from map(function, items)
        return
    stream = iter(items)
    with ThreadPoolExecutor(num_workers, thread_name_prefix="decode") as pool:
        waiting = deque(pool.submit(function, item) for item in itertools.islice(stream, ahead))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in itertools.islice(stream, 1))
                yield result
        finally:
            for future in waiting:  # the caller stopped reading
                future.cancel()
