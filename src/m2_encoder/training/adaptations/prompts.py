"""Deep prompts in both towers, coupled; everything else stays as it is.

Letters: P prompts · D width.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import torch
from annotated_types import Le
from torch import Tensor, nn

from m2_encoder.bounds import Count, check_bounds
from m2_encoder.errors import UserError
from m2_encoder.models.added_parts import PROMPT_STD, Prompts
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.training.adaptation import Adaptation


class CoupledPrompts(nn.Module):
    """As `Prompts`, with prompts of the vision tower that are a linear function of those of the text tower."""

    def __init__(self, num_prompts: int, width: int) -> None:
        super().__init__()
        self.text = nn.Parameter(torch.empty(num_prompts, width))
        self.coupling = nn.Linear(width, width)
        nn.init.normal_(self.text, std=PROMPT_STD)

    def forward(self, *, of_text: bool) -> Tensor:
        """Prompts of one modality, (P, D)."""
        vision: Tensor = self.text if of_text else self.coupling(self.text)
        return vision


class DeepPrompts(Adaptation):
    """Trains prompts of the first layers of the backbone, their coupling and the temperature, and nothing else.

    Text prompts of each layer are free; those for pictures are a linear function of them, which ties both towers
    together. On export they become plain prompts (`models.added_parts.Prompts`), a part of the architecture.

    Args:
        num_prompts: P of each modality, in each of these layers.
        layers: how many layers of the backbone, from the first one on, have prompts; None for all.

    Raises:
        UserError: in `apply`, for more layers than there are, or a model that has prompts already.

    Reference: MaPLe (arXiv:2210.03117). Here prompts are keys and values, not tokens, so they take no position.
    """

    @check_bounds
    def __init__(self, num_prompts: Annotated[Count, Le(2**12)] = 4, layers: Count | None = None) -> None:
        self._num_prompts, self._layers = num_prompts, layers

    def apply(self, model: M2Encoder) -> None:
        """Freeze the model, and give its layers coupled prompts."""
        config = model.config
        layers = self._layers or config.num_layers
        if layers > config.num_layers:
            rule = f"must not exceed {config.num_layers}, the layers of the backbone"
            raise UserError(rule, key="layers", value=layers)
        if config.num_prompts:
            rule = "would replace the prompts that the model has; use the weights before, or adaptation=full"
            raise UserError(rule, key="num_prompts", value=self._num_prompts)
        model.config = dataclasses.replace(config, num_prompts=self._num_prompts, prompt_layers=layers)
        model.requires_grad_(False)
        with torch.device(model.logit_scale.device):
            for layer in model.backbone.layers[:layers]:
                layer.prompts = CoupledPrompts(self._num_prompts, config.embed_dim)
        for scale in model.logit_scales():
            scale.requires_grad_(True)

    def merge(self, model: M2Encoder) -> M2Encoder:
        """Compute the prompts for pictures once and for all."""
        for layer in model.backbone.layers[: model.config.prompt_layers]:
            coupled: Any = layer.prompts
            with torch.device("meta"):
                plain = Prompts(model.config)
            plain.text = coupled.text
            plain.vision = nn.Parameter(coupled(of_text=False), requires_grad=coupled.text.requires_grad)
            layer.prompts = plain.train(model.training)
        return model
