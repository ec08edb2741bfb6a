"""Where a list of results probably ends.

A cosine says little by itself: for one query 0.3 is a find, for another the whole gallery lies above it. So a score is
compared with those that the same query has on a sample of the gallery, of mean m and deviation s. A result is kept if
it has most of the lift of the best one over m, and if it rises over m by more than the best picture of a query that
asks for nothing. That bound is the expected maximum of N normal values, lowered to what neutral prompts such as "a
picture of" reach in galleries of 150 to 7,000 pictures. Both bounds are in units of the query itself: no model and no
language has a threshold of its own. Copies of a picture that is searched for stand before the line and say nothing
about how alike others can be. `benchmarks/result_endings.py` measures all of it.

Letters: k results · S sample · N pictures.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

COPY: Final = 0.999
"""Cosine of two pictures that are the same, features of float16 included."""

LIFT: Final = 0.9
"""Share of the lift of the best result that the last one has."""

_CHANCE: Final = 0.7  # of the expected maximum, in deviations: the best of a neutral prompt


def find_end(scores: npt.ArrayLike, sample: npt.ArrayLike, total: int) -> int:
    """How many of the first results probably belong to the query; 0 if probably none does.

    Args:
        scores: of the results, best first, (k,); without the picture that was the query.
        sample: of pictures evenly spread over the gallery, by the same query, (S,).
        total: N.
    """
    found, spread = np.asarray(scores, dtype=np.float64), np.asarray(sample, dtype=np.float64)
    copies = int(np.count_nonzero(found >= COPY))
    found = found[copies:]
    if not len(found) or not len(spread):
        return copies + len(found)
    mean = spread.mean()
    chance = chance_lift(total) * spread.std()
    return copies + int(np.count_nonzero(found >= mean + max(LIFT * (found[0] - mean), chance)))


def chance_lift(total: int) -> float:
    """How far the best of so many pictures rises over their mean for a query that asks for nothing, in deviations."""
    return _CHANCE * math.sqrt(2 * math.log(max(total, 2)))
