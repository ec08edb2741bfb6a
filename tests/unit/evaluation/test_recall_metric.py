"""Recall over batches is recall in one call."""

from __future__ import annotations

import pytest
import torch

from m2_encoder.evaluation.metrics import retrieval_metrics
from m2_encoder.evaluation.recall_metric import RetrievalRecall


def test_metric_over_batches_equals_one_call() -> None:
    images, texts = torch.randn(30, 8), torch.randn(50, 8)
    image_ids, text_ids = torch.arange(30), torch.arange(50) % 30
    metric = RetrievalRecall()
    nothing, no_ids = torch.empty(0, 8), torch.empty(0, dtype=torch.long)
    metric.update(images[:10], image_ids[:10], texts[:50], text_ids[:50])
    metric.update(images[10:], image_ids[10:], nothing, no_ids)
    expected = retrieval_metrics(images, image_ids, texts, text_ids)
    computed = metric.compute()
    assert {name: float(value) for name, value in computed.items()} == pytest.approx(expected)
    metric.reset()
    metric.update(torch.eye(2), torch.arange(2), torch.eye(2), torch.arange(2))
    assert float(metric.compute()["mean_recall"]) == 100


def test_metric_says_what_is_missing() -> None:
    metric = RetrievalRecall()
    with pytest.raises(ValueError, match="text features"):
        metric.update(torch.eye(2), torch.arange(2), torch.eye(2), torch.arange(3))
    metric.update(torch.eye(2), torch.arange(2), torch.empty(0, 2), torch.empty(0, dtype=torch.long))
    with pytest.raises(ValueError, match="2 images and 0 texts"):
        metric.compute()
    metric.reset()
    metric.update(torch.eye(2), torch.arange(2), torch.eye(2), torch.arange(2) + 5)
    with pytest.raises(ValueError, match="shares an id"):
        metric.compute()
