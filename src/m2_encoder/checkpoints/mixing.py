"""Weights that lie between models: WiSE-FT's line from a start to what was trained from it, and model soups.

Parameters are mixed, not outputs, so that the result costs what one model costs. It makes sense for models that were
trained from the same start: others lie in different valleys of the loss.

Reference: WiSE-FT (arXiv:2109.01903); model soups (arXiv:2203.05482).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Sequence

import torch

from m2_encoder.errors import UserError
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.models.m2_encoder import M2Encoder


@torch.no_grad()
def mix_models(models: Iterable[M2Encoder], shares: Sequence[float]) -> M2Encoder:
    """The model with the weighted mean of the parameters of others, in evaluation mode.

    Args:
        models: of one architecture, in fp32; one is held at a time beside the result, so that a generator may load
            them one after the other. They are left as they are.
        shares: one for each, at least 0, with the sum 1. A share of 1 gives that model to the bit.

    Raises:
        UserError: for shares that are none, and for models of different architectures.
    """
    check_shares(shares)
    total: M2Encoder | None = None
    for model, share in zip(models, shares, strict=True):
        if total is None:
            total = copy.deepcopy(model).requires_grad_(False).eval()
            for value in total.state_dict().values():
                value.mul_(share)
            continue
        if difference := _differ(total.config, model.config):
            raise UserError(f"models of different architectures cannot be mixed: {difference}")
        for own, other in zip(total.state_dict().values(), model.state_dict().values(), strict=True):
            own.add_(other, alpha=share)
    assert total is not None
    return total


def check_shares(shares: Sequence[float]) -> None:
    """Refuse what is no weighted mean.

    Raises:
        UserError: with the key `shares`.
    """
    wrong = not shares or not all(math.isfinite(share) and share >= 0 for share in shares)
    if wrong or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        rule = "must be at least 0 each, with the sum 1"
        raise UserError(f"{rule}; for example [0.5, 0.5]", key="shares", value=list(shares))


def _differ(first: M2EncoderConfig, second: M2EncoderConfig) -> str:
    """The first field in which two architectures differ, but for names and values of a start; "" if none does."""
    free = {"name", "position_init_std", "initial_temperature", "drop_path_rate"}
    for field in dataclasses.fields(first):
        one, other = getattr(first, field.name), getattr(second, field.name)
        if field.name not in free and one != other:
            return f"{field.name} is {one} and {other}"
    return ""
