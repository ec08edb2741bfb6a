"""Matching heads of runs, and `rerank=K` of m2-evaluate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from m2_encoder.checkpoints.exported import CONFIG_FILE
from m2_encoder.checkpoints.matching_head import MatchingHead, has_head
from m2_encoder.config.model_choice import find_path, is_model_name
from m2_encoder.config.problems import Unset
from m2_encoder.data.retrieval_set import RetrievalSet
from m2_encoder.errors import UserError
from m2_encoder.evaluation.encode import Tokenize
from m2_encoder.evaluation.rerank import RerankingModel, rerank_set
from m2_encoder.evaluation.retrieval import SetFeatures
from m2_encoder.objectives.base import Objective
from m2_encoder.objectives.matching import Matching

RERANKED: Final = "reranked"
"""Before the names of metrics, after the language in tables."""

_LEAST: Final = 2
_CHUNK_PAIRS: Final = 64  # a pair is as long as an image and a text together
_TARGET: Final = f"{Matching.__module__}.{Matching.__qualname__}"

Results = dict[str, dict[str, dict[str, float]]]
"""Split -> language -> metric -> percent."""


class HeadOfRun(NamedTuple):
    """Which objective of a run has the matching head.

    Attributes:
        name: of the objective.
        text_expert: its value.
    """

    name: str
    text_expert: bool


def find_head(cfg: Mapping[str, Any]) -> HeadOfRun | None:
    """The matching objective in a run's resolved configuration, the first if there are several; None without one."""
    for name, node in (cfg.get("objective") or {}).items():
        if node["_target_"] == _TARGET and node.get("weight", 1.0) > 0:
            return HeadOfRun(name, bool(node.get("text_expert", False)))
    return None


def trained_head(objectives: Mapping[str, Objective]) -> MatchingHead | None:
    """The head of the first matching objective among trained ones; None without one."""
    return next((MatchingHead(o.head, o.text_expert) for o in objectives.values() if isinstance(o, Matching)), None)


def rerank_problems(cfg: Mapping[str, Any]) -> list[str]:
    """What is wrong with `rerank`, without loading anything."""
    candidates, model, weights = cfg["rerank"], cfg["model"], cfg["weights"]
    if candidates is None:
        return []
    if not isinstance(candidates, int) or isinstance(candidates, bool) or candidates < _LEAST:
        return [
            f"rerank={candidates}: must be null, or a whole number of at least {_LEAST}: how many candidates of each "
            "query are ordered anew"
        ]
    fix = (
        "train with the objective itm (m2-train +experiment=r2d2 does), export that run again with "
        "m2-export run.name=NAME overwrite=true and give its export as the model, or leave rerank out"
    )
    if weights is not None or is_model_name(model):
        given = f"weights={weights}" if weights is not None else f"model={model}"
        return [f"rerank={candidates}: {given} brings no matching head, only a folder of m2-export does; {fix}"]
    if isinstance(model, Unset) or not isinstance(model, str) or not (find_path(model) / CONFIG_FILE).is_file():
        return []  # which is reported for the model
    try:
        return [] if has_head(find_path(model)) else [f"rerank={candidates}: {model} has no matching head; {fix}"]
    except UserError as error:
        return [str(error)]


def rerank_sets(
    model: RerankingModel,
    head: MatchingHead,
    sets: Mapping[str, RetrievalSet],
    features: Mapping[str, SetFeatures],
    tokenizer: Tokenize,
    *,
    candidates: int,
) -> Results:
    """Recalls of all sets after re-ranking.

    Args:
        model: on any device.
        head: on the same device.
        sets: by split.
        features: of all of them.
        tokenizer: the model's own.
        candidates: K.
    """
    return {
        split: rerank_set(
            model,
            head.linear,
            dataset,
            features[split],
            tokenizer,
            k=candidates,
            text_expert=head.text_expert,
            chunk_size=_CHUNK_PAIRS,
        )
        for split, dataset in sets.items()
    }


def side_by_side(results: Results, reranked: Results) -> Results:
    """Rows for a table: below each language the same after re-ranking."""
    return {
        split: {
            row: values
            for language, metrics in languages.items()
            for row, values in (
                (language, metrics),
                (f"{language} {RERANKED}", reranked[split][language]),
            )
        }
        for split, languages in results.items()
    }


def reranked_metrics(sets: Mapping[str, RetrievalSet], reranked: Results) -> dict[str, float]:
    """Recalls under the names of the loggers: `val/<set>_<language>/reranked_t2i_r@10`, percent."""
    return {
        f"val/{sets[split].name}_{language}/{RERANKED}_{name}": value
        for split, languages in reranked.items()
        for language, metrics in languages.items()
        for name, value in metrics.items()
        if "_r@" in name or name == "mean_recall"
    }


def small_galleries(features: Mapping[str, SetFeatures], *, candidates: int) -> list[str]:
    """What to say of sets with fewer images or texts than candidates, one line each."""
    lines = []
    for split, encoded in features.items():
        sizes = {"images": len(encoded.image_ids)}
        sizes |= {f"{language} texts": len(texts.ids) for language, texts in encoded.texts.items()}
        lines += [
            f"rerank={candidates}: {split} has {size:,} {what}, so all of them are ranked again"
            for what, size in sizes.items()
            if size < candidates
        ]
    return lines
