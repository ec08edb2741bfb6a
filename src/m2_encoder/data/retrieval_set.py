"""Sets of images and captions for retrieval, read whole from WebDataset tars.

An evaluation needs every item once, in a fixed order and in any number of processes the same; so it reads
the tars one after the other and keeps the decoded images as bytes: 1,494 emoji at 64 px take 18 MB. It never skips: a
set that lacks items is another set, so whatever training would replace is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.data.samples.parse import SampleProblem, SampleText, parse_sample_text
from m2_encoder.data.shards.index import IndexHeader
from m2_encoder.data.shards.reader import SampleBytes, ShardReader
from m2_encoder.errors import ImageError, UserError
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.types import LANGUAGES, RetrievalBatch


class RetrievalSet(NamedTuple):
    """Images and what is said about them.

    Attributes:
        name: name in metric names, such as "emoji_heldout_style".
        keys: what each image shows; images with the same key are equally right for a caption, length n.
        images: (n, 3, S, S) uint8.
        captions: by language; row i describes image i, length n.
    """

    name: str
    keys: tuple[str, ...]
    images: Tensor
    captions: dict[str, tuple[str, ...]]


def read_retrieval_set(folder: str | os.PathLike[str], *, name: str, transform: EvalTransform) -> RetrievalSet:
    """Read all tars of a folder, in the order of their names.

    A sample needs a caption in each language; the first one, its name, is used. Its key is the `key` of its JSON, or
    its name in the tar.

    Args:
        folder: holds `*.tar`.
        name: name in metric names.
        transform: decodes each image once.

    Raises:
        UserError: for a folder without samples, and anything that cannot be used in a tar, which is named.
    """
    keys: list[str] = []
    images: list[Tensor] = []
    captions: dict[str, list[str]] = {language: [] for language in LANGUAGES}
    for origin, raw, text in _read_samples(folder):
        keys.append(str(text.metadata.get("key", raw.key)))
        try:
            images.append(transform.to_uint8(raw.image))
        except ImageError as error:
            raise UserError(f"{origin}: {error}") from error
        for language in LANGUAGES:
            captions[language].append(_first_caption(text, language, origin))
    return RetrievalSet(name, tuple(keys), torch.stack(images), {k: tuple(v) for k, v in captions.items()})


def check_retrieval_set(folder: str | os.PathLike[str], *, name: str) -> None:
    """Look at the texts of a set, as `read_retrieval_set` will.

    Args:
        folder: holds `*.tar`.
        name: of the set, for messages.

    Raises:
        UserError: as `read_retrieval_set`, but for images that cannot be decoded.
    """
    try:
        for origin, _, text in _read_samples(folder):
            for language in LANGUAGES:
                _first_caption(text, language, origin)
    except UserError as error:
        raise UserError(
            f"data.validation.{name}={os.fspath(folder)}: {error}, or leave it out: ~data.validation.{name}"
        ) from error


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


def _read_samples(folder: str | os.PathLike[str]) -> Iterator[tuple[str, SampleBytes, SampleText]]:
    """Every sample with what it says, and where it lies, "shard:key"."""
    shards = sorted(map(str, Path(folder).glob("*.tar")))
    if not shards:
        raise UserError(f"{folder}: no *.tar shards there")
    is_empty = True
    with closing(ShardReader(max_open=1)) as reader:
        for shard in shards:
            size = _measure(reader, shard)
            for number in range(size.samples):
                origin = shard
                try:
                    raw = reader.read(shard, number, size=size.size, written=size.written)
                    origin = f"{shard}:{raw.key}"
                    text = parse_sample_text(raw.json, raw.text)
                except SampleProblem as problem:
                    raise UserError(f"{origin}: {problem}; write the shard again") from problem
                yield origin, raw, text
                is_empty = False
    if is_empty:
        raise UserError(f"{folder}: no samples in its {len(shards)} tar(s)")


def _measure(reader: ShardReader, shard: str) -> IndexHeader:
    """What a shard holds, if all of it can be used as far as headers tell."""
    try:
        size, faults = reader.measure(shard), reader.faults(shard)
    except OSError as error:
        raise UserError(f"{shard}: not a readable tar ({error}); write the shard again") from error
    if faults:
        key, reason, detail = faults[0]
        place = shard if key is None else f"{shard}:{key}"
        raise UserError(f"{place}: {reason} ({detail}); an evaluation skips nothing: write the shard again")
    return size


def _first_caption(text: SampleText, language: str, origin: str) -> str:
    """As it is written: a tokenizer tells apart what has blanks around it and what has not."""
    texts = (text.metadata.get("captions") or {}).get(language)
    if not texts or not isinstance(texts[0], str) or not texts[0].strip():
        raise UserError(
            f"{origin}: no caption in {language!r}; `captions` must have a list for each of {', '.join(LANGUAGES)}"
        )
    return texts[0]
