"""A plan counts what prompts and adapters train, and passes backward what lies above them."""

from __future__ import annotations

from m2_encoder import M2EncoderConfig
from m2_encoder.planning.cost import estimate_cost
from m2_encoder.training.adaptations.adapters import PerLanguage
from m2_encoder.training.adaptations.prompts import DeepPrompts


def test_trained_parameters_and_activations() -> None:
    config = M2EncoderConfig.from_name("tiny")
    full = estimate_cost(config)
    prompts = estimate_cost(config, adapt=DeepPrompts(num_prompts=4).apply)
    adapters = estimate_cost(config, adapt=PerLanguage(width=8).apply)
    assert prompts.trainable_parameters == 1 + 3 * (4 * 128 + 128 * 128 + 128)
    assert adapters.trainable_parameters == 1 + 3 * 2 * (2 * 8 * 128 + 8 + 128)
    assert 0 < adapters.activation_bytes < prompts.activation_bytes < full.activation_bytes, "pictures keep nothing"
    assert adapters.backward_flops < prompts.backward_flops < full.backward_flops
