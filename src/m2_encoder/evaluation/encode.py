"""Features of many images or texts, in batches, on the model's device.

Letters: n items · B batch · E feature dim · S image side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from m2_encoder.types import TextTokens

DEFAULT_BATCH_SIZE = 256


class FeatureModel(Protocol):
    """A model that encodes images and texts, such as `M2Encoder`."""

    def encode_image(self, images: Tensor, /) -> Tensor:
        """(B, 3, S, S) to (B, E)."""
        ...

    def encode_text(self, text: TextTokens, /) -> Tensor:
        """(B, T) to (B, E)."""
        ...


Tokenize: TypeAlias = Callable[[Sequence[str]], TextTokens]
"""Texts to ids and mask, padded on the right."""


def encode_images(model: FeatureModel, images: Tensor, *, batch_size: int = DEFAULT_BATCH_SIZE) -> Tensor:
    """Features of images, (n, E) fp32 on the CPU, without autograd; the model's training mode is restored.

    `images` are (n, 3, S, S), uint8 or floating in 0..1.

    Raises:
        ValueError: if there are no images.
    """
    if not len(images):
        raise ValueError("there are no images to encode")
    with evaluation_mode(model) as device:
        batches = (batch.to(device, non_blocking=True) for batch in images.split(batch_size))
        return torch.cat([model.encode_image(batch).float().cpu() for batch in batches])


def encode_texts(
    model: FeatureModel, texts: Sequence[str], tokenizer: Tokenize, *, batch_size: int = DEFAULT_BATCH_SIZE
) -> Tensor:
    """Features of texts, (n, E) fp32 on the CPU, without autograd; the model's training mode is restored.

    Texts of similar length share a batch, because a batch costs as much as its longest text.

    Raises:
        ValueError: if there are no texts.
    """
    if not texts:
        raise ValueError("there are no texts to encode")
    tokens = tokenizer(texts)
    batches = split_by_length(tokens, batch_size)
    with evaluation_mode(model) as device:
        features = [encode_rows(model, tokens, rows, device) for rows in batches]
    return torch.cat(features)[torch.cat(batches).argsort()]


def split_by_length(tokens: TextTokens, batch_size: int) -> tuple[Tensor, ...]:
    """Rows of batches of texts, the longest first, (B,) int64 each."""
    return tokens.mask.sum(dim=1).argsort(stable=True, descending=True).split(batch_size)


def encode_rows(model: FeatureModel, tokens: TextTokens, rows: Tensor, device: torch.device) -> Tensor:
    """Features of some texts, (B, E) fp32 on the CPU, cut behind the longest of them; for `evaluation_mode`."""
    ids, mask = tokens.ids[rows], tokens.mask[rows]
    longest = int(mask.sum(dim=1).max())
    return model.encode_text(TextTokens(ids[:, :longest].to(device), mask[:, :longest].to(device))).float().cpu()


@contextmanager
def evaluation_mode(model: object) -> Iterator[torch.device]:
    """Evaluation mode without autograd; yields the device of the model, the CPU if it has no parameters.

    Every module is in its former mode afterwards.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    were_training = [module.training for module in modules]
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    try:
        for module in modules:
            module.training = False
        # Not inference_mode: metrics may change features in place.
        with torch.no_grad():
            yield torch.device("cpu") if parameter is None else parameter.device
    finally:
        for module, training in zip(modules, were_training, strict=True):
            module.training = training
