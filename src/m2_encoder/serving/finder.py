"""Finds pictures of an index for words, pictures and combinations of both.

Letters: N pictures · D feature dim.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import numpy as np

from m2_encoder.errors import UserError
from m2_encoder.picture_search.ending import find_end
from m2_encoder.picture_search.index import PictureIndex
from m2_encoder.picture_search.query import Term, parse_query
from m2_encoder.serving.batches import Features
from m2_encoder.serving.encoder import Encoder
from m2_encoder.serving.gallery import row_of
from m2_encoder.serving.refusals import busy, invalid

_MAX_WAITING: Final = 64
_SHORTEST: Final = 1e-3
_COPY: Final = 0.999  # the cosine of two pictures that are the same
_SEEN_FOR_END: Final = 1000  # results among which the probable end is looked for, whatever part is asked for


class Found(NamedTuple):
    """A part of a list of results."""

    names: list[str]
    scores: list[float]  # cosines, best first
    end: int  # results of the whole list before its probable end
    total: int  # of the whole list


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
        self._waiting = 0

    def use(self, index: PictureIndex) -> None:
        """Takes a newer index from now on."""
        self._index = index

    def list_names(self, start: int, count: int) -> tuple[list[str], int]:
        """A part of all names, in their order, and the number of all."""
        return self._index.names[start : start + count], len(self._index)

    async def search(self, query: str | None, picture: bytes | None, start: int, count: int) -> Found:
        """Results for a query as `parse_query` reads it, for the content of a picture's file, or for their sum.

        Raises:
            Refusal: for a query that cannot be read, or names a picture that the index has not; as `Encoder`.
        """
        index, terms = self._index, [] if query is None else _parse(query)
        return await self._find(index, await self._encode(index, terms, picture), start, count)

    async def similar(self, name: str, start: int, count: int) -> Found:
        """The pictures that are most like one of the index, without itself.

        Raises:
            Refusal: 404 for a name that it has not.
        """
        index, row = self._index, row_of(self._index, name)
        return await self._find(index, np.asarray(index.features[row], dtype=np.float32), start, count, without=row)

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
        self, index: PictureIndex, feature: Features, start: int, count: int, without: int | None = None
    ) -> Found:
        if self._waiting >= _MAX_WAITING:
            raise busy(f"{self._waiting} searches wait")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._thread, _find_now, index, feature, start, count, without
            )
        finally:
            self._waiting -= 1


def _find_now(index: PictureIndex, feature: Features, start: int, count: int, without: int | None) -> Found:
    left_out = int(without is not None)
    top = max(start + count, _SEEN_FOR_END) + left_out
    scores, rows = (each[0] for each in index.search(feature[None], top))
    if without is not None:
        scores, rows = scores[rows != without], rows[rows != without]
    # Copies of a picture that is searched for say nothing about how alike others can be.
    copies = int(np.count_nonzero(scores >= _COPY))
    end = copies + find_end(scores[copies:], index.sample @ feature, len(index))
    part = slice(start, start + count)
    return Found([index.names[row] for row in rows[part]], scores[part].tolist(), end, len(index) - left_out)


def _parse(query: str) -> list[Term]:
    try:
        return parse_query(query)
    except UserError as error:
        raise invalid(f"the query {error.text}") from error
