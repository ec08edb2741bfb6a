"""Finds pictures of an index for words, pictures and combinations of both.

Letters: N pictures · D feature dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from m2_encoder.errors import UserError
from m2_encoder.picture_search.index import PictureIndex
from m2_encoder.picture_search.query import Term, parse_query
from m2_encoder.picture_search.results import SEEN_FOR_END, judge
from m2_encoder.serving.batches import Batches, Features
from m2_encoder.serving.encoder import Encoder
from m2_encoder.serving.gallery import row_of
from m2_encoder.serving.refusals import invalid

_MAX_WAITING: Final = 64
_BATCH: Final = 16
_SHORTEST: Final = 1e-3


class Found(NamedTuple):
    """A part of a list of results."""

    names: list[str]
    scores: list[float]  # cosines, best first
    end: int  # results of the whole list before its probable end
    total: int  # of the whole list


@dataclasses.dataclass(frozen=True)
class _Search:
    """What is searched for."""

    index: PictureIndex
    feature: Features  # (D,)
    start: int
    count: int
    without: frozenset[int]  # rows that are no results


class Finder:
    """An index with the model that made it.

    Args:
        index: of at least one picture; may be replaced by a newer one with `use`.
        encoder: the model.
    """

    def __init__(self, index: PictureIndex, encoder: Encoder) -> None:
        self._index = index
        self._encoder = encoder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="search")
        self._searches: Batches[_Search, Found] = Batches(
            _find_all, self._thread, batch_size=_BATCH, max_waiting=_MAX_WAITING
        )

    def use(self, index: PictureIndex) -> None:
        """Takes a newer index from now on."""
        self._index = index

    def list_names(self, start: int, count: int) -> tuple[list[str], int]:
        """A part of all names, in their order, and the number of all."""
        return self._index.names[start : start + count], len(self._index)

    async def search(self, query: str | None, picture: bytes | None, start: int, count: int) -> Found:
        """Results for a query as `parse_query` reads it, for the content of a picture's file, or for their sum.

        Pictures of the index that the query names are not among them.

        Raises:
            Refusal: for a query that cannot be read, or names a picture that the index has not; as `Encoder`.
        """
        index, terms = self._index, [] if query is None else _parse(query, self._index)
        own = [row_of(index, term.content) for term in terms if term.kind == "picture"]
        return await self._find(index, await self._encode(index, terms, picture), start, count, own)

    async def similar(self, name: str, start: int, count: int) -> Found:
        """The pictures that are most like one of the index, without itself.

        Raises:
            Refusal: 404 for a name that it has not.
        """
        index, row = self._index, row_of(self._index, name)
        return await self._find(index, np.asarray(index.features[row], dtype=np.float32), start, count, [row])

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(cancel_futures=True)

    async def _encode(self, index: PictureIndex, terms: Sequence[Term], picture: bytes | None) -> Features:
        """The feature of a query, (D,): the weighted sum of its terms, normalised."""
        words = [term.content for term in terms if term.kind == "words"]
        rows = [row_of(index, term.content) for term in terms if term.kind == "picture"]
        weights = [term.weight for kind in ("words", "picture") for term in terms if term.kind == kind]
        parts = [*(await self._encoder.texts(words) if words else ()), *(index.features[row] for row in rows)]
        if picture is not None:
            parts.append((await self._encoder.picture(picture)).features)
            weights.append(1.0)
        total = np.einsum("n,nd->d", np.array(weights), np.array(parts, dtype=np.float64))
        length = float(np.linalg.norm(total))
        if length < _SHORTEST:
            raise invalid("the terms of the query cancel each other; nothing is left to search for")
        return (total / length).astype(np.float32)

    async def _find(
        self, index: PictureIndex, feature: Features, start: int, count: int, without: Collection[int]
    ) -> Found:
        return (await self._searches.run([_Search(index, feature, start, count, frozenset(without))]))[0]


def _find_all(searches: list[_Search]) -> list[Found]:
    """Searches that met: those of one index read it once, which for few queries is most of the time."""
    together: dict[tuple[int, int], list[int]] = {}
    for number, each in enumerate(searches):
        top = max(each.start + each.count, SEEN_FOR_END) + len(each.without)
        together.setdefault((id(each.index), top), []).append(number)
    found: dict[int, Found] = {}
    for (_, top), numbers in together.items():
        queries = np.stack([searches[number].feature for number in numbers])
        for number, scores, rows in zip(numbers, *searches[numbers[0]].index.search(queries, top), strict=True):
            found[number] = _take_part(searches[number], scores, rows)
    return [found[number] for number in range(len(searches))]


def _take_part(search: _Search, found: Features, rows: npt.NDArray[np.int64]) -> Found:
    scores, names, end = judge(search.index, search.feature, found, rows, search.without)
    part = slice(search.start, search.start + search.count)
    return Found(names[part], scores[part].tolist(), end, len(search.index) - len(search.without))


def _parse(query: str, index: PictureIndex) -> list[Term]:
    try:
        return parse_query(query, is_picture=index.rows.__contains__)
    except UserError as error:
        raise invalid(f"the query {error.text}") from error
