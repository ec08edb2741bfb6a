"""A set without some of its pictures."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from m2_encoder.evaluation.sets.base import EvaluationSet, Texts


def keep_pictures(dataset: EvaluationSet, kept: Tensor) -> EvaluationSet:
    """The set with some of its pictures, and what belongs to them.

    Their pairs, classes and subsets stay; texts that no picture is left for go, and so do their parallel texts, and
    languages without a text.

    Args:
        dataset: of n pictures.
        kept: rows of pictures, ascending, (n',) int64.
    """
    rows = torch.full((len(dataset.pictures),), -1)
    rows[kept] = torch.arange(len(kept))
    texts, text_rows = {}, {}
    for language, own in dataset.texts.items():
        pairs = torch.stack([own.pairs[:, 0], rows[own.pairs[:, 1]]], dim=1)
        pairs = pairs[pairs[:, 1] >= 0]
        left = pairs[:, 0].unique()
        numbers = torch.full((len(own.rows),), -1)
        numbers[left] = torch.arange(len(left))
        text_rows[language] = numbers
        if len(left):
            moved = torch.stack([numbers[pairs[:, 0]], pairs[:, 1]], dim=1)
            texts[language] = Texts(tuple(own.rows[row] for row in left.tolist()), moved)
    parallel = {}
    for (first, second), pairs in dataset.parallel.items():
        if first in texts and second in texts:
            moved = torch.stack([text_rows[first][pairs[:, 0]], text_rows[second][pairs[:, 1]]], dim=1)
            parallel[first, second] = moved[(moved >= 0).all(dim=1)]
    subsets = {name: rows[members][rows[members] >= 0] for name, members in dataset.subsets.items()}
    classes = dataset.classes
    return dataclasses.replace(
        dataset,
        pictures=[dataset.pictures[row] for row in kept.tolist()],
        texts=texts,
        classes=None if classes is None else classes._replace(targets=classes.targets[kept]),
        subsets=subsets,
        parallel=parallel,
    )
