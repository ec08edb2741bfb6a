"""Which samples of an evaluation set show the same, and which of their captions are queries.

Who is who is training's rule (`name_content`): an `identity` counts everywhere, a JSON `key` within the set unless it
only repeats the name of the files, and that name alone says nothing. Beyond that, equal files are one picture of the
gallery with the captions of all of its samples, unless different identities keep them apart: no model could tell them
apart. Captions never say who a picture is, as in training: equal ones of two pictures are two queries.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from m2_encoder.data.retrieval_source import SetSample
from m2_encoder.data.samples.captions import check_roles
from m2_encoder.data.samples.parse import SampleProblem, name_content
from m2_encoder.errors import UserError
from m2_encoder.types import LANGUAGES

ROLES_WITHOUT_QUERY = ("alias", "keyword")
"""Captions of these roles are no queries: they are search words beside a caption, not a description of one picture."""


class SetReading(NamedTuple):
    """What became of the samples of a set."""

    samples: int  # that were read
    repeated_images: int = 0  # samples whose picture was there before, the same file
    kept_apart: int = 0  # equal files under different identities, which stay different pictures
    left_out: Mapping[str, int] = {}  # captions that are no queries, by role
    other_languages: Mapping[str, int] = {}  # captions that are neither Chinese nor English


class SetRows(NamedTuple):
    """A row for each picture under each of its names."""

    keys: tuple[str, ...]  # what each row shows; rows of equal keys share their captions
    pictures: tuple[int, ...]  # number of each row's picture
    captions: Mapping[str, tuple[tuple[str, ...], ...]]  # by language, of each row; only languages that have any
    reading: SetReading


def hash_picture(content: bytes) -> bytes:
    """Digest of a picture's file: equal ones are one picture."""
    return hashlib.blake2b(content, digest_size=16).digest()


def check_sample(sample: SetSample) -> None:
    """Raise a `UserError` for a sample with a role that is not known."""
    try:
        check_roles(sample.text.captions)
    except SampleProblem as problem:
        raise UserError(f"{sample.origin}: {problem}; write it again") from problem


def check_queries(number: int, where: str) -> None:
    """Raise a `UserError` for a set without queries."""
    if not number:
        raise UserError(
            f"{where}: all captions are of the roles {' and '.join(ROLES_WITHOUT_QUERY)}, which are no queries; give "
            "captions of another role, such as original or name"
        )


class SetContents:
    """The samples of a set as they are read; `rows` joins those that show the same.

    Args:
        is_marked: whether every key is an identity, as in the built-in set.
    """

    def __init__(self, *, is_marked: bool) -> None:
        self._every_key_is_marked = is_marked
        self._samples: list[tuple[str, bool]] = []  # name, whether somebody marked it
        self._captions: list[tuple[tuple[str, str], ...]] = []  # language and text of each sample's queries
        self._left_out: Counter[str] = Counter()
        self._other_languages: Counter[str] = Counter()

    def add(self, sample: SetSample) -> None:
        """Add a sample; its picture is not kept."""
        name = name_content(sample.text, key=sample.key, shard=sample.shard, source="")
        self._samples.append((name, sample.text.is_marked or self._every_key_is_marked))
        self._other_languages.update(caption.language for caption in sample.text.left_out)
        texts = []
        for caption in sample.text.captions:
            if caption.role in ROLES_WITHOUT_QUERY:
                self._left_out[str(caption.role)] += 1
            else:
                texts.append((caption.language, caption.text))
        self._captions.append(tuple(texts))

    def rows(self, pictures: Sequence[int], *, where: str) -> SetRows:
        """The set, from the number of each sample's picture: equal files have equal numbers, counted from 0.

        Raises:
            UserError: if no caption is a query.
        """
        names = self._join(pictures)
        rows: dict[tuple[str, int], int] = {}
        captions: dict[str, list[list[str]]] = {language: [] for language in LANGUAGES}
        for content, picture, texts in zip(names, pictures, self._captions, strict=True):
            if (content, picture) not in rows:
                rows[content, picture] = len(rows)
                for lists in captions.values():
                    lists.append([])
            for language, text in texts:
                captions[language][rows[content, picture]].append(text)
        check_queries(sum(map(len, self._captions)), where)
        return SetRows(
            tuple(content for content, _ in rows),
            tuple(picture for _, picture in rows),
            {language: tuple(map(tuple, lists)) for language, lists in captions.items() if any(lists)},
            SetReading(
                samples=len(names),
                repeated_images=len(names) - len(rows),
                kept_apart=len(rows) - len(set(pictures)),
                left_out=dict(self._left_out),
                other_languages=dict(self._other_languages),
            ),
        )

    def _join(self, pictures: Sequence[int]) -> list[str]:
        """What each sample shows: names of equal pictures become one, unless both were marked."""
        found = [(name, is_marked, number) for (name, is_marked), number in zip(self._samples, pictures, strict=True)]
        marked = {picture: name for name, is_marked, picture in reversed(found) if is_marked}
        parent: dict[str, str] = {}

        def find(name: str) -> str:
            while (above := parent.get(name, name)) != name:
                parent[name] = parent.get(above, above)
                name = above
            return name

        first: dict[int, str] = {}
        for name, is_marked, picture in found:
            if not is_marked:
                parent[find(name)] = find(marked.get(picture) or first.setdefault(picture, name))
        return [find(name) for name, _, _ in found]
