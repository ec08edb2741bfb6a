"""Recall over batches and ranks, for validation; apart from `metrics`, because torchmetrics is slow to import.

Letters: n images · m texts · E feature dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from m2_encoder.evaluation.metrics import RECALL_KS, retrieval_metrics

_STATES = ("image_features", "image_ids", "text_features", "text_ids")


class RetrievalRecall(Metric):
    """`retrieval_metrics` over batches and ranks.

    A rank may hold any part of either side, or nothing. Features are kept as fp32. Give every item once: one that comes
    twice, from a sampler that pads its last batch, is in the gallery twice.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    # Features are flat, because ranks without items must agree on the number of dimensions.
    image_features: list[Tensor]
    image_ids: list[Tensor]
    text_features: list[Tensor]
    text_ids: list[Tensor]

    def __init__(self, ks: Sequence[int] = RECALL_KS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ks = tuple(ks)
        for name in _STATES:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, image_features: Tensor, image_ids: Tensor, text_features: Tensor, text_ids: Tensor) -> None:
        """Adds a batch: (n, E) and (n,) int64 of images, (m, E) and (m,) int64 of texts; either side may be empty.

        Raises:
            ValueError: if a side's ids and features differ in number.
        """
        sides = {"image": (image_features, image_ids), "text": (text_features, text_ids)}
        for name, (features, ids) in sides.items():
            if ids.dim() != 1 or features.dim() != 2 or len(ids) != len(features):
                raise ValueError(
                    f"{name} features {tuple(features.shape)}, ids {tuple(ids.shape)}: must be (n, E), (n,)"
                )
        for name, (features, ids) in sides.items():
            getattr(self, f"{name}_features").append(features.detach().float().flatten())
            getattr(self, f"{name}_ids").append(ids.detach().long())

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gathers from all ranks, also from those without items."""
        self._fill_empty()
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """`retrieval_metrics`, each a scalar.

        Raises:
            ValueError: if no image and text that belong together were given.
        """
        self._fill_empty()
        states = {name: dim_zero_cat(getattr(self, name)) for name in _STATES}
        images, texts = states["image_ids"].numel(), states["text_ids"].numel()
        if not images or not texts:
            raise ValueError(f"{images} images and {texts} texts were given; recall needs some of both")
        metrics = retrieval_metrics(
            states["image_features"].reshape(images, -1),
            states["image_ids"],
            states["text_features"].reshape(texts, -1),
            states["text_ids"],
            ks=self.ks,
        )
        return {name: torch.tensor(value, device=self.device) for name, value in metrics.items()}

    def _fill_empty(self) -> None:
        for name in _STATES:
            state = getattr(self, name)  # after synchronisation a tensor
            if isinstance(state, list) and not state:
                dtype = torch.long if name.endswith("ids") else torch.float
                state.append(torch.empty(0, dtype=dtype, device=self.device))
