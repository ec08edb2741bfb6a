"""Groups of texts of similar length, so that short texts do not pay for the longest of their batch.

Captions differ in length: a batch of search keywords whose mean is 7 tokens may contain one of 24, and padded to it
costs more than three times what its tokens need. Splitting the batch costs a few smaller matrix products instead.
"""

from __future__ import annotations

from collections.abc import Sequence

_GROUP_COST_TOKENS = 128
"""What one more group costs beyond its tokens, in tokens (kernel launches, smaller matrices)."""


def length_buckets(lengths: Sequence[int], *, max_buckets: int) -> list[tuple[int, list[int]]]:
    """Split texts into groups so that padding each group to its own longest costs least.

    Args:
        lengths: tokens of each text, all at least 1.
        max_buckets: most groups; 1 keeps the batch whole.

    Returns:
        (longest length, row numbers in their original order) per group, short texts first. The groups partition the
        rows and minimise the padded tokens plus a constant per group, over all splits of the sorted lengths.
    """
    distinct = sorted(set(lengths))
    rows = {length: [row for row, own in enumerate(lengths) if own == length] for length in distinct}
    counts = [len(rows[length]) for length in distinct]
    # best[k][j]: least cost of the first j distinct lengths in at most k groups, and where the last group starts
    best: list[list[tuple[int, int]]] = [[(0, 0)] + [(1 << 60, 0)] * len(distinct)]
    for _ in range(max(1, max_buckets)):
        previous = best[-1]
        best.append(
            [(0, 0)]
            + [
                min((previous[i][0] + sum(counts[i:j]) * distinct[j - 1] + _GROUP_COST_TOKENS, i) for i in range(j))
                for j in range(1, len(distinct) + 1)
            ]
        )
    groups: list[tuple[int, list[int]]] = []
    stop, depth = len(distinct), len(best) - 1
    while stop > 0:
        start = best[depth][stop][1]
        members = sorted(row for length in distinct[start:stop] for row in rows[length])
        groups.append((distinct[stop - 1], members))
        stop, depth = start, depth - 1
    return groups[::-1]
