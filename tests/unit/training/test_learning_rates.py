"""Learning rates by names, also of optimizers and checkpoints that have none."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from m2_encoder.training.optim import (
    OptimizerFactory,
    build_muon,
    build_optimizer,
    learning_rates,
    main_learning_rate,
)
from tests.support.training import make_module

MUON = partial(build_muon, lr=1e-3, matrix_lr=2e-2, logit_scale_lr_ratio=10.0)
ADAMW = partial(build_optimizer, lr=1e-3)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (MUON, {"matrices": 2e-2, "decayed": 1e-3, "plain": 1e-3, "scales": 1e-2}),
        (ADAMW, {"decayed": 1e-3, "plain": 1e-3, "scales": 1e-3}),
    ],
    ids=["muon", "adamw"],
)
def test_groups_have_names_that_an_older_state_does_not_take_away(
    build: OptimizerFactory, expected: dict[str, float]
) -> None:
    module = make_module()
    module.configure_model()
    optimizer = build(module)
    assert learning_rates(optimizer) == pytest.approx(expected)
    assert main_learning_rate(optimizer) == 1e-3
    older = copy.deepcopy(optimizer.state_dict())
    for part in (older, *(part for part in older.values() if isinstance(part, dict))):
        for group in part.get("param_groups", []):
            del group["name"]
    optimizer.load_state_dict(older)
    assert learning_rates(optimizer) == pytest.approx(expected)


def test_groups_without_names_are_numbered() -> None:
    first, second = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.5}, {"params": [second], "lr": 0.25}])
    assert learning_rates(optimizer) == {"group_0": 0.5, "group_1": 0.25}
    assert main_learning_rate(optimizer) == 0.5
