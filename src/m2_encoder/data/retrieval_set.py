"""Sets of images and captions for retrieval, read whole from WebDataset tars.

An evaluation needs every item once, in a fixed order and in any number of processes the same; so it reads
the tars one after the other and keeps the decoded images as bytes: 1,494 emoji at 64 px take 18 MB.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.data.shards.members import RawSample, index_shards, read_sample
from m2_encoder.errors import ImageError, UserError
from m2_encoder.types import LANGUAGES


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

    A sample is an image and a `.json` (see `m2_encoder.data.shards.members`) with `captions`, lists by language: the
    first caption of each language, its name, is used. A sample's key is the `key` of its JSON, or its name in the
    tar.

    Args:
        folder: holds `*.tar`.
        name: name in metric names.
        transform: decodes each image once.

    Raises:
        UserError: for a folder without samples, a damaged tar, or a sample without image, captions or
            language. An evaluation never skips: a set that lacks items is another set.
    """
    keys: list[str] = []
    images: list[Tensor] = []
    captions: dict[str, list[str]] = {language: [] for language in LANGUAGES}
    for location in index_shards(folder):
        raw = read_sample(location)
        keys.append(str(raw.metadata.get("key", raw.key)))
        try:
            images.append(transform.to_uint8(raw.image))
        except ImageError as error:
            raise UserError(f"{raw.origin}: {error}") from error
        for language in LANGUAGES:
            captions[language].append(_first_caption(raw, language))
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
        for location in index_shards(folder):
            raw = read_sample(location)
            for language in LANGUAGES:
                _first_caption(raw, language)
    except UserError as error:
        raise UserError(
            f"data.validation.{name}={os.fspath(folder)}: {error}, or leave it out: ~data.validation.{name}"
        ) from error


def _first_caption(raw: RawSample, language: str) -> str:
    texts = raw.metadata["captions"].get(language)
    if not isinstance(texts, list) or not texts or not isinstance(texts[0], str) or not texts[0].strip():
        raise UserError(
            f"{raw.origin}: no caption in {language!r}; `captions` must have a list for each of {', '.join(LANGUAGES)}"
        )
    return texts[0]
