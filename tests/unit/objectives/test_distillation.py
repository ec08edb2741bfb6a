"""Distillation against its formula on whole matrices, in fp64; and what the teacher must not be part of."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from m2_encoder.data.samples.caption_ids import CaptionIds
from m2_encoder.errors import UserError
from m2_encoder.objectives import alignment
from m2_encoder.objectives.base import ObjectiveInputs
from m2_encoder.objectives.distillation import Distillation
from tests.support.models import random_model, small_config
from tests.support.objectives import CONFIG, build_bench, draw_inputs, leaves, make_batch
from tests.support.training import make_tokenizer

WIDTH = 6


def make_teacher(*, feature_dim: int = WIDTH, image_size: int = CONFIG.image_size) -> Any:
    torch.manual_seed(8)
    config = small_config(num_layers=1, num_vl_layers=1, feature_dim=feature_dim, image_size=image_size)
    return random_model(config, dtype=torch.float64).train()


def make_objective(teacher: Any, **options: Any) -> Distillation:
    objective = Distillation(teacher="exported", **options)
    objective.teach_with(teacher)
    torch.manual_seed(4)
    objective.build(small_config(feature_dim=WIDTH))
    return objective.double()


def plain_loss(
    inputs: ObjectiveInputs, teacher: Any, *, features: float, similarity: float, scale: float, matrix: Tensor | None
) -> Tensor:
    images, texts = inputs.image_features, inputs.text_features
    assert inputs.batch is not None
    with torch.no_grad():
        seen, read = teacher.encode_image(inputs.batch.images), teacher.encode_text(inputs.batch.text)
    x, y = (images, texts) if matrix is None else (images @ matrix.t(), texts @ matrix.t())
    total = torch.zeros((), dtype=torch.float64)
    for own, target in ((x, seen), (y, read)):
        cosines = [(a @ b) / (a.norm() * b.norm()) for a, b in zip(own, target, strict=True)]
        total = total + features * torch.stack([1 - c for c in cosines]).mean() / 2
    logits, targets = inputs.logit_scale.exp() * images @ texts.t(), scale * seen @ read.t()
    for ours, theirs in ((logits, targets), (logits.t(), targets.t())):
        divergence = functional.kl_div(ours.log_softmax(1), theirs.softmax(1), reduction="batchmean")
        total = total + similarity * divergence / 2
    return total


@pytest.mark.parametrize("captions", [1, 2])
@pytest.mark.parametrize(
    ("width", "features", "similarity", "temperature"),
    [(WIDTH, 0.7, 0.4, None), (9, 1.0, 0.0, None), (9, 0.5, 2.0, 0.2)],
)
def test_losses_and_gradients(
    captions: int,
    width: int,
    features: float,
    similarity: float,
    temperature: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(alignment, "_TILE_BYTES", 4 * 8 * 7)
    teacher = make_teacher(feature_dim=width)
    objective = make_objective(
        teacher, feature_weight=features, similarity_weight=similarity, temperature=temperature, chunk_size=3
    )
    assert (objective.projection is None) == (width == WIDTH)
    inputs = draw_inputs(7, captions)
    output = objective(inputs)
    scale = math.exp(2.0) if temperature is None else 1 / temperature
    matrix = None if objective.projection is None else objective.projection.weight
    expected = plain_loss(inputs, teacher, features=features, similarity=similarity, scale=scale, matrix=matrix)
    torch.testing.assert_close(output.loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(output.per_sample.mean(), expected.detach(), rtol=1e-10, atol=0)
    wanted = [*leaves(inputs)[: 3 if similarity else 2], *objective.parameters()]
    ours = torch.autograd.grad(output.loss, wanted)
    for own, theirs in zip(ours, torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-8, atol=1e-13)
        assert own.abs().max() > 1e-4


def test_a_student_that_knows_it_all_loses_nothing() -> None:
    teacher = make_teacher()
    inputs = draw_inputs(5, 2)
    assert inputs.batch is not None
    pair = inputs.heads["features"]._replace(
        image_features=teacher.encode_image(inputs.batch.images),
        text_features=teacher.encode_text(inputs.batch.text),
        logit_scale=teacher.logit_scale,
    )
    assert abs(make_objective(teacher)(inputs._replace(heads={"features": pair})).loss.item()) < 1e-12


def test_the_teacher_is_no_part_of_the_module() -> None:
    teacher = make_teacher()
    objective = Distillation(teacher="exported")
    objective.teach_with(teacher)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    module = build_bench({"distillation": objective})
    assert not any(parameter is own for parameter in teacher.parameters() for own in module.parameters())
    assert set(module.state_dict()) - {f"model.{name}" for name in module.model.state_dict()} == {
        "objectives.distillation.projection.weight"
    }
    module.train()
    assert not teacher.training
    module.evaluate(make_batch(4, 1))["distillation"].loss.backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_teacher_of_one_language_and_another_size() -> None:
    inputs = draw_inputs(4, 2)  # captions alternate: en, zh
    assert inputs.batch is not None
    objective = make_objective(make_teacher(), teacher_language="en", similarity_weight=0.0)
    english = inputs.batch.text.ids[::2].repeat_interleave(2, dim=0)
    mask = inputs.batch.text.mask[::2].repeat_interleave(2, dim=0)
    read = inputs.batch._replace(text=inputs.batch.text._replace(ids=english, mask=mask))
    plain = make_objective(make_teacher(), similarity_weight=0.0)(inputs._replace(batch=read))
    torch.testing.assert_close(objective(inputs).loss, plain.loss, rtol=1e-12, atol=0)
    with pytest.raises(UserError, match="teacher_language=zh: 4 of 4 images have no caption in it"):
        make_objective(make_teacher(), teacher_language="zh")(
            inputs._replace(batch=inputs.batch._replace(language=torch.zeros(8, dtype=torch.int64)))
        )
    larger = make_objective(make_teacher(image_size=24))
    assert larger(inputs).loss.isfinite()
    pixels = inputs.batch._replace(images=(inputs.batch.images * 255).round().to(torch.uint8))
    torch.testing.assert_close(larger(inputs._replace(batch=pixels)).loss, larger(inputs).loss, rtol=1e-2, atol=0)


def test_a_teacher_with_a_tokenizer_of_its_own() -> None:
    """It reads the ids that its tokenizer made of the captions, in any piece of the batch."""
    inputs = draw_inputs(6, 2)
    assert inputs.batch is not None
    tokenizer = make_tokenizer()
    texts = [f"a red apple {'in a tree ' * (number % 3)}" for number in range(12)]
    teacher = random_model(small_config(feature_dim=WIDTH, vocab_size=tokenizer.vocab_size), dtype=torch.float64)
    objective = Distillation(teacher="exported")
    objective.teach_with(teacher, tokenizer)
    ((name, reader),) = objective.readers.items()
    assert reader is tokenizer
    with pytest.raises(UserError, match=f"lacks its ids, extra\\['{name}'\\]"):
        objective(inputs)
    read = inputs.batch._replace(extra={name: CaptionIds(tokenizer).collate(texts)})
    plain = make_objective(teacher)
    for rows in (slice(0, 6), slice(2, 4)):
        part = read.rows(rows)
        pair = inputs.heads["features"]
        features = pair._replace(
            image_features=pair.image_features[rows], text_features=pair.text_features[2 * rows.start : 2 * rows.stop]
        )
        given = inputs._replace(heads={"features": features}, identity=inputs.identity[rows])
        own = given._replace(batch=part._replace(text=tokenizer(texts[2 * rows.start : 2 * rows.stop])))
        torch.testing.assert_close(objective(given._replace(batch=part)).loss, plain(own).loss, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"feature_weight": 0.0, "similarity_weight": 0.0},
            "feature_weight=0.0: must be above 0",
        ),
        ({"feature_weight": -1.0}, "feature_weight=-1.0"),
        ({"temperature": 0.0}, "temperature=0.0: must be a number, 0.0001 or more, or null"),
        ({"teacher_language": "fr"}, "teacher_language=fr: must be one of en, zh, or null"),
        ({"chunk_size": 0}, "chunk_size=0"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Distillation(teacher="x", **options)


def test_without_a_teacher_or_a_batch() -> None:
    with pytest.raises(UserError, match=r"load 'outputs/x' and call teach_with\(model\)"):
        Distillation(teacher="outputs/x").build(CONFIG)
    with pytest.raises(UserError, match="needs the batch"):
        make_objective(make_teacher())(draw_inputs(3, 1)._replace(batch=None))
