from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from m2_encoder.errors import UserError
from m2_encoder.models.config import NAME_TO_CONFIG, M2EncoderConfig
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.trainable_parts import OPTIONAL_PARTS
from m2_encoder.planning.cost import ModelCost, estimate_cost
from m2_encoder.training.adaptation import Adaptation
from m2_encoder.training.adaptations.last import Last
from m2_encoder.training.adaptations.locked import Locked
from m2_encoder.training.adaptations.lora import Lora
from m2_encoder.training.adaptations.mixture import Upcycling

TINY = NAME_TO_CONFIG["tiny"]
BASE = NAME_TO_CONFIG["m2-encoder-0.4b"]
ROWS = 3


def _trained(config: M2EncoderConfig, device: str) -> M2Encoder:
    with torch.device(device):
        model = M2Encoder(config)
    model.freeze_parts(OPTIONAL_PARTS)
    return model.train()


def _inputs(config: M2EncoderConfig, device: str) -> tuple[Tensor, Tensor]:
    images = torch.zeros(ROWS, 3, config.image_size, config.image_size, dtype=torch.uint8, device=device)
    return images, torch.zeros(ROWS, config.context_length, dtype=torch.long, device=device)


def _image_path(model: M2Encoder, images: Tensor) -> Tensor:
    tokens = model.image_embed(images)
    hidden = model.backbone(tokens, num_image_tokens=tokens.shape[1])
    hidden = model.vl_encoder(hidden, num_image_tokens=tokens.shape[1], first_token_only=True)
    return model.vl_image_proj(hidden[:, 0])


def _text_path(model: M2Encoder, ids: Tensor) -> Tensor:
    """What encode_text does without padding; it looks at values, which fake tensors do not have."""
    hidden = model.backbone(model.text_embed(ids), num_image_tokens=0)
    hidden = model.vl_encoder(hidden, num_image_tokens=ids.shape[1], first_token_only=True)
    return model.vl_text_proj(hidden[:, 0])


@contextmanager
def _saved_bytes(model: M2Encoder) -> Iterator[Callable[[], int]]:
    """Counts the storages that autograd keeps, parameters and their 16-bit copies left out."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    shapes = {tuple(parameter.shape) for parameter in model.parameters()}
    shapes |= {shape[::-1] for shape in shapes}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)
        if storage._cdata not in weights and tuple(tensor.shape) not in shapes:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield lambda: sum(kept.values())


@pytest.mark.parametrize("name", NAME_TO_CONFIG)
def test_parameters_are_those_of_the_model(name: str) -> None:
    cost = estimate_cost(NAME_TO_CONFIG[name])
    config = NAME_TO_CONFIG[name]
    width = config.embed_dim
    # by hand: four matrices and a feed-forward network with biases, four norms, twice
    expert = 4 * width * (width + 1) + 2 * width * 4 * width + 5 * width + 2 * (3 * width + 4 * width)
    assert cost.layer_parameters == 2 * expert
    assert cost.parameters == cost.num_layers * cost.layer_parameters + cost.root_parameters
    assert 0.85 * cost.parameters < cost.trainable_parameters < cost.parameters


def test_the_published_sizes() -> None:
    costs = {name: estimate_cost(config) for name, config in NAME_TO_CONFIG.items()}
    assert costs["m2-encoder-0.4b"].parameters == pytest.approx(263e6, rel=0.002)
    assert costs["m2-encoder-1b"].parameters == pytest.approx(730e6, rel=0.002)
    assert costs["m2-encoder-10b"].parameters == pytest.approx(10.18e9, rel=0.002)


@pytest.mark.parametrize(("config", "device"), [(TINY, "cpu"), (BASE, "meta")], ids=["tiny", "0.4b"])
def test_operations_are_those_torch_counts(config: M2EncoderConfig, device: str) -> None:
    model = _trained(config, device)
    images, ids = _inputs(config, device)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        features = torch.cat([model.encode_image(images), model.encode_text(ids)])
    with FlopCounterMode(display=False) as backward:
        features.sum().backward()
    cost = estimate_cost(config)
    assert ROWS * cost.forward_flops == pytest.approx(forward.get_total_flops(), rel=0.01)
    assert ROWS * cost.backward_flops == pytest.approx(backward.get_total_flops(), rel=0.01)


def test_activations_are_those_autograd_keeps() -> None:
    model = _trained(TINY, "cpu")
    images, ids = _inputs(TINY, "cpu")
    with _saved_bytes(model) as count:
        features = model.encode_image(images), model.encode_text(ids)
    assert ROWS * estimate_cost(TINY, precision="32-true").activation_bytes == pytest.approx(count(), rel=0.01)
    assert features[0].shape == features[1].shape


def test_activations_in_mixed_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without data, which say what an accelerator would keep: autocast as on CUDA, flash attention."""

    def flash(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        query, key, value = (part.to(torch.bfloat16) for part in (query, key, value))
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    monkeypatch.setattr(functional, "scaled_dot_product_attention", flash)
    with FakeTensorMode():
        model = _trained(BASE, "cuda")
        images, ids = _inputs(BASE, "cuda")
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)  # the context manager wants a real device
        try:
            with _saved_bytes(model) as count:
                features = _image_path(model, images), _text_path(model, ids)
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()
        kept = count()
    assert features[0].dtype == torch.bfloat16
    assert ROWS * estimate_cost(BASE).activation_bytes == pytest.approx(kept, rel=0.02)


ADAPTATIONS: dict[str, Adaptation] = {
    "lora": Lora(rank=4),
    "lora of attention": Lora(rank=2, modules=["q_proj", "v_proj"], experts=["text_expert"]),
    "lora from the middle": Lora(rank=4, first_layer=2),
    "lora and norms": Lora(rank=4, also=["projections", "norms"]),
    "image tower": Locked(towers=["image"]),
    "first layers": Locked(layers=2, embeddings=["image", "text"]),
    "last": Last(),
    "mixture": Upcycling(),
    "mixture for texts": Upcycling(copies=3, vision_layers=0, text_layers=2, whole=True),
}


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_adaptations_cost_what_torch_counts(name: str) -> None:
    """In the lowest layer, backward ends a little earlier than the formulas say."""
    adapt = ADAPTATIONS[name].apply
    model = _trained(TINY, "cpu")
    adapt(model)
    model.freeze_parts(OPTIONAL_PARTS)
    images, ids = _inputs(TINY, "cpu")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        features = torch.cat([model.encode_image(images), model.encode_text(ids)])
    with FlopCounterMode(display=False) as backward:
        features.sum().backward()
    with _saved_bytes(model) as count:
        features = torch.cat([model.encode_image(images), model.encode_text(ids)])
    cost, full = (estimate_cost(TINY, precision="32-true", adapt=each) for each in (adapt, None))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert cost.trainable_parameters == trained
    assert cost.trainable_layer_parameters <= cost.trainable_parameters - cost.trainable_root_parameters
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert ROWS * cost.forward_flops == pytest.approx(forward.get_total_flops(), rel=0.01)
    assert ROWS * cost.backward_flops == pytest.approx(backward.get_total_flops(), rel=0.03)
    assert ROWS * cost.activation_bytes == pytest.approx(count(), rel=0.04, abs=1e4)
    if "mixture" not in name:
        assert cost.backward_flops < full.backward_flops
        assert cost.activation_bytes < 1.02 * full.activation_bytes


def test_short_texts_cost_less() -> None:
    whole, short = estimate_cost(BASE), estimate_cost(BASE, text_tokens=12)
    assert short.parameters == whole.parameters
    for field in ("forward_flops", "backward_flops", "activation_bytes", "layer_input_bytes"):
        assert getattr(short, field) < getattr(whole, field)


def test_a_second_head_trains_the_backbone_features() -> None:
    one, two = estimate_cost(BASE), estimate_cost(BASE, heads=2)
    assert two.trainable_parameters - one.trainable_parameters == 2 * BASE.embed_dim * BASE.feature_dim + 1
    assert two.forward_flops - one.forward_flops == 2 * 2 * BASE.embed_dim * BASE.feature_dim


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"precision": "8-bit"}, "precision=8-bit must be one of bf16-mixed"),
        ({"text_tokens": 127}, "text_tokens=127 must be in 2..126"),
        ({"heads": 3}, "heads=3 must be 1 or 2"),
    ],
)
def test_wrong_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        estimate_cost(TINY, **values)


def test_costs_are_plain_numbers() -> None:
    cost = estimate_cost(TINY)
    assert isinstance(cost, ModelCost)
    assert all(isinstance(value, int | str) for value in vars(cost).values())
