from __future__ import annotations

import numpy as np
import pytest
import torch

from m2_encoder.checkpoints.mixing import mix_models
from m2_encoder.errors import UserError
from tests.support.models import random_model, small_config


def test_weights_are_the_weighted_mean() -> None:
    models = [random_model(small_config()) for _ in range(3)]
    shares = [0.2, 0.5, 0.3]
    mixed = mix_models(iter(models), shares)
    for name, value in mixed.state_dict().items():
        parts = [share * model.state_dict()[name].double().numpy() for share, model in zip(shares, models, strict=True)]
        np.testing.assert_allclose(value.numpy(), np.sum(parts, axis=0), rtol=1e-6, atol=1e-7)
    assert not mixed.training
    assert not any(parameter.requires_grad for parameter in mixed.parameters())


@pytest.mark.parametrize("chosen", [0, 1])
def test_a_whole_share_is_that_model_to_the_bit(chosen: int) -> None:
    models = [random_model(small_config()) for _ in range(2)]
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    mixed = mix_models(models, [1.0 - chosen, float(chosen)])
    for name, value in mixed.state_dict().items():
        assert torch.equal(value, before[chosen][name]), name
    for model, own in zip(models, before, strict=True):
        assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items()), (
            "models stay as they are"
        )


def test_names_and_temperatures_of_a_start_may_differ() -> None:
    models = [random_model(small_config(name=name, initial_temperature=t)) for name, t in (("a", 0.07), ("b", 0.25))]
    mix_models(models, [0.5, 0.5])


def test_other_architectures_and_wrong_shares_are_refused() -> None:
    models = [random_model(small_config()), random_model(small_config(num_layers=3))]
    with pytest.raises(UserError, match="cannot be mixed: num_layers is 2 and 3"):
        mix_models(models, [0.5, 0.5])
    for shares in ([0.5, 0.6], [-0.5, 1.5], [float("nan"), 1.0], []):
        with pytest.raises(UserError, match="with the sum 1") as caught:
            mix_models(models, shares)
        assert caught.value.key == "shares"
