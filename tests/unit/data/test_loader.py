"""Batches from any position on, with any number of workers; states; errors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from m2_encoder.data.loader import PositionLoader
from m2_encoder.errors import UserError
from m2_encoder.types import ImageTextBatch, TextTokens
from tests.support.training import make_datamodule

STEPS = 5


class Numbers(Dataset[int]):
    """Sample p is the number p; a marked position cannot be read."""

    def __init__(self, *, broken: int | None = None) -> None:
        self.broken = broken
        self.read: list[int] = []

    def __getitem__(self, position: int) -> int:
        self.read.append(position)
        if position == self.broken:
            raise UserError(f"shard 7, sample {position}: cannot be read")
        return position


def to_batch(samples: list[int]) -> ImageTextBatch:
    values = torch.tensor(samples)
    tokens = TextTokens(values[:, None], torch.ones(len(samples), 1, dtype=torch.bool))
    return ImageTextBatch(values, tokens, values, values, tuple(map(str, samples)), ("numbers",) * len(samples))


def number_loader(dataset: Dataset[Any] | None = None, **overrides: Any) -> PositionLoader:
    values: dict[str, Any] = {
        "collate": to_batch,
        "num_steps": STEPS,
        "global_batch_size": 4,
        "rank": 0,
        "world_size": 1,
        "num_workers": 0,
        "pin_memory": False,
        "fingerprint": {"seed": 1, "num_samples": 9},
    }
    return PositionLoader(dataset or Numbers(), **{**values, **overrides})


def assert_equal(batch: ImageTextBatch, expected: ImageTextBatch) -> None:
    assert batch.keys == expected.keys
    assert batch.sources == expected.sources
    for mine, theirs in ((batch.images, expected.images), (batch.text.ids, expected.text.ids)):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)
    assert torch.equal(batch.text.mask, expected.text.mask)
    assert torch.equal(batch.language, expected.language)
    assert torch.equal(batch.identity, expected.identity)


@pytest.fixture(scope="module")
def uninterrupted(emoji_folder: Path) -> list[ImageTextBatch]:
    return list(make_datamodule(emoji_folder, max_steps=STEPS, global_batch_size=8).train_dataloader())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 4])
def test_a_resumed_loader_gives_the_rest_to_the_pixel(
    emoji_folder: Path, uninterrupted: list[ImageTextBatch], done: int, workers: int
) -> None:
    first = make_datamodule(emoji_folder, max_steps=STEPS, global_batch_size=8, num_workers=2 - workers)
    loader = first.train_dataloader()
    iterator = iter(loader)
    for _ in range(done):
        next(iterator)
    state = loader.state_dict()
    del iterator

    second = make_datamodule(emoji_folder, max_steps=STEPS, global_batch_size=8, num_workers=workers).train_dataloader()
    second.load_state_dict(state)
    rest = list(second)
    assert len(rest) == STEPS - done
    for batch, expected in zip(rest, uninterrupted[done:], strict=True):
        assert_equal(batch, expected)


def test_a_longer_run_continues_a_shorter_one(emoji_folder: Path, uninterrupted: list[ImageTextBatch]) -> None:
    short = make_datamodule(emoji_folder, max_steps=2, global_batch_size=8).train_dataloader()
    list(short)
    longer = make_datamodule(emoji_folder, max_steps=STEPS, global_batch_size=8).train_dataloader()
    longer.load_state_dict(short.state_dict())
    for batch, expected in zip(longer, uninterrupted[2:], strict=True):
        assert_equal(batch, expected)


def test_the_place_counts_what_was_handed_over_not_what_workers_fetched() -> None:
    loader = number_loader(num_workers=2)
    iterator = iter(loader)
    assert loader.state_dict()["position"] == 0
    next(iterator)
    assert loader.state_dict()["position"] == 4
    next(iterator)
    assert loader.state_dict()["position"] == 8


def test_the_length_is_the_whole_run_also_after_a_resume() -> None:
    loader = number_loader()
    loader.load_state_dict({"position": 12, "fingerprint": {"seed": 1, "num_samples": 9}})
    assert len(loader) == STEPS
    assert [batch.images.tolist() for batch in loader] == [[12, 13, 14, 15], [16, 17, 18, 19]]


def test_ranks_share_global_batches_and_have_equal_states() -> None:
    ranks = [number_loader(rank=rank, world_size=2) for rank in range(2)]
    batches = [[batch.images.tolist() for batch in loader] for loader in ranks]
    assert batches[0][:2] == [[0, 2], [4, 6]]
    assert batches[1][:2] == [[1, 3], [5, 7]]
    assert ranks[0].state_dict() == ranks[1].state_dict()


def test_nothing_is_read_before_it_is_asked_for() -> None:
    dataset = Numbers()
    loader = number_loader(dataset, num_steps=10**9)
    batches = iter(loader)
    assert dataset.read == []
    next(batches)
    assert dataset.read == [0, 1, 2, 3]


def test_the_random_state_of_training_is_left_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    list(number_loader(num_workers=2))
    list(number_loader())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_another_order_is_refused_with_the_difference() -> None:
    loader = number_loader(fingerprint={"seed": 2, "num_samples": 9, "shuffle": True})
    with pytest.raises(UserError) as caught:
        loader.load_state_dict({"position": 4, "fingerprint": {"seed": 1, "num_samples": 9, "lanes": 8}})
    message = str(caught.value)
    for words in ("seed: 1 then, 2 now", "lanes: 8 then, None now", "shuffle: None then, True now", "run.name"):
        assert words in message
    assert "num_samples" not in message
    assert loader.state_dict()["position"] == 0


def test_the_state_is_plain_and_a_copy() -> None:
    loader = number_loader()
    state = loader.state_dict()
    state["fingerprint"]["seed"] = 99
    assert loader.state_dict() == {"position": 0, "fingerprint": {"seed": 1, "num_samples": 9}}


@pytest.mark.parametrize("position", [-4, 3, 4 * STEPS + 4, "4"])
def test_an_impossible_place_is_refused(position: object) -> None:
    loader = number_loader()
    with pytest.raises(UserError, match=f"position {position!r}"):
        loader.load_state_dict({"position": position, "fingerprint": {"seed": 1, "num_samples": 9}})


def test_asking_beyond_the_last_step_is_an_error_and_no_endless_loop() -> None:
    loader = number_loader()
    assert len(list(loader)) == STEPS
    with pytest.raises(UserError, match=r"all 5 steps .*accumulate_grad_batches"):
        next(iter(loader))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_sample_is_one_clear_line(workers: int) -> None:
    loader = iter(number_loader(Numbers(broken=9), num_workers=workers))
    next(loader)
    next(loader)
    with pytest.raises(UserError) as caught:
        next(loader)
    assert str(caught.value) == "shard 7, sample 9: cannot be read"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_changes_during_a_run_ends_it_with_names(tmp_path: Path, emoji_folder: Path, workers: int) -> None:
    shards = tmp_path / "train"
    shards.mkdir()
    for shard in (emoji_folder / "train").glob("*.tar"):
        (shards / shard.name).write_bytes(shard.read_bytes())
    (tmp_path / "emoji.json").write_bytes((emoji_folder / "emoji.json").read_bytes())
    batches = iter(make_datamodule(tmp_path, max_steps=300, num_workers=workers).train_dataloader())
    next(batches)
    for shard in shards.glob("*.tar"):
        os.truncate(shard, 1000)
    with pytest.raises(UserError) as caught:
        for _ in batches:
            pass
    message = str(caught.value)
    assert message.startswith(str(shards))
    assert ".tar:" in message
    assert "\n" not in message
