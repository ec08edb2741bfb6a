"""Masks of the data module: a function of seed and position, whoever draws them."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from m2_encoder.data.masking.batch_masking import BatchMasking
from m2_encoder.errors import UserError
from m2_encoder.types import ImageTextBatch
from tests.support.training import make_captions, make_datamodule, make_tokenizer

pytest.importorskip("jieba", reason="Chinese captions are cut by jieba")

STEPS = 4


def batches(folder: Path, *, rank: int = 0, world_size: int = 1, skip: int = 0, **overrides: Any) -> list[Any]:
    masking = BatchMasking(make_tokenizer(), grid=4, word_ratio=0.5, patch_ratio=0.4)
    given = {"max_steps": STEPS, "masking": masking, "captions": make_captions(every_language=True)}
    datamodule = make_datamodule(folder, **{**given, **overrides})
    datamodule.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank,
        world_size=world_size,
        accumulate_grad_batches=1,
        max_steps=STEPS,
        default_root_dir=str(folder),
    )
    loader = datamodule.train_dataloader()
    if skip:
        loader.load_state_dict({**loader.state_dict(), "position": skip * datamodule.global_batch_size})
    return list(loader)


def masks(batch: ImageTextBatch) -> dict[tuple[str, int], tuple[list[int], list[bool], list[bool]]]:
    """By key and language: ids with hidden words, which are hidden, and the hidden patches of the image."""
    assert batch.masked_text is not None
    assert batch.patch_mask is not None
    found = {}
    for row, mask in enumerate(batch.text.mask):
        length = int(mask.sum())
        assert not batch.masked_text.predicted[row, length:].any()
        found[batch.keys[row // 2], row % 2] = (
            batch.masked_text.ids[row, :length].tolist(),
            batch.masked_text.predicted[row, :length].tolist(),
            batch.patch_mask[row // 2].tolist(),
        )
    return found


@pytest.fixture(scope="module")
def alone(emoji_folder: Path) -> list[dict[tuple[str, int], Any]]:
    return [masks(batch) for batch in batches(emoji_folder)]


def test_workers_hide_the_same(emoji_folder: Path, alone: list[dict[tuple[str, int], Any]]) -> None:
    assert [masks(batch) for batch in batches(emoji_folder, num_workers=2)] == alone


def test_ranks_hide_the_same(emoji_folder: Path, alone: list[dict[tuple[str, int], Any]]) -> None:
    ranks = [batches(emoji_folder, rank=rank, world_size=2) for rank in range(2)]
    assert [masks(one) | masks(other) for one, other in zip(*ranks, strict=True)] == alone


def test_a_resumed_run_hides_the_same(emoji_folder: Path, alone: list[dict[tuple[str, int], Any]]) -> None:
    assert [masks(batch) for batch in batches(emoji_folder, skip=2)] == alone[2:]


def test_another_seed_hides_something_else(emoji_folder: Path, alone: list[dict[tuple[str, int], Any]]) -> None:
    patches = [
        {tuple(mask) for _, _, mask in step.values()} for step in (alone[0], masks(batches(emoji_folder, seed=6)[0]))
    ]
    assert patches[0] != patches[1]


def test_what_is_hidden_follows_the_position() -> None:
    """The same caption and image hide something else in another epoch, for another caption, and in another place."""
    masking = BatchMasking(make_tokenizer(), grid=14, word_ratio=0.5, patch_ratio=80 / 196)
    text = "a red apple on a wooden table, 一只红色的苹果放在木桌上"
    draws = [(5, position, attempt) for position in range(20) for attempt in range(2)]
    _, masked = masking.mask_texts([text] * 40, [(*draw, 0) for draw in draws])
    assert len({tuple(row) for row in masked.predicted.tolist()}) > 35
    patches = masking.mask_images(draws)
    assert patches is not None
    assert len({tuple(row) for row in patches.tolist()}) == 40
    assert patches.sum(dim=1).tolist() == [80] * 40


def test_texts_without_words() -> None:
    masking = BatchMasking(make_tokenizer(), grid=4, word_ratio=0.15)
    texts = ["", "   ", "[MASK]", "[CLS]<|endoftext|>", "猫", "。"]
    text, masked = masking.mask_texts(texts, [(0, row) for row in range(len(texts))])
    assert masked.predicted.any(dim=1).tolist() == [False] * 4 + [True] * 2
    assert torch.equal(masked.ids[:4], text.ids[:4])
    assert masking.mask_images([(0,)]) is None
    empty, none = masking.mask_texts([], [])
    assert empty.ids.shape == none.predicted.shape == (0, 0)


@pytest.mark.parametrize(
    ("grid", "ratio", "hidden"),
    [(4, 0.02, "0 of the 16"), (4, 0.98, "16 of the 16"), (2, 0.9, "4 of the 4"), (2, math.nan, "0 of the 4")],
)
def test_ratios_that_leave_nothing_to_see_or_to_predict_are_named(grid: int, ratio: float, hidden: str) -> None:
    with pytest.raises(UserError, match=f"mask_ratio={ratio} hides {hidden} patches; .*at least one and not all"):
        BatchMasking(make_tokenizer(), grid=grid, patch_ratio=ratio)
