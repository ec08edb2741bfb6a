"""Which pictures are right for a text, and which texts for a picture.

`standard`: every caption row is a query, and positives are the pairs of the set. `m2-release`: the ground truth of the
script that was published with the model, which knows texts by their words alone.

Letters: n pictures · m texts · P pairs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

Protocol: TypeAlias = Literal["standard", "m2-release"]

STANDARD: Final = "standard"
M2_RELEASE: Final = "m2-release"


class Positives(NamedTuple):
    """Right answers, by direction."""

    t2i: Tensor  # text row and picture row, (P, 2) int64
    i2t: Tensor  # picture row and text row, (P', 2) int64


def find_positives(protocol: Protocol, rows: Sequence[str], pairs: Tensor) -> Positives:
    """The right answers of a set under a protocol.

    With `m2-release` a picture is right for all rows that have the words of one of its captions; for a picture, of each
    of its captions only the last row with these words is right, whatever picture that row belongs to, and earlier ones
    count as wrong.

    Args:
        protocol: "standard" or "m2-release".
        rows: words of the texts, length m, in the order of the file; with `m2-release` they are cleaned first.
        pairs: rows of a text and of a picture, (P, 2) int64.
    """
    if protocol == STANDARD:
        return Positives(pairs, pairs.flip(1))
    cleaned = [clean_caption(text) for text in rows]
    last = {text: row for row, text in enumerate(cleaned)}
    owners: dict[str, set[int]] = defaultdict(set)
    back = set()
    for text, picture in pairs.tolist():
        owners[cleaned[text]].add(picture)
        back.add((picture, last[cleaned[text]]))
    forward = [(row, picture) for row, text in enumerate(cleaned) for picture in sorted(owners[text])]
    return Positives(torch.tensor(forward), torch.tensor(sorted(back)))


def clean_caption(text: str) -> str:
    """A caption as `m2-release` encodes it: in lower case, with straight double quotation marks."""
    return text.lower().replace("“", '"').replace("”", '"')
