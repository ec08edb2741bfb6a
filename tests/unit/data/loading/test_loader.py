"""Batches from any position on, with any number of workers; states; errors."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m2_encoder.data.loading.faults import SampleFault
from m2_encoder.data.loading.loader import PositionLoader, rank_positions
from m2_encoder.data.loading.stages import READING, StageClock
from m2_encoder.data.loading.stream import Delivery
from m2_encoder.data.order.plan import Segment, SegmentSource
from m2_encoder.errors import UserError
from m2_encoder.types import ImageTextBatch, TextTokens
from tests.support.training import make_datamodule

STEPS = 5


class Numbers:
    """Sample p is the number p; a marked position cannot be read, another never ends, a third one kills its process."""

    def __init__(self, *, broken: int | None = None, stuck: int | None = None, deadly: int | None = None) -> None:
        self.broken, self.stuck, self.deadly = broken, stuck, deadly
        self.read: list[int] = []
        self.clock = StageClock()

    def deliver(self, positions: Sequence[int]) -> Iterator[Delivery]:
        return map(self.__getitem__, positions)

    def __getitem__(self, position: int) -> Delivery:
        self.read.append(position)
        self.clock.enter(READING, f"shard {position}")
        if position == self.broken:
            raise UserError(f"shard 7, sample {position}: cannot be read")
        if position == self.stuck:
            time.sleep(30)
        if position == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        faults = [SampleFault("numbers", "7.tar", str(position), "bad_json", "odd")] if position % 5 == 4 else []
        return Delivery(position, tuple(faults))


def to_batch(samples: list[int]) -> ImageTextBatch:
    values = torch.tensor(samples)
    tokens = TextTokens(values[:, None], torch.ones(len(samples), 1, dtype=torch.bool))
    return ImageTextBatch(values, tokens, values, values, tuple(map(str, samples)), ("numbers",) * len(samples))


def number_loader(dataset: Numbers | None = None, **overrides: Any) -> PositionLoader:
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
    numbers = dataset or Numbers()
    return PositionLoader(lambda _history, _start: numbers, **{**values, **overrides})


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


@pytest.mark.parametrize("workers", [0, 2])
def test_faults_are_handed_over_with_their_batch(workers: int) -> None:
    met: list[tuple[list[str | None], int]] = []

    def note(faults: Sequence[SampleFault], drawn: int) -> None:
        met.append(([fault.key for fault in faults], drawn))

    loader = number_loader(num_workers=workers, on_faults=note)
    batches = iter(loader)
    next(batches)
    assert met == [([], 4)], "what workers fetched ahead was not handed over yet"
    list(batches)
    assert met[1:] == [(["4"], 4), (["9"], 4), (["14"], 4), (["19"], 4)]


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_that_stands_still_is_an_error_that_says_where(workers: int) -> None:
    loader = number_loader(Numbers(stuck=5), num_workers=workers, stall_timeout_s=0.6)
    batches = iter(loader)
    next(batches)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"stands still for 0.6 s: waiting for worker . reading shard 5 for 1 s"):
        next(batches)
    assert time.monotonic() - started < 8
    assert loader.state_dict()["position"] == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_slow_loading_is_waited_for(workers: int) -> None:
    class Slow(Numbers):
        def __getitem__(self, position: int) -> Delivery:
            delivery = super().__getitem__(position)
            time.sleep(0.25)
            return delivery

    assert len(list(number_loader(Slow(), num_workers=workers, num_steps=2, stall_timeout_s=0.8))) == 2


def test_a_worker_that_dies_is_named_with_what_it_did() -> None:
    loader = iter(number_loader(Numbers(deadly=6), num_workers=2))
    with pytest.raises(UserError, match=r"a worker of the data loader died.*worker 1: reading shard 6"):
        list(loader)


def test_workers_survive_a_signal_to_end_until_they_are_needed_no_more() -> None:
    """One that is sent to all processes of a run: the trainer ends its step and saves, for which it needs them."""
    others = multiprocessing.active_children()  # pools that earlier tests have left
    loader = number_loader(num_workers=2)
    batches = iter(loader)
    next(batches)
    next(batches)  # both have started
    workers = set(multiprocessing.active_children()) - set(others)
    assert len(workers) == 2
    for worker in workers:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGTERM)
    assert [batch.images.tolist() for batch in batches] == [[4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3] for i in (2, 3, 4)]
    assert not any(worker.is_alive() for worker in workers)


_EXITS = """
import sys
sys.path.insert(0, sys.argv[1])
from tests.unit.data.loading.test_loader import number_loader

batches = iter(number_loader(num_workers=2))
next(batches)
sys.exit(7)
"""


def test_a_process_that_ends_amid_its_batches_does_not_wait_for_workers(repo_root: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _EXITS, str(repo_root)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 7, done.stderr


def test_the_time_of_stages_is_measured() -> None:
    loader = number_loader()
    list(loader)
    seconds = loader.take_stage_seconds()
    assert seconds["reading"] > 0
    assert sum(seconds.values()) < 5
    assert not any(loader.take_stage_seconds().values())


def segmented(weight: float, **overrides: Any) -> PositionLoader:
    values: dict[str, Any] = {
        "fingerprint": {"seed": 1, "source a": f"weight {weight:g}"},
        "segment": [SegmentSource("a", "d", weight)],
    }
    return number_loader(**{**values, **overrides})


def test_another_mixture_is_refused_unless_a_new_segment_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    first = segmented(1.0)
    batches = iter(first)
    next(batches)
    state = first.state_dict()
    with pytest.raises(UserError, match=r"another mixture.*weight 1' then, 'weight 2' now.*data.new_segment=true"):
        segmented(2.0, new_segment=False).load_state_dict(state)
    with pytest.raises(UserError, match=r"another mixture.*with another run.name$"):
        segmented(2.0).load_state_dict(state)
    with pytest.raises(UserError, match="seed: 1 then, 3 now"):
        segmented(2.0, fingerprint={"seed": 3, "source a": "x"}, new_segment=True).load_state_dict(state)

    built: list[tuple[Sequence[Segment], int]] = []
    second = segmented(2.0, new_segment=True)
    second._build_dataset = lambda history, start: built.append((history, start)) or Numbers()  # type: ignore[func-returns-value]
    with caplog.at_level("WARNING"):
        second.load_state_dict(state)
    assert "a new segment begins at position 4: source a: 'weight 1' then, 'weight 2' now" in caplog.text
    next(iter(second))
    old, new = Segment(0, (SegmentSource("a", "d", 1.0),)), Segment(4, (SegmentSource("a", "d", 2.0),))
    assert built == [((old,), 4)]

    # The state remembers both; it goes on in the second one, whether a new one is allowed or not.
    for allowed in (True, False):
        third = segmented(2.0, new_segment=allowed)
        third.load_state_dict(second.state_dict())
        assert third._history == (old,)
        assert third._segment == new


@given(
    per_rank=st.integers(1, 6),
    world_size=st.sampled_from([1, 2, 3, 4, 8]),
    first_batch=st.integers(0, 9),
    batches=st.integers(0, 6),
)
def test_ranks_partition_every_global_batch(per_rank: int, world_size: int, first_batch: int, batches: int) -> None:
    size = per_rank * world_size
    start, stop = first_batch * size, (first_batch + batches) * size
    by_rank = [
        list(rank_positions(start=start, stop=stop, global_batch_size=size, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert all(len(own) == batches for own in by_rank)
    for t, parts in enumerate(zip(*by_rank, strict=True)):
        assert all(len(part) == per_rank for part in parts)
        # The interleaving is part of the promise: batch t of rank r is t*B + r, t*B + r + R, ...
        interleaved = list(chain.from_iterable(zip(*parts, strict=True)))
        assert interleaved == list(range(start + t * size, start + (t + 1) * size))
