"""Batching, sorting and modes must not show in the features."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from m2_encoder.evaluation.encode import encode_images, encode_texts, evaluation_mode
from m2_encoder.types import TextTokens


class SumModel(nn.Module):
    """Features that identify the input; notes the shape of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.frozen = nn.Dropout(0.9).eval()
        self.text_shapes: list[tuple[int, ...]] = []
        self.image_sizes: list[int] = []

    def encode_image(self, images: Tensor) -> Tensor:
        self.image_sizes.append(len(images))
        return self.weight * nn.functional.dropout(images.flatten(1).float(), 0.9, self.training)

    def encode_text(self, text: TextTokens) -> Tensor:
        self.text_shapes.append(tuple(text.ids.shape))
        return self.weight * torch.stack([(text.ids * text.mask).sum(1), text.mask.sum(1)], dim=1)


def tokenize(texts: list[str] | tuple[str, ...]) -> TextTokens:
    """Code points, padded with 99 to the longest."""
    longest = max(map(len, texts))
    ids = torch.tensor([[ord(c) for c in text] + [99] * (longest - len(text)) for text in texts])
    lengths = torch.tensor([len(text) for text in texts])
    return TextTokens(ids, torch.arange(longest) < lengths[:, None])


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_texts_keep_their_order(batch_size: int) -> None:
    texts = ["abc", "b", "a much longer text", "de", "b", "fghij"]
    model = SumModel()
    features = encode_texts(model, texts, tokenize, batch_size=batch_size)
    assert features.tolist() == [[sum(map(ord, text)), len(text)] for text in texts]
    assert features.dtype == torch.float32
    assert not features.requires_grad


def test_a_batch_of_texts_is_as_long_as_its_longest() -> None:
    model = SumModel()
    encode_texts(model, ["aaaaaaaa", "b", "cccccccc", "d"], tokenize, batch_size=2)
    assert model.text_shapes == [(2, 8), (2, 1)]


def test_images_are_encoded_in_batches() -> None:
    images = torch.randint(0, 256, (7, 3, 2, 2), dtype=torch.uint8)
    model = SumModel()
    assert torch.equal(encode_images(model, images, batch_size=3), images.flatten(1).float())
    assert model.image_sizes == [3, 3, 1]


def test_the_mode_of_every_module_is_restored() -> None:
    model = SumModel().train()
    model.frozen.eval()
    with evaluation_mode(model) as device:
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert device.type == "cpu"
    assert model.training
    assert not model.frozen.training
    assert torch.is_grad_enabled()
    with pytest.raises(RuntimeError, match="on purpose"), evaluation_mode(model):
        raise RuntimeError("on purpose")
    assert model.training


def test_nothing_to_encode_is_an_error() -> None:
    with pytest.raises(ValueError, match="no texts"):
        encode_texts(SumModel(), [], tokenize)
    with pytest.raises(ValueError, match="no images"):
        encode_images(SumModel(), torch.empty(0, 3, 2, 2))
