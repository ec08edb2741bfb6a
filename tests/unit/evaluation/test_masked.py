"""Sums, partners and blind answers of measured masked objectives, against loops over single captions."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from m2_encoder.evaluation.masked import (
    NOTHING,
    Evaluated,
    choose_shift,
    hidden_tokens,
    measure_masked,
    move_captions,
    next_tokens,
)
from m2_encoder.types import LANGUAGES, ImageTextBatch, MaskedText, TextTokens

EN, ZH = LANGUAGES.index("en"), LANGUAGES.index("zh")


class Terms(NamedTuple):
    """As an objective says them."""

    sums: Tensor
    counts: Tensor
    scores: dict[str, Tensor]


def make_set(
    number: int, *, identity: list[int] | None = None, languages: tuple[int, ...] = (ZH, EN)
) -> ImageTextBatch:
    """Image i is all i; its captions start with 100 * i + the language; token t of each is hidden by chance."""
    captions, length = len(languages), 6
    ids = torch.randint(5, 9, (number * captions, length))
    ids[:, 0] = 100 * torch.arange(number).repeat_interleave(captions) + torch.tensor(languages).repeat(number)
    mask = torch.arange(length) < torch.randint(2, length + 1, (number * captions, 1))
    predicted = mask & (torch.rand(ids.shape) < 0.5)
    predicted[:, 0] = False
    keys = tuple(map(str, identity or range(number)))
    return ImageTextBatch(
        images=torch.arange(number)[:, None, None, None].expand(number, 3, 4, 4).contiguous(),
        text=TextTokens(ids, mask),
        language=torch.tensor(languages).repeat(number),
        identity=torch.tensor(identity or list(range(number))),
        keys=keys,
        sources=("set",) * number,
        masked_text=MaskedText(ids.masked_fill(predicted, 1), predicted),
        patch_mask=torch.rand(number, 4) < 0.5,
    )


def say(batch: ImageTextBatch) -> Terms:
    """A loss and an accuracy that depend on which image meets which caption."""
    assert batch.masked_text is not None
    image = batch.images[:, 0, 0, 0].repeat_interleave(batch.captions_per_image)
    caption, counts = batch.text.ids[:, 0], batch.masked_text.predicted.sum(dim=1)
    right = torch.where(caption // 100 == image, counts, counts // 2)
    return Terms((image * 1000 + caption).float() * counts, counts, {"accuracy": right})


def evaluate(own: ImageTextBatch, other: ImageTextBatch | None) -> Evaluated:
    return Evaluated(
        {"words": say(own)}, None if other is None else {"words": say(other)}, {"words": hidden_tokens(own)}
    )


def evaluate_blind(own: ImageTextBatch, other: ImageTextBatch | None) -> Evaluated:
    """As an objective that predicts neither tokens nor codes."""
    return evaluate(own, other)._replace(targets={})


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_numbers_are_those_of_a_loop(batch_size: int) -> None:
    number, batch = 7, make_set(7)
    found = measure_masked(batch, evaluate, batch_size=batch_size)
    assert list(found) == ["words"]
    assert list(found["words"]) == ["zh", "en"], "as the captions come"
    masked = batch.masked_text
    assert masked is not None
    for place, name in enumerate(("zh", "en")):
        count = losses = other_losses = hits = other_hits = 0.0
        tokens: Counter[int] = Counter()
        for image in range(number):
            row = 2 * image + place
            other = (image - 3) % number  # the caption 3 places on stands beside it
            hidden = int(masked.predicted[row].sum())
            caption = int(batch.text.ids[row, 0])
            count += hidden
            losses += hidden * (1000 * image + caption)
            other_losses += hidden * (1000 * other + caption)
            hits += hidden
            other_hits += hidden // 2
            tokens.update(batch.text.ids[row][masked.predicted[row]].tolist())
        numbers = found["words"][name]
        assert numbers == {
            "count": count,
            "loss": pytest.approx(losses / count),
            "accuracy": 1.0,
            "other_loss": pytest.approx(other_losses / count),
            "other_accuracy": pytest.approx(other_hits / count),
            "commonest_accuracy": pytest.approx(tokens.most_common(1)[0][1] / count),
        }
        assert isinstance(numbers["count"], int)


def test_a_language_without_hidden_tokens_has_no_means() -> None:
    batch = make_set(4)
    assert batch.masked_text is not None
    batch.masked_text.predicted[1::2] = False
    batch.masked_text.predicted[0, 1] = True
    found = measure_masked(batch, evaluate)["words"]
    assert found["en"] == {
        "count": 0,
        **dict.fromkeys(("loss", "accuracy", "other_loss", "other_accuracy", "commonest_accuracy")),
    }
    assert found["zh"]["accuracy"] == 1.0


def test_other_languages_are_not_made_up() -> None:
    batch = make_set(3, languages=(EN,))
    assert list(measure_masked(batch, evaluate)["words"]) == ["en"]


def test_one_content_has_no_other_partner() -> None:
    batch = make_set(3, identity=[4, 4, 4])
    (numbers,) = {tuple(each) for each in measure_masked(batch, evaluate_blind)["words"].values()}
    assert numbers == ("count", "loss", "accuracy")


def test_captions_keep_their_hidden_words_and_images_their_hidden_patches() -> None:
    batch = make_set(5)
    moved = move_captions(batch, 3)
    assert batch.masked_text is not None
    assert moved.masked_text is not None
    assert (moved.images is batch.images, moved.patch_mask is batch.patch_mask, moved.keys) == (True, True, batch.keys)
    places = [6, 7, 8, 9, 0, 1, 2, 3, 4, 5]
    assert torch.equal(moved.text.ids, batch.text.ids[places])
    assert torch.equal(moved.masked_text.ids, batch.masked_text.ids[places])
    assert torch.equal(moved.masked_text.predicted, batch.masked_text.predicted[places])
    assert moved.language.tolist() == [ZH, EN] * 5


@given(st.lists(st.integers(0, 5), min_size=1, max_size=14))
def test_captions_move_half_the_set_unless_they_would_meet_their_own_content(identity: list[int]) -> None:
    number = len(identity)

    def meetings(shift: int) -> int:
        return sum(identity[row] == identity[(row + shift) % number] for row in range(number))

    shift = choose_shift(torch.tensor(identity))
    if len(set(identity)) == 1:
        assert shift is None
        return
    assert shift is not None
    assert meetings(shift) == min(meetings(each) for each in range(1, number))
    if len(set(identity)) == number:
        assert shift == number // 2


def test_targets_are_true_tokens() -> None:
    batch = make_set(2)
    masked = batch.masked_text
    assert masked is not None
    hidden, following = hidden_tokens(batch), next_tokens(batch)
    for row in range(4):
        ids, length = batch.text.ids[row].tolist(), int(batch.text.mask[row].sum())
        chosen = masked.predicted[row].tolist()
        assert hidden[row].tolist() == [token if is_it else NOTHING for token, is_it in zip(ids, chosen, strict=True)]
        assert following[row].tolist() == [*ids[1:length], *[NOTHING] * (6 - length)]
