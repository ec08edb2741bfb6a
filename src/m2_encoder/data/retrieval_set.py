"""Image-caption sets for retrieval, read whole into memory, in order.

What training would skip is an error here: a set that lacks items is another set.

Who is who is training's rule (`name_content`): an `identity` counts everywhere, a JSON `key` within the set unless it
only repeats the name of the files, and that name alone says nothing. Beyond that, equal files are one picture of the
gallery with the captions of all of its samples, unless different identities keep them apart: no model could tell them
apart. Captions never say who a picture is, as in training: equal ones of two pictures are two queries.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.data.retrieval_source import SetSample, read_samples
from m2_encoder.data.samples.captions import check_roles
from m2_encoder.data.samples.parse import SampleProblem, name_content
from m2_encoder.errors import ImageError, UserError
from m2_encoder.types import LANGUAGES

ROLES_WITHOUT_QUERY = ("alias", "keyword")
"""Captions of these roles are no queries: they are search words beside a caption, not a description of one picture."""

_FIRST_LANGUAGE = "zh"


class SetReading(NamedTuple):
    """What became of the samples of a set."""

    samples: int  # that were read
    repeated_images: int = 0  # samples whose picture was there before, the same file
    kept_apart: int = 0  # equal files under different identities, which stay different pictures
    left_out: Mapping[str, int] = {}  # captions that are no queries, by role
    other_languages: Mapping[str, int] = {}  # captions that are neither Chinese nor English


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
    members = _Members(is_marked=bool(split))
    for sample in read_samples(folder):
        _check_sample(sample)
        if members.add(sample):
            try:
                pixels.add(transform.to_uint8(sample.image))
            except ImageError as error:
                raise UserError(f"{sample.origin}: {error}") from error
    return members.finish(name, pixels.images(), split, str(folder))


def check_retrieval_set(folder: str | os.PathLike[str], *, name: str) -> None:
    """Check everything but the images of the validation set `name`, which are not decoded.

    Raises:
        UserError: as `read_retrieval_set`.
    """
    queries = 0
    try:
        for sample in read_samples(folder, images=False):
            _check_sample(sample)
            queries += sum(caption.role not in ROLES_WITHOUT_QUERY for caption in sample.text.captions)
        _check_queries(queries, str(folder))
    except UserError as error:
        raise UserError(
            f"data.validation.{name}={os.fspath(folder)}: {error}, or leave it out: ~data.validation.{name}"
        ) from error


def _check_sample(sample: SetSample) -> None:
    try:
        check_roles(sample.text.captions)
    except SampleProblem as problem:
        raise UserError(f"{sample.origin}: {problem}; write it again") from problem


def _check_queries(number: int, where: str) -> None:
    if not number:
        raise UserError(
            f"{where}: all captions are of the roles {' and '.join(ROLES_WITHOUT_QUERY)}, which are no queries; give "
            "captions of another role, such as original or name"
        )


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


class _Members:
    """The samples of a set: what each shows, and which pictures are there already.

    Args:
        is_marked: whether every key is an identity.
    """

    def __init__(self, *, is_marked: bool) -> None:
        self._every_key_is_marked = is_marked
        self._files: dict[bytes, int] = {}  # number of each distinct picture, by hash
        self._samples: list[tuple[str, bool, int]] = []  # name, whether somebody marked it, picture
        self._captions: list[tuple[tuple[str, str], ...]] = []  # language and text of each sample's queries
        self._left_out: Counter[str] = Counter()
        self._other_languages: Counter[str] = Counter()

    def add(self, sample: SetSample) -> bool:
        """Add a sample; whether its picture is new."""
        digest = hashlib.blake2b(sample.image, digest_size=16).digest()
        is_new = digest not in self._files
        number = self._files.setdefault(digest, len(self._files))
        name = name_content(sample.text, key=sample.key, shard=sample.shard, source="")
        self._samples.append((name, sample.text.is_marked or self._every_key_is_marked, number))
        self._other_languages.update(caption.language for caption in sample.text.left_out)
        texts = []
        for caption in sample.text.captions:
            if caption.role in ROLES_WITHOUT_QUERY:
                self._left_out[str(caption.role)] += 1
            else:
                texts.append((caption.language, caption.text))
        self._captions.append(tuple(texts))
        return is_new

    def finish(self, name: str, images: Tensor, split: str, where: str) -> RetrievalSet:
        """The set: a row for each picture under each of its names."""
        names = self._join()
        rows: dict[tuple[str, int], int] = {}
        captions: dict[str, list[list[str]]] = {language: [] for language in LANGUAGES}
        for content, (_, _, picture), texts in zip(names, self._samples, self._captions, strict=True):
            if (content, picture) not in rows:
                rows[content, picture] = len(rows)
                for lists in captions.values():
                    lists.append([])
            for language, text in texts:
                captions[language][rows[content, picture]].append(text)
        _check_queries(sum(map(len, self._captions)), where)
        pictures = [picture for _, picture in rows]
        return RetrievalSet(
            name,
            tuple(content for content, _ in rows),
            images if pictures == list(range(len(images))) else images[pictures],
            {language: tuple(map(tuple, lists)) for language, lists in captions.items() if any(lists)},
            split,
            SetReading(
                samples=len(names),
                repeated_images=len(names) - len(rows),
                kept_apart=len(rows) - len(images),
                left_out=dict(self._left_out),
                other_languages=dict(self._other_languages),
            ),
        )

    def _join(self) -> list[str]:
        """What each sample shows: names of equal pictures become one, unless both were marked."""
        marked = {picture: name for name, is_marked, picture in reversed(self._samples) if is_marked}
        parent: dict[str, str] = {}

        def find(name: str) -> str:
            while (above := parent.get(name, name)) != name:
                parent[name] = parent.get(above, above)
                name = above
            return name

        first: dict[int, str] = {}
        for name, is_marked, picture in self._samples:
            if not is_marked:
                parent[find(name)] = find(marked.get(picture) or first.setdefault(picture, name))
        return [find(name) for name, _, _ in self._samples]


def count_equal_captions(pairs: Iterable[tuple[int, str]]) -> int:
    """How many queries have the words of another one, which describes another picture."""
    counts = Counter(text for _, text in pairs)
    return sum(count for count in counts.values() if count > 1)
