"""The model behind all doors: texts and picture files to features, in batches, within bounds.

Letters: n items · D feature dim · S side of the model's pictures in pixels.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from m2_encoder.data.images.opening import open_picture
from m2_encoder.errors import ImageError
from m2_encoder.evaluation.encode import encode_images, encode_texts
from m2_encoder.evaluation.models.base import EvaluatedModel
from m2_encoder.evaluation.models.onnx_model import GraphTowers
from m2_encoder.serving.batches import Batches, Features
from m2_encoder.serving.refusals import Refusal, busy, invalid

MAX_TEXT: Final = 10_000
"""Characters of a text; a model reads far fewer of them."""

_DECODERS: Final = 2
"""Pictures that are decoded at a time; each takes up to `transforms.MAX_PIXELS` x 3 bytes."""


class EncodedPicture(NamedTuple):
    """Features of a picture file, and its size as stored."""

    features: Features  # (D,) L2-normalised
    width: int  # pixels
    height: int  # pixels


class Encoder:
    """A model that many requests use at once; to be used from one event loop.

    Args:
        model: with a text tower.
        batch_size: texts or pictures of a forward pass at most.
        max_waiting: texts, and pictures, that may wait for the model.
    """

    def __init__(self, model: EvaluatedModel, *, batch_size: int, max_waiting: int) -> None:
        model.require_texts()
        assert model.model is not None, "files of features encode nothing"
        self._preprocess, self._tokenizer, self._towers = model.preprocess, model.tokenizer, model.model
        self._batch_size = batch_size
        self._max_waiting = max_waiting
        self._decoding = 0
        self._model_thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._decoders = ThreadPoolExecutor(_DECODERS, thread_name_prefix="decode")
        bounds = {"batch_size": batch_size, "max_waiting": max_waiting}
        self._texts: Batches[str, Features] = Batches(self._encode_texts, self._model_thread, **bounds)
        self._pictures: Batches[Tensor, Features] = Batches(self._encode_pictures, self._model_thread, **bounds)
        self.name = os.path.basename(model.name)  # not the path: others than the owner of the machine read it
        self.feature_dim = model.facts.embed_dim
        self.runtime = "onnx" if isinstance(model.model, GraphTowers) else "torch"

    async def texts(self, texts: Sequence[str]) -> Features:
        """Features of texts, (n, D), L2-normalised.

        Raises:
            Refusal: for a text that is too long or no Unicode; 503 for a full queue.
        """
        for text in texts:
            if len(text) > MAX_TEXT:
                raise Refusal(413, "too_long", f"a text of {len(text):,} characters; at most {MAX_TEXT:,} are read")
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise invalid(f"the text is no Unicode: half a character at place {error.start + 1}") from error
        return np.stack(await self._texts.run(texts))

    async def picture(self, content: bytes) -> EncodedPicture:
        """Features of a picture file.

        Raises:
            Refusal: 415 for what is no picture, or a damaged or too large one; 503 for a full queue.
        """
        if self._decoding >= self._max_waiting:
            raise busy(f"{self._decoding} pictures wait to be decoded")
        self._decoding += 1
        try:
            decoded = await asyncio.get_running_loop().run_in_executor(self._decoders, self._decode, content)
        except ImageError as error:
            said = error.text.removeprefix("image bytes: ")
            raise Refusal(415, "no_picture", f"the picture cannot be used: {said}") from error
        finally:
            self._decoding -= 1
        pixels, width, height = decoded
        return EncodedPicture((await self._pictures.run([pixels]))[0], width, height)

    def close(self) -> None:
        """Ends the threads; what they are at is finished."""
        self._decoders.shutdown(cancel_futures=True)
        self._model_thread.shutdown(cancel_futures=True)

    def _decode(self, content: bytes) -> tuple[Tensor, int, int]:
        """(3, S, S); width and height as stored."""
        pixels = self._preprocess(content)
        with open_picture(content) as image:  # its header was just read
            return pixels, image.width, image.height

    def _encode_texts(self, texts: list[str]) -> Features:
        return _finite(encode_texts(self._towers, texts, self._tokenizer, batch_size=self._batch_size))

    def _encode_pictures(self, pictures: list[Tensor]) -> Features:
        return _finite(encode_images(self._towers, torch.stack(pictures), batch_size=self._batch_size))


def _finite(features: Tensor) -> Features:
    if not features.isfinite().all():
        raise Refusal(500, "broken_model", "the model gives features that are not finite: its weights are broken")
    return np.asarray(features.numpy(), dtype=np.float32)
