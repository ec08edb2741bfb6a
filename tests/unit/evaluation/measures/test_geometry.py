"""Geometry against its formulas, written as the papers write them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from m2_encoder.errors import UserError
from m2_encoder.evaluation.measures.geometry import measure_alignment, measure_gap, measure_uniformity


def test_formulas() -> None:
    images, texts = torch.randn(60, 24), torch.randn(90, 24) + 0.5
    rows = torch.arange(90)
    pairs = torch.stack([rows, rows % 60], dim=1)
    x, y = normalize(images, dim=1), normalize(texts, dim=1)
    aligned = measure_alignment(texts, images, pairs)
    assert aligned.value == pytest.approx(float((y - x[rows % 60]).norm(dim=1).pow(2).mean()), rel=1e-5)
    assert (aligned.low or 0) < aligned.value < (aligned.high or 0)
    assert measure_uniformity(images).value == pytest.approx(
        float(torch.pdist(x).pow(2).mul(-2).exp().mean().log()), rel=1e-5
    )
    assert measure_gap(images, texts).value == pytest.approx(float((x.mean(0) - y.mean(0)).norm()), rel=1e-5)
    assert measure_gap(images, texts, metric="zh_en_gap").metric == "zh_en_gap"


def test_uniformity_over_several_chunks() -> None:
    features = torch.randn(2100, 4)
    expected = torch.pdist(normalize(features.double(), dim=1)).pow(2).mul(-2).exp().mean().log()
    assert measure_uniformity(features).value == pytest.approx(float(expected), rel=1e-9)


def test_perfect_collapsed_and_shuffled() -> None:
    features, rows = torch.randn(400, 64), torch.arange(400)
    pairs = torch.stack([rows, rows], dim=1)
    assert measure_alignment(features, 3 * features, pairs).value == pytest.approx(0.0, abs=1e-12)
    shuffled = torch.stack([rows, torch.randperm(400)], dim=1)
    assert measure_alignment(features, features, shuffled).value == pytest.approx(2.0, abs=0.1)
    assert measure_uniformity(features).value == pytest.approx(-4 + 8 / 64, abs=0.1)  # almost orthogonal pairs
    one = features[:1].expand(400, -1)
    assert measure_uniformity(one).value == pytest.approx(0.0, abs=1e-9)
    assert measure_gap(features, features).value == pytest.approx(0.0, abs=1e-12)
    assert measure_gap(one, -one).value == pytest.approx(2.0)


def test_what_cannot_be_measured_is_named() -> None:
    features = torch.eye(4)
    broken = features.clone()
    broken[1] = math.inf
    with pytest.raises(UserError, match="1 of 4 second features are not finite"):
        measure_gap(features, broken)
    with pytest.raises(UserError, match="1 of 4 first features are not finite"):
        measure_alignment(broken, features, torch.tensor([[0, 0]]))
    with pytest.raises(UserError, match="1 of 4 item features are not finite"):
        measure_uniformity(broken)
    with pytest.raises(UserError, match="needs two items"):
        measure_uniformity(features[:1])
    with pytest.raises(UserError, match="a pair names second row 9"):
        measure_alignment(features, features, torch.tensor([[0, 9]]))
