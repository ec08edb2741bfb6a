"""An objective of a user's own may look at as little as it likes: no parameter is left for DDP to wait for."""

from __future__ import annotations

import torch

from m2_encoder.objectives.base import Objective, ObjectiveInputs, ObjectiveOutput
from m2_encoder.objectives.contrastive import ImageTextContrastive
from tests.support.objectives import build_bench, make_batch, take_numbers


class ShortTexts(Objective):
    """Looks at the texts' features alone, and at no temperature."""

    def forward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        losses = inputs.text_features[:, 0].square()
        return ObjectiveOutput(loss=losses.mean(), per_sample=losses.detach())


def test_every_trained_parameter_gets_a_gradient() -> None:
    module = build_bench({"short": ShortTexts()}, micro_batches=2, recompute=True)
    batch = make_batch(4, 2)
    output = module.evaluate(batch)["short"]
    output.loss.backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
    assert module.model.logit_scale.grad is not None
    assert module.model.logit_scale.grad.item() == 0
    expected = module.model.encode_text(batch.text)[:, 0].square().mean()
    torch.testing.assert_close(output.loss, expected)


def test_others_lose_nothing_by_it() -> None:
    batch = make_batch(4, 1)
    module = build_bench({"itc": ImageTextContrastive()})
    found = take_numbers(module, batch)
    images, texts = module.model.encode_image(batch.images), module.model.encode_text(batch.text)
    logits = module.model.logit_scale.exp() * images @ texts.t()
    same = (batch.identity[:, None] == batch.identity).double()
    targets = same / same.sum(dim=1, keepdim=True)
    loss = (
        torch.nn.functional.cross_entropy(logits, targets) + torch.nn.functional.cross_entropy(logits.t(), targets)
    ) / 2
    assert abs(float(found["loss/itc"]) - float(loss.detach())) < 1e-12
    (scale,) = torch.autograd.grad(loss, [module.model.logit_scale])
    assert abs(float(found["model.logit_scale"]) - float(scale)) < 1e-12
