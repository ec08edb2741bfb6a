"""Retrieval of texts by texts that say the same in another language, through the space shared with images.

Letters: m texts · P pairs · E feature dim.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from m2_encoder.evaluation.measures.retrieval import Retrieval, measure_retrieval
from m2_encoder.evaluation.metrics import RECALL_KS


def measure_parallel(
    languages: tuple[str, str],
    first: Tensor,
    second: Tensor,
    pairs: Tensor,
    *,
    ks: Sequence[int] = RECALL_KS,
    seed: int = 0,
) -> Retrieval:
    """Recalls of the second language's texts for those of the first, "zh2en_r@1", and back, "en2zh_r@1".

    Args:
        languages: such as ("zh", "en"), a key of `EvaluationSet.parallel`.
        first: features of all texts of the first language, (m, E).
        second: of the second, (m', E).
        pairs: rows that say the same, first language first, (P, 2) int64; other texts are in the gallery only.
        ks: cut-offs.
        seed: of the intervals.

    Raises:
        UserError: as `measure_retrieval`.
    """
    one, other = languages
    names = (f"{one}2{other}", f"{other}2{one}")
    return measure_retrieval(second, first, pairs, ks=ks, names=names, seed=seed)
