"""Feed-forward networks become mixtures of copies of themselves, which learn to do different things."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Le

from m2_encoder.bounds import Index, check_bounds
from m2_encoder.errors import UserError
from m2_encoder.models.added_parts import add_mixtures
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.training.adaptation import Adaptation


class Upcycling(Adaptation):
    """Trains copies of the feed-forward networks of the backbone's last layers, their routers and the temperature.

    All copies are equal at the start, so the model is the base. They come apart because each sees other tokens. What
    is computed grows with the copies that a token passes, what is stored with all of them. The objective `routing`
    keeps routers from sending all tokens to a few. An export has the mixtures as parts of the architecture.

    Args:
        copies: C, networks of a mixture, the one of the base included.
        top_k: copies that a token passes. At least 2: the share of a single one would be 1 whatever the router says,
            and no loss of features would train it.
        vision_layers: the last so many layers of the backbone get mixtures for pictures; None for all.
        text_layers: the same for texts.
        whole: train everything else, too.

    Raises:
        UserError: if `top_k` exceeds `copies`, or no layer is named; in `apply`, for more layers than there are, or a
            model that has mixtures already.

    Reference: CLIP-MoE (arXiv:2409.19291), which trains copies and routers one after the other, while they are trained
    together here, as in sparse upcycling (arXiv:2212.05055).
    """

    fixed: ClassVar[tuple[str, ...]] = ("top_k",)

    @check_bounds
    def __init__(
        self,
        copies: Annotated[int, Ge(2), Le(2**10)] = 4,
        top_k: Annotated[int, Ge(2), Le(2**10)] = 2,
        vision_layers: Index | None = None,
        text_layers: Index | None = None,
        whole: bool = False,
    ) -> None:
        if top_k > copies:
            raise UserError(f"must be at most copies={copies}", key="top_k", value=top_k)
        if vision_layers == text_layers == 0:
            raise UserError("must be above 0, or text_layers", key="vision_layers", value=0)
        self._copies, self._top_k, self._whole = copies, top_k, whole
        self._layers = {"vision_layers": vision_layers, "text_layers": text_layers}

    def apply(self, model: M2Encoder) -> None:
        """Freeze the model, unless it is trained as a whole, and put copies beside its feed-forward networks."""
        config = model.config
        if config.mixture_copies:
            rule = "would replace the mixtures that the model has; use the weights before, or adaptation=full"
            raise UserError(rule, key="copies", value=self._copies)
        for name, count in self._layers.items():
            if count is not None and count > config.num_layers:
                rule = f"must not exceed {config.num_layers}, the layers of the backbone"
                raise UserError(rule, key=name, value=count)
        vision, text = (config.num_layers if count is None else count for count in self._layers.values())
        model.config = dataclasses.replace(
            config,
            mixture_copies=self._copies,
            mixture_top_k=self._top_k,
            mixture_vision_layers=vision,
            mixture_text_layers=text,
        )
        model.requires_grad_(self._whole)
        with torch.device(model.logit_scale.device):
            experts = add_mixtures(model.backbone, model.config)
        for expert in experts:
            for part in (expert.fc1, expert.ffn_inner_norm, expert.fc2, expert.mixture):
                assert part is not None, "it was just made"
                part.requires_grad_(True)
        for scale in model.logit_scales():
            scale.requires_grad_(True)

    def merge(self, model: M2Encoder) -> M2Encoder:
        """Return the model itself: its architecture knows mixtures."""
        return model
