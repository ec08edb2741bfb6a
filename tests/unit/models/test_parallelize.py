"""Checkpointed layers: the same numbers from fewer saved bytes. Sharding is in `tests/distributed`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.parallelize import checkpoint_layers
from m2_encoder.types import TextTokens
from tests.support.training import tiny_config


def encode(model: M2Encoder) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(3, 3, 16, 16, generator=generator, dtype=torch.float64)
    ids = torch.randint(5, 100, (3, 7), generator=generator)
    mask = torch.arange(7) < torch.tensor([[7], [3], [5]])
    torch.manual_seed(8)  # of stochastic depth
    return torch.cat([model.encode_image(images), model.encode_text(TextTokens(ids, mask))])


def run(model: M2Encoder) -> tuple[Tensor, dict[str, Tensor], int]:
    """Features, gradients, and the bytes that forward saves for backward, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = encode(model)
    size = sum(saved.values())
    (features * torch.arange(features.numel(), dtype=features.dtype).view_as(features)).sum().backward()
    return features.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, size


@pytest.fixture
def model() -> M2Encoder:
    return M2Encoder(tiny_config(num_layers=4, drop_path_rate=0.5)).double().train()


def test_checkpointed_layers_change_no_number(model: M2Encoder) -> None:
    features, gradients, size = run(model)
    checkpoint_layers(model)
    again, repeated, smaller = run(model)
    assert torch.equal(again, features)
    assert repeated.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(repeated[name], gradient, rtol=0, atol=1e-12 * float(gradient.abs().max() + 1))
    assert smaller < size / 2


def test_evaluation_checkpoints_nothing(model: M2Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint_layers(model)
    monkeypatch.setattr("m2_encoder.models.multiway.checkpoint", lambda *_, **__: pytest.fail("checkpointed"))
    with torch.no_grad():
        encode(model.eval())


def test_the_state_of_a_checkpointed_model_is_that_of_any(model: M2Encoder) -> None:
    names = list(model.state_dict())
    checkpoint_layers(model)
    assert list(model.state_dict()) == names
