"""A retrieval set in chunks, for validation during training."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from m2_encoder.data.retrieval_set import RetrievalSet
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.types import RetrievalBatch


class ValidationChunks:
    """One rank's share of a retrieval set, in chunks that are encoded together: items rank, rank + world size, ...

    All ranks have the same number of chunks (unless a chunk is one item), because ranks that share split weights must
    encode together.

    No DataLoader: all of it is in memory, and a DataLoader would draw from torch's global generator, which a resumed
    run must find as an uninterrupted one does.

    Args:
        retrieval_set: what is split.
        tokenizer: makes ids of captions.
        chunk_size: images per chunk.
        rank: of this process.
        world_size: number of processes.
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
        numbers = {key: number for number, key in enumerate(dict.fromkeys(retrieval_set.keys))}
        self._identity = torch.tensor([numbers[key] for key in retrieval_set.keys])
        own, first = (range(r, len(retrieval_set.keys), world_size) for r in (rank, 0))
        self._chunks = [list(own[start : start + chunk_size]) for start in range(0, len(own), chunk_size)]
        if len(self._chunks) * chunk_size < len(first) and chunk_size > 1:  # the first rank has a chunk more
            *others, last = self._chunks
            self._chunks = [*others, last[:-1], last[-1:]]

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[RetrievalBatch]:
        return map(self._read, self._chunks)

    def _read(self, rows: list[int]) -> RetrievalBatch:
        return RetrievalBatch(
            images=self._set.images[rows],
            identity=self._identity[rows],
            texts={
                language: self._tokenizer([captions[row] for row in rows])
                for language, captions in self._set.captions.items()
            },
        )
