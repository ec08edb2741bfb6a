"""Samples of a batch, and columns that users add.

A column is a class outside this package that a YAML file names, under `data.columns`::

    data:
      columns:
        score: { _target_: my_columns.AestheticScore }

What its `read` gives for each sample arrives as a tensor in `batch.extra["score"]`, in training of any kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m2_encoder.data.order.plan import Place
from m2_encoder.data.samples.captions import Caption
from m2_encoder.data.samples.parse import SampleText


class Sample(NamedTuple):
    """One sample; each stage of loading adds fields."""

    key: str  # as in the tar
    source: str  # name of the source
    place: Place  # where it lies
    text: SampleText  # all that is said about it, with the whole of its JSON
    identity: int  # equal numbers mark the same content
    files: Mapping[str, bytes]  # content of the further files that columns ask for, by extension
    image: Any  # content of the image file; then as decoded; at last (3, S, S) uint8
    is_decoded: bool = False  # whether the image is more than a file
    captions: tuple[Caption, ...] = ()  # drawn for this step, one, or one per language
    # (seed, position, attempt): key of all its randomness
    draw: tuple[int, ...] = ()
    columns: Mapping[str, Any] = {}  # what the user's columns read, by name


class Column(ABC):
    """One more tensor of a batch, read from the samples.

    Attributes:
        files: extensions of further files of a sample that are read for it, such as "depth.npy" for KEY.depth.npy.
        per_caption: whether it has a row per drawn caption, (k * B, ...), and not one per image, (B, ...).
    """

    files: Sequence[str] = ()
    per_caption: bool = False

    @abstractmethod
    def read(self, sample: Sample) -> Any:
        """The value of a sample, or a list with one per drawn caption.

        The sample has its captions and JSON (`sample.text.metadata`); its image is not decoded yet. The value must
        depend on the sample alone, so that a resumed run reads the same. LookupError, TypeError and ValueError make the
        sample unusable: it is counted, listed and replaced.
        """

    def collate(self, values: Sequence[Any]) -> Tensor:
        """A row for each value: numbers, arrays or tensors of one shape, unless a subclass says otherwise."""
        return torch.stack([torch.as_tensor(value) for value in values])
