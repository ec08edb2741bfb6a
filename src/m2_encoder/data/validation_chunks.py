"""Batches of a retrieval set for validation, divided among ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from m2_encoder.data.retrieval_set import RetrievalSet
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.types import RetrievalBatch


class _Part(NamedTuple):
    """Rows to encode; the first `num_own` are measured; without own ones, the set's first row, which is not."""

    rows: list[int]
    num_own: int


class ValidationChunks:
    """Batches of one rank's images and captions: its rank, rank + world size, ... of either.

    All ranks have the same number of chunks, and encode something of every side in each, because ranks that share
    split weights must encode together. A DataLoader would draw from torch's global generator, and a resumed run would
    differ.
    """

    def __init__(
        self,
        retrieval_set: RetrievalSet,
        *,
        tokenizer: SentencePieceTokenizer,
        chunk_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._set = retrieval_set
        self._tokenizer = tokenizer
        self._identity = torch.tensor(retrieval_set.numbers())
        self._queries = {language: retrieval_set.queries(language) for language in retrieval_set.languages}
        sizes = [len(self._identity), *map(len, self._queries.values())]
        most = -(-max(sizes) // world_size)  # rows of the first rank, which has the most
        self._number = -(-most // chunk_size)
        self._rank, self._world_size = rank, world_size

    def __len__(self) -> int:
        return self._number

    def __iter__(self) -> Iterator[RetrievalBatch]:
        return map(self._read, range(self._number))

    def _read(self, chunk: int) -> RetrievalBatch:
        images = self._part(len(self._identity), chunk)
        parts = {language: self._part(len(queries), chunk) for language, queries in self._queries.items()}
        return RetrievalBatch(
            images=self._set.images[images.rows],
            identity=self._identity[images.rows[: images.num_own]],
            texts={
                language: self._tokenizer([self._queries[language][row][1] for row in part.rows])
                for language, part in parts.items()
            },
            text_identity={
                language: self._ids([self._queries[language][row][0] for row in part.rows[: part.num_own]])
                for language, part in parts.items()
            },
        )

    def _part(self, total: int, chunk: int) -> _Part:
        own = range(self._rank, total, self._world_size)
        rows = list(own[chunk * len(own) // self._number : (chunk + 1) * len(own) // self._number])
        return _Part(rows or [0], len(rows))

    @staticmethod
    def _ids(numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64)
