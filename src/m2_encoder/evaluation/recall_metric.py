"""Recall over batches and ranks, for validation; apart from `metrics`, because torchmetrics is slow to import.

Legend: n images · m texts · E feature dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from m2_encoder.evaluation.metrics import RECALL_KS, retrieval_metrics


class RetrievalRecall(Metric):
    """`retrieval_metrics` over batches and ranks.

    Every rank may hold any part of either side, also nothing. Features are kept as fp32. An item that is
    given twice (by a sampler that pads its last batch, say) is in the gallery twice: give every item once.

    Args:
        ks: cut-offs.
        kwargs: of `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    # Flat, because ranks that have nothing must still agree on the number of dimensions.
    image_features: list[Tensor]
    image_ids: list[Tensor]
    text_features: list[Tensor]
    text_ids: list[Tensor]

    def __init__(self, ks: Sequence[int] = RECALL_KS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ks = tuple(ks)
        for name in ("image_features", "image_ids", "text_features", "text_ids"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, image_features: Tensor, image_ids: Tensor, text_features: Tensor, text_ids: Tensor) -> None:
        """Add a batch; the two sides may differ in length, and either may be empty.

        Args:
            image_features: (n, E).
            image_ids: (n,) int64.
            text_features: (m, E).
            text_ids: (m,) int64; a text belongs to the images of the same id.

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
        """Gather from all ranks; one that was given nothing takes part with nothing."""
        for name, state in self._states().items():
            if isinstance(state, list) and not state:
                dtype = torch.long if name.endswith("ids") else torch.float
                state.append(torch.empty(0, dtype=dtype, device=self.device))
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """As `retrieval_metrics`, each a scalar.

        Raises:
            ValueError: if no image and text that belong together were given.
        """
        states = {name: _concatenated(state) for name, state in self._states().items()}
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

    def _states(self) -> dict[str, list[Tensor] | Tensor]:
        return {
            "image_features": self.image_features,
            "image_ids": self.image_ids,
            "text_features": self.text_features,
            "text_ids": self.text_ids,
        }


def _concatenated(state: list[Tensor] | Tensor) -> Tensor:
    """A list of parts before synchronisation, one tensor after it."""
    if isinstance(state, Tensor):
        return state
    return torch.cat(state) if state else torch.empty(0)
