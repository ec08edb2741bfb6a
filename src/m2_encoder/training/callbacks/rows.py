"""How many samples a batch has, whoever made it."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.data import extract_batch_size

from m2_encoder.types import ImageTextBatch


def count_rows(batch: Any) -> int:
    """Samples of a batch; of another type than ours, the length of its first tensor, and 0 if it has none."""
    if isinstance(batch, ImageTextBatch):
        return len(batch.keys)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensors of several lengths
        try:
            return extract_batch_size(batch)
        except MisconfigurationException:
            return 0
