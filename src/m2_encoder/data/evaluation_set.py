"""Sets of images and captions for retrieval, read whole from WebDataset tars.

An evaluation needs every item once, in a fixed order and in any number of processes the same; so it reads
the tars one after the other and keeps the decoded images as bytes: 1,494 emoji at 64 px take 18 MB.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m2_encoder.data.transforms import EvalTransform
from m2_encoder.errors import ImageError, UserError
from m2_encoder.types import LANGUAGES

IMAGE_SUFFIXES = ("webp", "png", "jpg", "jpeg")
"""Members of a sample that hold its image."""


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
    """Reads all tars of a folder, in the order of their names.

    A sample is an image (see `IMAGE_SUFFIXES`) and a `.json` with `captions`, lists by language: the first
    caption of each language, its name, is used. A sample's key is the `key` of its JSON, or its name in the
    tar.

    Args:
        folder: holds `*.tar`.
        name: name in metric names.
        transform: decodes each image once.

    Raises:
        UserError: for a folder without samples, a damaged tar, or a sample without image, captions or
            language. An evaluation never skips: a set that lacks items is another set.
    """
    folder = Path(folder)
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise UserError(f"{folder} holds no .tar file; an evaluation set is a folder of WebDataset tars")
    keys: list[str] = []
    images: list[Tensor] = []
    captions: dict[str, list[str]] = {language: [] for language in LANGUAGES}
    for shard in shards:
        for sample_name, members in _read_samples(shard):
            where = f"{shard}, sample {sample_name!r}"
            record = _parse_record(members, where)
            keys.append(str(record.get("key", sample_name)))
            images.append(_decode(members, transform, where))
            for language in LANGUAGES:
                captions[language].append(_first_caption(record, language, where))
    if not keys:
        raise UserError(f"{folder} holds tars without a sample")
    return RetrievalSet(name, tuple(keys), torch.stack(images), {k: tuple(v) for k, v in captions.items()})


def _read_samples(shard: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Neighbouring members that share a name up to its first dot, as WebDataset groups them."""
    current, members = "", dict[str, bytes]()
    try:
        with tarfile.open(shard) as tar:
            for member in tar:
                stream = tar.extractfile(member) if member.isfile() else None
                if stream is None:
                    continue
                parent, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                sample_name = f"{parent}/{stem}" if parent else stem
                if members and sample_name != current:
                    yield current, members
                    members = {}
                current = sample_name
                members[suffix.lower()] = stream.read()
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{shard} cannot be read: {error}; unpack or copy it anew") from error
    if members:
        yield current, members


def _parse_record(members: Mapping[str, bytes], where: str) -> dict[str, Any]:
    if "json" not in members:
        raise UserError(f"{where}: no .json with its captions, only {', '.join(members)}")
    try:
        record = json.loads(members["json"])
    except ValueError as error:
        raise UserError(f"{where}: its .json cannot be parsed: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("captions"), dict):
        raise UserError(f"{where}: its .json must be an object with `captions`, lists by language")
    return record


def _decode(members: Mapping[str, bytes], transform: EvalTransform, where: str) -> Tensor:
    content = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
    if content is None:
        raise UserError(f"{where}: no image; known suffixes: {', '.join(IMAGE_SUFFIXES)}")
    try:
        return transform.to_uint8(content)
    except ImageError as error:
        raise UserError(f"{where}: {error}") from error


def _first_caption(record: Mapping[str, Any], language: str, where: str) -> str:
    texts = record["captions"].get(language)
    if not isinstance(texts, list) or not texts or not isinstance(texts[0], str) or not texts[0].strip():
        raise UserError(f"{where}: no caption in {language!r}; `captions` must have a list for each of {LANGUAGES}")
    return texts[0]
