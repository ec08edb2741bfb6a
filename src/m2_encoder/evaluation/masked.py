"""What masked objectives predict on a whole set, with the own captions of images and with those of other images.

Every image is measured once with each of its captions, and once with those of another image. Hidden words and patches
are the same both times, so both means are over the same hidden tokens or patches. By objective and language:

    count                hidden tokens or patches
    loss                 mean of the objective's loss
    accuracy             share of hidden tokens or patches for which the truth scored highest
    other_loss, other_accuracy    the same with other captions, from half the set away; absent if all images show
                         the same
    commonest_accuracy   of tokens and codes: accuracy of always answering the commonest hidden one of this language in
                         this set

`accuracy - other_accuracy` is what the own caption or image contributes; `other_accuracy - commonest_accuracy` is what
the visible words or patches contribute.

Letters: n images · b of them in a batch · k captions of each · T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from m2_encoder.objectives.base import LocalTerms
from m2_encoder.types import LANGUAGES, ImageTextBatch, MaskedText, TextTokens

NOTHING = -1
"""Target where nothing is predicted."""

MaskedResults: TypeAlias = dict[str, dict[str, dict[str, float | int | None]]]
"""Objective -> language -> the numbers above; None for means of nothing."""

TermsByName: TypeAlias = Mapping[str, LocalTerms]


class Evaluated(NamedTuple):
    """Terms of a batch with its own captions and with other ones, by objective."""

    own: TermsByName
    other: TermsByName | None  # of the same images and hidden patches; None without other captions
    # true tokens or codes of own captions, (k * b, T) int64, `NOTHING` elsewhere; as wide in every call
    targets: Mapping[str, Tensor]


Evaluate: TypeAlias = Callable[[ImageTextBatch, ImageTextBatch | None], Evaluated]
"""Evaluates a batch, and the same images and hidden patches with other captions."""


class _Sums(NamedTuple):
    """Sums by language, (languages,) fp64."""

    terms: Tensor
    sums: dict[str, Tensor]


def measure_masked(batch: ImageTextBatch, evaluate: Evaluate, *, batch_size: int = 64) -> MaskedResults:
    """Measures a whole set, by objective and language.

    `batch` is the set, on the CPU, with hidden words and patches; `identity` says which images show the same.
    """
    shift = choose_shift(batch.identity)
    right: dict[str, _Sums] = {}
    other: dict[str, _Sums] = {}
    pieces: dict[str, list[Tensor]] = {}
    others = None if shift is None else move_captions(batch, shift)
    for start in range(0, len(batch.identity), batch_size):
        rows = slice(start, start + batch_size)
        own, beside = batch.rows(rows), None if others is None else others.rows(rows)
        found = evaluate(own, beside)
        _add(right, found.own, own.language)
        if beside is not None and found.other is not None:
            _add(other, found.other, beside.language)
        for name, true in found.targets.items():
            pieces.setdefault(name, []).append(true.cpu())
    targets = {name: torch.cat(each) for name, each in pieces.items()}
    codes = list(dict.fromkeys(batch.language.tolist()))
    return {
        name: {
            LANGUAGES[code]: _describe(sums, other.get(name), code)
            | ({"commonest_accuracy": _commonest(targets[name][batch.language == code])} if name in targets else {})
            for code in codes
        }
        for name, sums in right.items()
    }


def choose_shift(identity: Tensor) -> int | None:
    """By how many images to move captions: half the set, or the nearest number that leaves none with its own content.

    If there is no such number, the one that leaves the fewest; None if all of `identity`, (n,) int64, are equal.
    """
    number = len(identity)
    best, fewest = None, number
    for shift in sorted(range(1, number), key=lambda shift: abs(2 * shift - number)):
        same = int((identity == identity.roll(-shift)).sum())
        if same < fewest:
            best, fewest = shift, same
        if not fewest:
            break
    return best


def move_captions(batch: ImageTextBatch, shift: int) -> ImageTextBatch:
    """Images and hidden patches, with captions and hidden words of the images `shift` rows later, cyclically."""

    def moved(part: Tensor) -> Tensor:
        return part.roll(-shift * batch.captions_per_image, dims=0)

    return batch._replace(
        text=TextTokens(*map(moved, batch.text)),
        language=moved(batch.language),
        masked_text=None if batch.masked_text is None else MaskedText(*map(moved, batch.masked_text)),
    )


def hidden_tokens(batch: ImageTextBatch) -> Tensor:
    """True ids of hidden tokens, (n * k, T) int64, `NOTHING` elsewhere."""
    assert batch.masked_text is not None, "words are hidden where an objective predicts them"
    return batch.text.ids.masked_fill(~batch.masked_text.predicted, NOTHING)


def next_tokens(batch: ImageTextBatch) -> Tensor:
    """Ids of all tokens but the first, (n * k, T - 1) int64, `NOTHING` on padding."""
    return batch.text.ids[:, 1:].masked_fill(~batch.text.mask[:, 1:], NOTHING)


def _add(found: dict[str, _Sums], terms: TermsByName, language: Tensor) -> None:
    """Adds terms by language."""
    for name, own in terms.items():
        values = {"count": own.counts, "loss": own.sums, **own.scores}
        empty = {key: torch.zeros(len(LANGUAGES), dtype=torch.float64) for key in values}
        count, sums = found.setdefault(name, _Sums(empty.pop("count"), empty))
        count.index_add_(0, language, values.pop("count").cpu().double())
        for key, value in values.items():
            sums[key].index_add_(0, language, value.cpu().double())


def _describe(right: _Sums, other: _Sums | None, code: int) -> dict[str, float | int | None]:
    """Results of one language."""
    count = int(right.terms[code])
    assert other is None or int(other.terms[code]) == count, "every caption is measured once beside either image"
    found: dict[str, float | int | None] = {"count": count}
    for prefix, each in (("", right.sums), ("other_", {} if other is None else other.sums)):
        found |= {f"{prefix}{key}": float(sums[code]) / count if count else None for key, sums in each.items()}
    return found


def _commonest(targets: Tensor) -> float | None:
    """Share of the commonest token or code."""
    tokens = targets[targets != NOTHING]
    return float(tokens.bincount().max() / len(tokens)) if len(tokens) else None
