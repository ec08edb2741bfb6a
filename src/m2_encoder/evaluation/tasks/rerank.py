"""Retrieval before and after reranking by a matching head."""

from __future__ import annotations

from typing import Annotated, Final

from annotated_types import Ge

from m2_encoder.bounds import Count, check_bounds
from m2_encoder.evaluation.rerank import rerank_set
from m2_encoder.evaluation.retrieval import evaluate_features
from m2_encoder.evaluation.tasks.base import EvaluationContext, TaskResult
from m2_encoder.evaluation.tasks.retrieval import Retrieval, recall_metrics, report_recalls

RERANKED: Final = "reranked"
"""Prefix of metrics, and suffix of the language in tables."""

_CHUNK_PAIRS: Final = 64  # a pair is as long as an image and a text together


class Rerank(Retrieval):
    """Recalls of every set before and after reranking; only before for a model without a matching head.

    Args:
        candidates: K, how many candidates of each query are reranked.
    """

    @check_bounds
    def __init__(self, *, candidates: Annotated[Count, Ge(2)] = 16) -> None:
        self._candidates = candidates

    def measure(self, context: EvaluationContext) -> TaskResult:
        """Recalls in percent, as `evaluation.rerank.rerank_set` returns them."""
        head = context.matching
        if head is None:
            found = super().measure(context)
            line = "rerank: the model has no matching head; the objective itm trains one"
            return found._replace(rows=(*found.rows, line))
        model = context.encoder
        plain = {split: evaluate_features(features) for split, features in context.features.items()}
        linear = head.linear.to(model.logit_scale.device)
        reranked = {
            split: rerank_set(
                model,
                linear,
                dataset,
                context.features[split],
                context.tokenizer,
                k=self._candidates,
                text_expert=head.text_expert,
                chunk_size=_CHUNK_PAIRS,
            )
            for split, dataset in context.sets.items()
        }
        rows = {
            split: {
                row: values
                for language, metrics in languages.items()
                for row, values in ((language, metrics), (f"{language} {RERANKED}", reranked[split][language]))
            }
            for split, languages in plain.items()
        }
        metrics = recall_metrics(context, plain) | recall_metrics(context, reranked, prefix=f"{RERANKED}_")
        return report_recalls(context, rows, metrics=metrics, lines=tuple(self._small_galleries(context)))

    def _small_galleries(self, context: EvaluationContext) -> list[str]:
        """A line for each side of a set with fewer items than candidates."""
        lines = []
        for split, encoded in context.features.items():
            sizes = {"images": len(encoded.image_ids)}
            sizes |= {f"{language} texts": len(texts.ids) for language, texts in encoded.texts.items()}
            lines += [
                f"rerank={self._candidates}: {split} has {size:,} {what}, so all of them are ranked again"
                for what, size in sizes.items()
                if size < self._candidates
            ]
        return lines
