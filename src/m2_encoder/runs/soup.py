"""Greedy soups: of several runs, the mean of those whose weights help each other on their validation set.

Reference: model soups (arXiv:2203.05482), recipe 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from m2_encoder.checkpoints.mixing import mix_models
from m2_encoder.config.model_choice import build_any_tokenizer
from m2_encoder.data.retrieval_set import RetrievalSet
from m2_encoder.errors import UserError
from m2_encoder.evaluation.retrieval import encode_set, evaluate_features
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.runs.build import build_data, validation_name_of

Score = Callable[[M2Encoder], float]


class Soup(NamedTuple):
    """Which models a greedy soup takes, and what it scored on the way."""

    shares: list[float]  # of all models, in their order; equal for those that are in it, 0 for the others
    alone: list[float]  # the score of each
    mixed: float  # that of the soup


def read_score(cfg: Mapping[str, Any]) -> tuple[Score, str]:
    """What gives a model the mean recall of all languages on the validation set of a run, in percent, and its name.

    Raises:
        UserError: if the run has no validation set.
    """
    datamodule: Any = build_data(cfg, {})
    datamodule.prepare_data()
    name = validation_name_of(datamodule)
    read = getattr(datamodule, "retrieval_set", None)
    if read is None or not cfg["data"].get("validation", True):
        rule = f"needs a validation set, and run {cfg['run']['name']} has none"
        raise UserError(f"{rule}; use shares=equal", key="shares", value="greedy")
    dataset: RetrievalSet = read(name)
    tokenizer = build_any_tokenizer(cfg["model"])

    def score(model: M2Encoder) -> float:
        found = evaluate_features(encode_set(model, dataset, tokenizer))
        recalls = [metrics["mean_recall"] for language, metrics in found.items() if "mean_recall" in metrics]
        return sum(recalls) / len(recalls)

    return score, name


def choose_greedily(load: Callable[[int], M2Encoder], number: int, score: Score) -> Soup:
    """Tries models from the best to the worst; each stays in the mean if the mean scores no less with it.

    Args:
        load: gives model i of 0..number - 1; at most one is held beside the mean.
        number: of models, at least 1.
        score: higher is better.
    """
    alone = [score(load(index)) for index in range(number)]
    order = sorted(range(number), key=lambda index: -alone[index])
    chosen, best = order[:1], alone[order[0]]
    for index in order[1:]:
        tried = [*chosen, index]
        if (found := score(_mean(load, tried))) >= best:
            chosen, best = tried, found
    return Soup([1 / len(chosen) if index in chosen else 0.0 for index in range(number)], alone, best)


def _mean(load: Callable[[int], M2Encoder], chosen: Sequence[int]) -> M2Encoder:
    return mix_models(map(load, chosen), [1 / len(chosen)] * len(chosen))
