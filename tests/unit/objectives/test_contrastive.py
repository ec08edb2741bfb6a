"""ITC against a plain implementation in loops, its gradients, its precision and its messages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m2_encoder.errors import UserError
from m2_encoder.objectives.base import FeaturePair, Objective, ObjectiveInputs
from m2_encoder.objectives.contrastive import (
    HEADS,
    ImageTextContrastive,
    contrastive_losses,
    image_text_contrastive,
)


def plain_row_losses(
    images: Tensor, texts: Tensor, logit_scale: Tensor, *, identity: list[int] | None = None, smoothing: float = 0.0
) -> Tensor:
    """The loss of each row, entry by entry: explicit softmax, explicit targets."""
    number = len(images)
    identity = list(range(number)) if identity is None else identity
    scale = torch.exp(logit_scale)
    losses = []
    for i in range(number):
        partners = [j for j in range(number) if identity[j] == identity[i]]
        loss = torch.zeros((), dtype=images.dtype)
        for queries, gallery in ((images, texts), (texts, images)):
            logits = [scale * sum(queries[i, e] * gallery[j, e] for e in range(images.shape[1])) for j in range(number)]
            total = sum(torch.exp(logit) for logit in logits)
            for j in range(number):
                share = (1 - smoothing) * (j in partners) / len(partners) + smoothing / number
                loss = loss - share * torch.log(torch.exp(logits[j]) / total) / 2
        losses.append(loss)
    return torch.stack(losses)


def row_losses(*features: Tensor, **options: Any) -> Tensor:
    """The loss of each text, without a graph."""
    return contrastive_losses(*features, **options).per_sample[:, 0]


def features(number: int, width: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random unit rows."""
    rows = torch.randn(number, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (rows / rows.norm(dim=1, keepdim=True)).to(dtype)


CASES = pytest.mark.parametrize(
    ("identity", "smoothing"),
    [
        (None, 0.0),
        ([5, 9, 5, 5, 7, 9, -3], 0.0),
        (None, 0.1),
        ([1, 1, 1, 2, 3, 4, 2], 0.25),
        ([8] * 7, 0.0),
    ],
    ids=["plain", "groups", "smoothed", "smoothed-groups", "all-equal"],
)


@CASES
def test_loss_and_gradients_equal_the_plain_implementation(identity: list[int] | None, smoothing: float) -> None:
    images, texts = features(7, 5, seed=1), features(7, 5, seed=2)
    scale = torch.tensor(2.3, dtype=torch.float64)
    ours = [x.clone().requires_grad_() for x in (images, texts, scale)]
    plain = [x.clone().requires_grad_() for x in (images, texts, scale)]

    group_ids = None if identity is None else torch.tensor(identity)
    loss = image_text_contrastive(*ours, identity=group_ids, label_smoothing=smoothing)
    expected = plain_row_losses(*plain, identity=identity, smoothing=smoothing).mean()
    loss.backward()
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    for name, mine, theirs in zip(("image", "text", "logit_scale"), ours, plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@CASES
def test_row_losses_are_those_of_each_row(identity: list[int] | None, smoothing: float) -> None:
    images, texts, scale = features(7, 3, seed=3), features(7, 3, seed=4), torch.tensor(1.1, dtype=torch.float64)
    group_ids = None if identity is None else torch.tensor(identity)
    rows = row_losses(images, texts, scale, identity=group_ids, label_smoothing=smoothing)
    expected = plain_row_losses(images, texts, scale, identity=identity, smoothing=smoothing)
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-12)


def test_known_values() -> None:
    number = 6
    collapsed = torch.ones(number, 4) / 2
    assert image_text_contrastive(collapsed, collapsed, torch.tensor(3.0)).item() == pytest.approx(math.log(number))
    perfect = torch.eye(number)
    assert image_text_contrastive(perfect, perfect, torch.tensor(math.log(100.0))).item() == pytest.approx(0, abs=1e-4)
    single = features(1, 4, dtype=torch.float32)
    assert image_text_contrastive(single, -single, torch.tensor(1.0)).item() == pytest.approx(0, abs=1e-5)


@settings(max_examples=40)
@given(
    identity=st.lists(st.integers(0, 3), min_size=2, max_size=8),
    scale=st.floats(-1, 4.6),
    seed=st.integers(0, 2**16),
    smoothing=st.sampled_from([0.0, 0.2]),
)
def test_order_of_rows_and_exchange_of_sides_change_nothing(
    identity: list[int], scale: float, seed: int, smoothing: float
) -> None:
    number = len(identity)
    images, texts, ids = features(number, 6, seed=seed), features(number, 6, seed=seed + 1), torch.tensor(identity)
    log_scale = torch.tensor(scale, dtype=torch.float64)
    rows = row_losses(images, texts, log_scale, identity=ids, label_smoothing=smoothing)

    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
    moved = row_losses(images[order], texts[order], log_scale, identity=ids[order] * 7 - 2, label_smoothing=smoothing)
    swapped = row_losses(texts, images, log_scale, identity=ids, label_smoothing=smoothing)
    torch.testing.assert_close(moved, rows[order], rtol=0, atol=1e-12)
    torch.testing.assert_close(swapped, rows, rtol=0, atol=1e-12)
    assert (rows >= -1e-12).all()


@settings(max_examples=25)
@given(number=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_distinct_identities_are_no_identities(number: int, seed: int) -> None:
    images, texts = features(number, 4, seed=seed), features(number, 4, seed=seed + 1)
    scale, ids = torch.tensor(3.0, dtype=torch.float64), torch.arange(number) * 3 + 1
    torch.testing.assert_close(
        row_losses(images, texts, scale, identity=ids),
        row_losses(images, texts, scale),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_the_loss_is_computed_in_fp32_whatever_the_input(dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    images, texts = features(64, 32, seed=5).to(dtype), features(64, 32, seed=6).to(dtype)
    # Little signal, so that the losses are far from 0; scale 100, where half precision would be off by tenths.
    texts = (0.1 * images.double() + texts.double()).to(dtype)
    scale = torch.tensor(math.log(100.0)).to(dtype)
    exact = row_losses(images.double(), texts.double(), scale.double())

    images.requires_grad_()
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        loss, rows = contrastive_losses(images, texts, scale)
    rows = rows[:, 0]
    assert rows.dtype == torch.float32
    assert exact.mean() > 5
    torch.testing.assert_close(rows.double(), exact, rtol=1e-5, atol=1e-4)
    loss.mean().backward()
    assert images.grad is not None
    assert images.grad.dtype == dtype
    assert images.grad.isfinite().all()


def test_fp64_features_keep_fp64_with_shared_identities() -> None:
    loss = image_text_contrastive(
        features(3, 2), features(3, 2, seed=1), torch.tensor(1.0), identity=torch.tensor([4, 4, 4])
    )
    assert loss.dtype == torch.float64


def test_mixed_precisions_of_the_two_sides_meet_in_the_wider_one() -> None:
    images, texts = features(4, 3), features(4, 3, seed=1)
    scale = torch.tensor(1.0, dtype=torch.float64)
    exact = row_losses(images.float().double(), texts, scale)
    torch.testing.assert_close(row_losses(images.float(), texts, scale), exact, rtol=0, atol=1e-12)
    assert row_losses(images.bfloat16(), texts.float(), scale).dtype == torch.float32


@pytest.mark.parametrize(
    ("images", "texts", "identity", "smoothing", "message"),
    [
        ((3, 4), (2, 4), None, 0.0, r"image_features \(3, 4\) and text_features \(2, 4\)"),
        ((3, 4), (3, 5), None, 0.0, r"must be \(B, E\)"),
        ((12,), (12,), None, 0.0, r"\(12,\)"),
        ((3, 4), (3, 4), (2,), 0.0, r"identity is torch.int64 \(2,\), expected torch.int64 \(3,\)"),
        ((0, 4), (0, 4), None, 0.0, "no rows"),
        ((3, 4), (3, 4), None, 1.0, r"label_smoothing=1.0 must be in \[0, 1\)"),
        ((3, 4), (3, 4), None, -0.1, r"label_smoothing=-0.1"),
    ],
)
def test_what_does_not_fit_is_named(
    images: tuple[int, ...], texts: tuple[int, ...], identity: tuple[int, ...] | None, smoothing: float, message: str
) -> None:
    ids = None if identity is None else torch.zeros(identity, dtype=torch.int64)
    with pytest.raises(UserError, match=message):
        image_text_contrastive(
            torch.zeros(images), torch.zeros(texts), torch.tensor(0.0), identity=ids, label_smoothing=smoothing
        )


class TestObjective:
    def inputs(self, identity: list[int]) -> ObjectiveInputs:
        number = len(identity)
        return ObjectiveInputs(
            {
                name: FeaturePair(
                    features(number, 4, seed=seed).requires_grad_(),
                    features(number, 4, seed=seed + 1).requires_grad_(),
                    torch.tensor(2.0, dtype=torch.float64, requires_grad=True),
                )
                for seed, name in enumerate(HEADS)
            },
            torch.tensor(identity),
            None,
        )

    @pytest.mark.parametrize("multi_positive", [True, False])
    def test_identities_count_only_when_they_are_wanted(self, multi_positive: bool) -> None:
        inputs = self.inputs([1, 2, 1, 3])
        output = ImageTextContrastive(multi_positive=multi_positive, label_smoothing=0.1)(inputs)
        expected = plain_row_losses(
            inputs.image_features,
            inputs.text_features,
            inputs.logit_scale,
            identity=[1, 2, 1, 3] if multi_positive else None,
            smoothing=0.1,
        )
        torch.testing.assert_close(output.per_sample, expected.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(output.loss, expected.mean(), rtol=0, atol=1e-12)

    def test_rows_for_the_log_carry_no_graph(self) -> None:
        output = ImageTextContrastive()(self.inputs([1, 2]))
        assert output.loss.requires_grad
        assert not output.per_sample.requires_grad

    @pytest.mark.parametrize("value", [1.0, -0.1, float("nan")])
    def test_smoothing_out_of_range_is_named(self, value: float) -> None:
        with pytest.raises(UserError, match="label_smoothing="):
            ImageTextContrastive(label_smoothing=value)

    @pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
    def test_a_weight_that_is_no_share_is_named(self, value: float) -> None:
        with pytest.raises(UserError, match="weight="):
            ImageTextContrastive(weight=value)

    @pytest.mark.parametrize("heads", [(), ("features", "features"), ("backbone_features",), ("features", "pooler")])
    def test_heads_that_would_leave_parts_untrained_are_named(self, heads: tuple[Any, ...]) -> None:
        """Without `features` all that follows the backbone, and the model that is exported, would get no gradient."""
        with pytest.raises(UserError, match=r"heads=.*: must be \[features\] or \[features, backbone_features\]"):
            ImageTextContrastive(heads=heads)

    def test_itc_trains_no_optional_part(self) -> None:
        assert issubclass(ImageTextContrastive, Objective)
        assert not ImageTextContrastive().optional_parts


@pytest.mark.parametrize("identity", [None, [4, 4, 1]])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_several_captions_per_image_equal_the_plain_implementation(
    identity: list[int] | None, smoothing: float
) -> None:
    images, texts, scale = features(3, 4, seed=1), features(6, 4, seed=2), torch.tensor(1.7, dtype=torch.float64)
    ids = identity or [0, 1, 2]
    image_rows = []
    for i in range(3):
        partners = [j for j in range(6) if ids[j // 2] == ids[i]]
        log_probabilities = (scale.exp() * images[i] @ texts.t()).log_softmax(0)
        shares = torch.full((6,), smoothing / 6, dtype=torch.float64)
        shares[partners] += (1 - smoothing) / len(partners)
        image_rows.append(-(shares * log_probabilities).sum())
    text_rows = []
    for j in range(6):
        partners = [i for i in range(3) if ids[i] == ids[j // 2]]
        log_probabilities = (scale.exp() * texts[j] @ images.t()).log_softmax(0)
        shares = torch.full((3,), smoothing / 3, dtype=torch.float64)
        shares[partners] += (1 - smoothing) / len(partners)
        text_rows.append(-(shares * log_probabilities).sum())
    options = {
        "identity": None if identity is None else torch.tensor(identity),
        "captions_per_image": 2,
        "label_smoothing": smoothing,
    }
    rows = row_losses(images, texts, scale, **options)
    expected = torch.stack([(image_rows[j // 2] + text_rows[j]) / 2 for j in range(6)])
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-12)
    loss = image_text_contrastive(images, texts, scale, **options)
    torch.testing.assert_close(loss, (torch.stack(image_rows).mean() + torch.stack(text_rows).mean()) / 2)


def test_the_number_of_captions_must_be_said() -> None:
    with pytest.raises(UserError, match="captions_per_image = 1"):
        image_text_contrastive(features(2, 4), features(4, 4), torch.tensor(1.0))
