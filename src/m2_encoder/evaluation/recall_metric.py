"""Recall over batches and ranks, for validation; apart from `metrics`, because torchmetrics is slow to import.

torchmetrics itself has no such metric: its `RetrievalRecall` is the share of a query's right items that are found (0.2
for one of five captions); its `RetrievalHitRate` is what is meant here, but wants all similarities at once, and breaks
ties by their order.

Letters: n images · m texts · E feature dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from m2_encoder.evaluation.measures.shards import rank_shards
from m2_encoder.evaluation.metrics import RECALL_KS, collect_metrics, pairs_of_equal_ids, retrieval_metrics

_STATES = ("image_features", "image_ids", "text_features", "text_ids")


class RetrievalRecall(Metric):
    """`retrieval_metrics` over batches and ranks.

    A rank may hold any part of either side, or nothing; it compares its own images with the texts of all. Features are
    kept as fp32. Give every item once: one that comes twice, from a sampler that pads its last batch, is in the gallery
    twice.
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
        super().__init__(sync_on_compute=False, **kwargs)  # `compute` exchanges what it needs, and no image features
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

    def compute(self) -> dict[str, Tensor]:
        """`retrieval_metrics` of the items of all ranks, each a scalar; every rank must call it.

        Raises:
            ValueError: if no image and text that belong together were given.
        """
        images, image_ids, texts, text_ids = (self._joined(name) for name in _STATES)
        if not self.distributed_available_fn():
            _check_counts(len(image_ids), len(text_ids))
            metrics = retrieval_metrics(
                images.reshape(len(image_ids), -1), image_ids, texts.reshape(len(text_ids), -1), text_ids, ks=self.ks
            )
        else:
            metrics = self._compute_together(images, image_ids, texts, text_ids)
        return {name: torch.tensor(value, device=self.device) for name, value in metrics.items()}

    def _compute_together(self, images: Tensor, image_ids: Tensor, texts: Tensor, text_ids: Tensor) -> dict[str, float]:
        counts = gather_all_tensors(torch.tensor([len(image_ids)], device=self.device), self.process_group)
        every_image_id = torch.cat(gather_all_tensors(image_ids, self.process_group))
        every_text_id = torch.cat(gather_all_tensors(text_ids, self.process_group))
        _check_counts(len(every_image_id), len(every_text_id))
        every_text = torch.cat(gather_all_tensors(texts, self.process_group)).reshape(len(every_text_id), -1)
        first = int(sum(counts[: torch.distributed.get_rank(self.process_group)]))
        pairs = pairs_of_equal_ids(every_text_id, every_image_id)
        t2i, i2t = rank_shards(
            every_text,
            images.reshape(len(image_ids), every_text.shape[1]),
            torch.arange(first, first + len(image_ids)),
            pairs,
            num_images=len(every_image_id),
            group=self.process_group,
        )
        return collect_metrics(t2i, i2t, pairs, self.ks)

    def _joined(self, name: str) -> Tensor:
        state: list[Tensor] = getattr(self, name)
        dtype = torch.long if name.endswith("ids") else torch.float
        return dim_zero_cat(state) if state else torch.empty(0, dtype=dtype, device=self.device)


def _check_counts(images: int, texts: int) -> None:
    if not images or not texts:
        raise ValueError(f"{images} images and {texts} texts were given; recall needs some of both")
