"""Image-caption sets for retrieval, read whole into memory, in order.

What training would skip is an error here: a set that lacks items is another set.
Which samples show the same, `retrieval_contents` decides.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.data.inspect.inspection import hash_bytes
from m2_encoder.data.retrieval_contents import (
    ROLES_WITHOUT_QUERY,
    SetContents,
    SetReading,
    check_queries,
    check_sample,
    hash_picture,
)
from m2_encoder.data.retrieval_source import read_place, read_samples
from m2_encoder.errors import ImageError, UserError

logger = logging.getLogger(__name__)

_FIRST_LANGUAGE = "zh"
_LARGEST_K = 10  # of recall at k
_MOST_COMPARED = 2000  # images of a validation set, with those of training


class RetrievalSet(NamedTuple):
    """n images with their captions.

    Attributes:
        name: in metric names, such as "emoji_heldout_style".
        keys: what each image shows, length n; images of equal keys share their captions.
        images: (n, 3, S, S) uint8.
        captions: by language, for each image its caption, or several, or none: ().
        split: of the built-in set, such as "val"; "" for all other data.
        reading: None for a set that was not read from samples.
    """

    name: str
    keys: tuple[str, ...]
    images: Tensor
    captions: Mapping[str, Sequence[str | tuple[str, ...]]]
    split: str = ""
    reading: SetReading | None = None

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages of its captions, Chinese first, as tables show them."""
        return tuple(
            sorted(
                (language for language, rows in self.captions.items() if any(rows)),
                key=lambda language: language != _FIRST_LANGUAGE,
            )
        )

    def captions_of(self, row: int, language: str) -> tuple[str, ...]:
        """The captions of an image in a language, maybe none."""
        found = self.captions[language][row]
        return (found,) if isinstance(found, str) else found

    def numbers(self) -> list[int]:
        """For each image the number of its key, in the order of their first appearance."""
        numbers = {key: number for number, key in enumerate(dict.fromkeys(self.keys))}
        return [numbers[key] for key in self.keys]

    def queries(self, language: str) -> list[tuple[int, str]]:
        """Every caption of a language once, with the number of the key that it describes, in order."""
        pairs = ((n, text) for row, n in enumerate(self.numbers()) for text in self.captions_of(row, language))
        return list(dict.fromkeys(pairs))


def read_retrieval_set(
    folder: str | os.PathLike[str], *, name: str, transform: EvalTransform, split: str = ""
) -> RetrievalSet:
    """Read `*.tar` of a folder, sorted by name; or images with captions, as `m2-data pack` would read them.

    Args:
        folder: of tars or images, or a table of such.
        name: of the set.
        transform: makes of a picture what the model takes.
        split: of the built-in set, whose keys are identities: two concepts that are drawn alike stay two.

    Raises:
        UserError: for a folder without samples, and for anything unusable, by name.
    """
    pixels = _Pixels(transform.image_size)
    contents = SetContents(is_marked=bool(split))
    files: dict[bytes, int] = {}  # number of each distinct picture, by hash
    numbers = []
    for sample in read_samples(folder):
        check_sample(sample)
        contents.add(sample)
        digest = hash_picture(sample.image)
        if digest not in files:
            try:
                pixels.add(transform.to_uint8(sample.image))
            except ImageError as error:
                raise UserError(f"{sample.origin}: {error}") from error
        numbers.append(files.setdefault(digest, len(files)))
    rows = contents.rows(numbers, where=str(folder))
    images = pixels.images()
    return RetrievalSet(
        name,
        rows.keys,
        images if rows.pictures == tuple(range(len(images))) else images[list(rows.pictures)],
        rows.captions,
        split,
        rows.reading,
    )


def check_retrieval_set(folder: str | os.PathLike[str], *, name: str) -> frozenset[int]:
    """Check everything but the images of the validation set `name`, which are not decoded.

    Returns:
        `hash_bytes` of the first images of tars, at most `_MOST_COMPARED`: what training should not have seen.

    Raises:
        UserError: as `read_retrieval_set`.
    """
    samples = queries = 0
    images: set[int] = set()
    try:
        for sample in read_samples(folder, images=False):
            check_sample(sample)
            samples += 1
            if sample.place.size is not None and len(images) < _MOST_COMPARED:
                images.add(hash_bytes(read_place(sample.place)))
            queries += sum(caption.role not in ROLES_WITHOUT_QUERY for caption in sample.text.captions)
        check_queries(queries, str(folder))
    except UserError as error:
        raise UserError(
            f"data.validation.{name}={os.fspath(folder)}: {error}, or leave it out: ~data.validation.{name}"
        ) from error
    if samples <= _LARGEST_K:
        text = "data.validation.%s: %d samples: recall at 10 is always 100 %%, and mean recall says little"
        logger.warning(text, name, samples)
    return frozenset(images)


class _Pixels:
    """Images in one array that grows in place, so that a large set is never in memory twice."""

    def __init__(self, side: int) -> None:
        self._array = np.empty((0, 3, side, side), np.uint8)
        self._count = 0

    def add(self, image: Tensor) -> None:
        if self._count == len(self._array):
            self._array.resize((max(64, self._count * 3 // 2), *self._array.shape[1:]), refcheck=False)
        self._array[self._count] = image.numpy()
        self._count += 1

    def images(self) -> Tensor:
        self._array.resize((self._count, *self._array.shape[1:]), refcheck=False)
        return torch.from_numpy(self._array)


def count_equal_captions(pairs: Iterable[tuple[int, str]]) -> int:
    """How many queries have the words of another one, which describes another picture."""
    counts = Counter(text for _, text in pairs)
    return sum(count for count in counts.values() if count > 1)
