"""Features of many images or texts, in batches, on whatever device the model is.

Legend: n items · B batch · E feature dim · S image side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from m2_encoder.types import TextTokens

DEFAULT_BATCH_SIZE = 256


class FeatureModel(Protocol):
    """What evaluation needs of a model; `M2Encoder` is one."""

    def encode_image(self, images: Tensor, /) -> Tensor:
        """(B, 3, S, S) to (B, E)."""
        ...

    def encode_text(self, text: TextTokens, /) -> Tensor:
        """B texts to (B, E)."""
        ...


Tokenize: TypeAlias = Callable[[Sequence[str]], TextTokens]
"""Texts to ids and mask, padded on the right, as the model's own tokenizer does it."""


def encode_images(
    model: FeatureModel,
    images: Tensor | Iterable[Tensor],
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    advance: Callable[[int], object] | None = None,
) -> Tensor:
    """Features of images, in evaluation mode and without autograd; the model's mode is restored.

    Args:
        model: on any device.
        images: (n, 3, S, S), uint8 or floating in 0..1; or batches of them, of any length, as a loader
            yields.
        batch_size: images per forward pass, where `images` is one tensor.
        advance: called with the size of each batch done, for a progress bar.

    Returns:
        (n, E) fp32 on the CPU, in the order given.

    Raises:
        ValueError: if there are no images.
    """
    batches = images.split(batch_size) if isinstance(images, Tensor) else images
    features = []
    with evaluation_mode(model) as device:
        for batch in batches:
            features.append(model.encode_image(batch.to(device, non_blocking=True)).float().cpu())
            if advance is not None:
                advance(len(batch))
    if not sum(map(len, features)):
        raise ValueError("there are no images to encode")
    return torch.cat(features)


def encode_texts(
    model: FeatureModel,
    texts: Sequence[str],
    tokenizer: Tokenize,
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    advance: Callable[[int], object] | None = None,
) -> Tensor:
    """Features of texts, in evaluation mode and without autograd; the model's mode is restored.

    Texts of similar length share a batch, because a batch costs as much as its longest text.

    Args:
        model: on any device.
        texts: n strings.
        tokenizer: the model's own.
        batch_size: texts per forward pass.
        advance: called with the size of each batch done, for a progress bar.

    Returns:
        (n, E) fp32 on the CPU, in the order given.

    Raises:
        ValueError: if there are no texts.
    """
    if not texts:
        raise ValueError("there are no texts to encode")
    tokens = tokenizer(texts)
    lengths = tokens.mask.sum(dim=1)
    order = lengths.argsort(stable=True, descending=True)
    features = []
    with evaluation_mode(model) as device:
        for rows in order.split(batch_size):
            longest = int(lengths[rows].max())
            batch = TextTokens(tokens.ids[rows, :longest].to(device), tokens.mask[rows, :longest].to(device))
            features.append(model.encode_text(batch).float().cpu())
            if advance is not None:
                advance(len(rows))
    return torch.cat(features)[order.argsort()]


@contextmanager
def evaluation_mode(model: object) -> Iterator[torch.device]:
    """No dropping of paths and no autograd inside; afterwards every module is in the mode it was in.

    Yields:
        The device of the model's parameters; the CPU where it has none.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    were_training = [module.training for module in modules]
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    try:
        for module in modules:
            module.training = False
        # no_grad, not inference_mode: the features go into metrics that may keep or change them in place.
        with torch.no_grad():
            yield torch.device("cpu") if parameter is None else parameter.device
    finally:
        for module, training in zip(modules, were_training, strict=True):
            module.training = training
