"""The projections to features alone, pulled towards where they started."""

from __future__ import annotations

from typing import Final

import torch
from torch import nn
from torch.optim import Optimizer

from m2_encoder.bounds import NotNegative, check_bounds
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.training.adaptation import Adaptation

PROJECTIONS: Final = ("image_proj", "text_proj", "vl_image_proj", "vl_text_proj")


class PulledLinear(nn.Linear):
    """A projection that remembers its start: as a parameter, so that checkpoints hold it and FSDP2 cuts it alike."""

    def __init__(self, base: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.start = nn.Parameter(base.weight.detach().clone(), requires_grad=False)


class Last(Adaptation):
    """Trains the projections to features, those that an objective reaches, and the temperatures; nothing else.

    Args:
        pull: how strongly each matrix W is drawn to its start S: after each step of the optimizer, of learning rate lr,
            W -= lr * pull * (W - S). It is apart from the gradient, as AdamW's weight decay is: the optimizer's moments
            do not see it. 0 leaves it out. Temperatures are not pulled.

    Reference: ProLIP (arXiv:2410.05270) penalises (W - S)², in the loss, of the visual projection.
    """

    @check_bounds
    def __init__(self, pull: NotNegative = 1.0) -> None:
        self._pull = pull

    def apply(self, model: M2Encoder) -> None:
        """Freeze everything but projections and temperatures."""
        model.requires_grad_(False)
        for scale in model.logit_scales():
            scale.requires_grad_(True)
        for name in PROJECTIONS:
            projection = getattr(model, name)
            projection.requires_grad_(True)
            if self._pull > 0:
                setattr(model, name, PulledLinear(projection))

    @torch.no_grad()
    def after_step(self, model: M2Encoder, optimizer: Optimizer) -> None:
        """Pull; elementwise, so that shards of weight and start need no others."""
        if self._pull == 0:
            return
        rates = {id(each): group["lr"] for group in optimizer.param_groups for each in group["params"]}
        for projection in (getattr(model, name) for name in PROJECTIONS):
            if projection.weight.grad is not None:
                rate = float(rates[id(projection.weight)])
                projection.weight.sub_((projection.weight - projection.start) * (rate * self._pull))

    def merge(self, model: M2Encoder) -> M2Encoder:
        """Forget the starts."""
        for name in PROJECTIONS:
            if isinstance(pulled := getattr(model, name), PulledLinear):
                with torch.device("meta"):
                    plain = nn.Linear(pulled.in_features, pulled.out_features, bias=False)
                plain.weight = pulled.weight
                setattr(model, name, plain.train(pulled.training))
        return model
