"""Image-caption sets for retrieval, read whole into memory from WebDataset tars, in order.

What training would skip is an error here: a set that lacks items is another set.
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
from m2_encoder.data.shards.reader import OpenShard, SampleBytes
from m2_encoder.errors import ImageError, UserError
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.types import LANGUAGES, RetrievalBatch


class RetrievalSet(NamedTuple):
    """n images with a caption of each language."""

    name: str  # in metric names, such as "emoji_heldout_style"
    keys: tuple[str, ...]  # what each image shows; a caption matches all images of its key
    images: Tensor  # (n, 3, S, S) uint8
    captions: dict[str, tuple[str, ...]]  # by language; row i describes image i


def read_retrieval_set(folder: str | os.PathLike[str], *, name: str, transform: EvalTransform) -> RetrievalSet:
    """Read `*.tar` of a folder, sorted by name.

    Of each language the first caption of a sample is used. Its key is the `key` of its JSON, or its name in the tar.

    Raises:
        UserError: for a folder without samples, and for anything unusable, by name.
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
    """Check everything but the images of the validation set `name`, which are not decoded.

    Raises:
        UserError: as `read_retrieval_set`.
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
    """Batches of one rank's items of a retrieval set: rank, rank + world size, ...

    All ranks have the same number of chunks (unless a chunk is one item), because ranks that share split weights must
    encode together. A DataLoader would draw from torch's global generator, and a resumed run would differ.
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
    """Every sample: its place as "shard:key", its files, its parsed text."""
    shards = sorted(map(str, Path(folder).glob("*.tar")))
    if not shards:
        raise UserError(f"{folder}: no *.tar shards there")
    is_empty = True
    for shard in shards:
        with closing(_open(shard)) as tar:
            for number in range(len(tar.index)):
                origin = shard
                try:
                    raw = tar.read(number)
                    origin = f"{shard}:{raw.key}"
                    text = parse_sample_text(raw.json, raw.text)
                except SampleProblem as problem:
                    raise UserError(f"{origin}: {problem}; write the shard again") from problem
                yield origin, raw, text
                is_empty = False
    if is_empty:
        raise UserError(f"{folder}: no samples in its {len(shards)} tar(s)")


def _open(shard: str) -> OpenShard:
    """A tar in which everything is usable, as far as its headers tell; its folder is left as it is."""
    try:
        tar = OpenShard(shard, write_index=False)
    except (OSError, SampleProblem) as error:
        raise UserError(f"{shard}: not a readable tar ({error}); write the shard again") from error
    if tar.index.faults:
        tar.close()
        key, reason, detail = tar.index.faults[0]
        place = shard if key is None else f"{shard}:{key}"
        raise UserError(f"{place}: {reason} ({detail}); an evaluation skips nothing: write the shard again")
    return tar


def _first_caption(text: SampleText, language: str, origin: str) -> str:
    """The caption as written, with the blanks around it, which a tokenizer sees."""
    texts = (text.metadata.get("captions") or {}).get(language)
    if not texts or not isinstance(texts[0], str) or not texts[0].strip():
        raise UserError(
            f"{origin}: no caption in {language!r}; `captions` must have a list for each of {', '.join(LANGUAGES)}"
        )
    return texts[0]
