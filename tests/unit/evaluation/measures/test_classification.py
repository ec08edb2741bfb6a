"""Classification against torchmetrics and the definitions of CLIP_benchmark and open_clip, where nothing ties."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics.functional.classification import multiclass_accuracy

from m2_encoder.errors import UserError
from m2_encoder.evaluation.measures.classification import (
    Classification,
    chance_precision,
    class_vectors,
    measure_classification,
    measure_multilabel,
)

CLASSES = 12


def make_set(*, noise: float = 2.0, pictures: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures near the vectors of their classes; some classes are frequent, and one has no picture."""
    vectors = normalize(torch.randn(CLASSES, 32), dim=1)
    targets = (torch.rand(pictures) ** 2 * (CLASSES - 1)).long()
    return normalize(vectors[targets] + noise / 6 * torch.randn(pictures, 32), dim=1), vectors, targets


def value(found: Classification, metric: str) -> float:
    return next(each.value for each in found.measurements if each.metric == metric)


def test_class_vectors_are_made_as_open_clip_makes_them() -> None:
    prompts = torch.randn(5, 7, 16)
    expected = []
    for features in prompts:
        mean = (features / features.norm(dim=-1, keepdim=True)).mean(dim=0)
        expected.append(mean / mean.norm())
    assert torch.allclose(class_vectors(prompts), torch.stack(expected), atol=1e-6)
    assert class_vectors(prompts).dtype == torch.float32


def test_accuracies_equal_those_of_torchmetrics() -> None:
    images, vectors, targets = make_set()
    found = measure_classification(images, vectors, targets)
    logits = images @ vectors.t()
    for k in (1, 5):
        expected = 100 * multiclass_accuracy(logits, targets, num_classes=CLASSES, average="micro", top_k=k)
        assert value(found, f"top{k}") == pytest.approx(float(expected), abs=1e-4)
    right = logits.argmax(dim=1) == targets
    recalls = [100 * float(right[targets == each].double().mean()) for each in targets.unique().tolist()]
    assert value(found, "mean_per_class") == pytest.approx(sum(recalls) / len(recalls))
    assert found.per_class.isnan().sum() == CLASSES - len(recalls)
    assert 30 < value(found, "top1") < 95
    for each in found.measurements:
        assert each.low is not None
        assert each.high is not None
        assert each.low < each.value < each.high


def test_perfect_collapsed_and_shuffled_models() -> None:
    images, vectors, targets = make_set(pictures=2000)
    perfect = measure_classification(vectors[targets], vectors, targets)
    assert [each.value for each in perfect.measurements] == [100.0] * 3
    collapsed = measure_classification(images[:1].expand(2000, -1), vectors[:1].expand(CLASSES, -1), targets)
    assert [each.value for each in collapsed.measurements] == [0.0] * 3
    assert collapsed.measurements[0].ties == 100.0
    for each in measure_classification(images, vectors, torch.randint(0, CLASSES, (2000,))).measurements:
        assert each.value == pytest.approx(each.chance, abs=3.5), each.metric


def test_two_classes_of_one_name_are_never_right() -> None:
    vectors = torch.eye(3)[[0, 1, 1, 2]]
    found = measure_classification(torch.eye(3), vectors, torch.tensor([0, 2, 3]))
    assert value(found, "top1") == pytest.approx(200 / 3)
    assert found.ranks.ties.tolist() == [0, 1, 0]
    assert [each.metric for each in found.measurements] == ["top1", "mean_per_class"]  # four classes: no top-5


def average_precision(scores: Tensor, right: Tensor) -> float:
    """CLIP_benchmark's definition: the mean over right items, in order of their scores, of the precision up to each."""
    right = right[scores.argsort(descending=True)].double()
    precision = right.cumsum(0) / torch.arange(1, len(right) + 1)
    return float(precision[right.bool()].mean())


def test_mean_average_precision() -> None:
    images, vectors, _ = make_set()
    targets = torch.rand(400, CLASSES) < 0.2
    targets[:, 3] = False  # no picture: left out
    targets |= (images @ vectors.t()) > 0.5
    targets[:, 3] = False
    scores = images.double() @ vectors.double().t()
    expected = [average_precision(scores[:, each], targets[:, each]) for each in range(CLASSES) if each != 3]
    found = measure_multilabel(3 * images, vectors, targets)
    assert found.value == pytest.approx(100 * sum(expected) / len(expected), abs=1e-4)
    assert (found.low or 0) < found.value < (found.high or 0) < found.value + 10
    one = measure_multilabel(images, vectors[:1], targets[:, :1])
    assert one.value == pytest.approx(100 * expected[0], abs=1e-4)
    perfect = measure_multilabel(torch.eye(4), torch.eye(4), torch.eye(4, dtype=torch.bool))
    assert perfect.value == 100.0
    collapsed = measure_multilabel(images[:1].expand(400, -1), vectors, targets)
    assert collapsed.value <= (collapsed.chance or 0)
    shuffled = measure_multilabel(images[torch.randperm(400)], vectors, targets)
    assert shuffled.value == pytest.approx(shuffled.chance, abs=2.5)


@pytest.mark.parametrize(("total", "right"), [(1, 1), (5, 1), (5, 3), (6, 6)])
def test_chance_precision_is_the_mean_over_all_orders(total: int, right: int) -> None:
    found = [
        sum(number / place for number, place in enumerate(places, start=1)) / right
        for places in itertools.combinations(range(1, total + 1), right)
    ]
    assert chance_precision(total, right) == pytest.approx(100 * sum(found) / len(found))


def test_what_cannot_be_measured_is_named() -> None:
    images, vectors, targets = make_set(pictures=6)
    broken = images.clone()
    broken[4, 0] = math.nan
    with pytest.raises(UserError, match="1 of 6 image features are not finite"):
        measure_classification(broken, vectors, targets)
    with pytest.raises(UserError, match="1 of 6 image features are not finite"):
        measure_multilabel(broken, vectors, torch.ones(6, CLASSES, dtype=torch.bool))
    with pytest.raises(UserError, match="picture 2 has class 12; there are 12 classes"):
        measure_classification(images, vectors, torch.tensor([0, 1, 12, 0, 0, 0]))
    with pytest.raises(UserError, match=r"must be \(6,\) whole numbers"):
        measure_classification(images, vectors, targets[:5])
    with pytest.raises(UserError, match=r"must be \(6, 12\) bool"):
        measure_multilabel(images, vectors, torch.ones(6, 3, dtype=torch.bool))
    with pytest.raises(UserError, match="class 1 cancel"):
        class_vectors(torch.tensor([[[1.0, 0], [0, 1]], [[1, 0], [-1, 0]]]))
    with pytest.raises(UserError, match="2 of 4 prompt features are not finite"):
        class_vectors(torch.tensor([[[1.0, 0], [0, 1]], [[math.inf, 0], [math.nan, 0]]]))
