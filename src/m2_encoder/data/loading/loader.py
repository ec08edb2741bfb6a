"""A DataLoader that resumes at a position.

Samples have positions, counted over all ranks from 0. Batch t of rank r of R holds the positions t*B + r,
t*B + r + R, ... (B: global batch size). The sample at a position depends on neither ranks nor workers
(`m2_encoder.data.order.plan`), so one integer resumes a run. Lightning keeps rank 0's `state_dict` only.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.sharedctypes import RawValue
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from m2_encoder.data.loading.faults import SampleFault
from m2_encoder.data.loading.stages import STAGES, TOKENISING, StageBoard, StageClock
from m2_encoder.data.loading.stream import Delivery
from m2_encoder.data.loading.watchdog import POLL_S, watch
from m2_encoder.data.order.manifest_record import describe_difference, describe_rewritten, read_record
from m2_encoder.data.order.plan import Segment, SegmentSource
from m2_encoder.data.worker_pool import STALL_TIMEOUT_S
from m2_encoder.errors import UserError
from m2_encoder.types import ImageTextBatch

logger = logging.getLogger(__name__)

SOURCE_PREFIX = "source "
"""Begins the keys of a fingerprint that describe the mixture; a new segment may change these."""

_LAST_STEP_S = 600  # that workers live on after SIGTERM, for the trainer to end its step and to save


class PositionDataset(Protocol):
    """Samples by position."""

    clock: StageClock

    def deliver(self, positions: Sequence[int]) -> Iterator[Delivery]:
        """The samples in their order, each with what was unusable before it."""
        ...


class Batch(NamedTuple):
    """A batch from a worker."""

    batch: ImageTextBatch  # to train on
    faults: tuple[SampleFault, ...]  # what was unusable
    seconds: dict[str, float]  # in each of `STAGES`


class PositionLoader:
    """Batches of one rank, from a position on, until the run's last step.

    Its length is that of a whole epoch, also after a resume: Lightning counts batches from the epoch's start. A new
    iterator goes on where the last one stopped. It draws nothing from torch's global generator, whose state a resumed
    run therefore has as an uninterrupted one does.

    Args:
        build_dataset: makes the dataset from (earlier segments, first position of this segment).
        collate: makes a batch of samples.
        num_steps: steps of the whole run.
        epoch_steps: steps of an epoch; None for those of the run.
        repeat_steps: give the samples of the first so many steps again and again; None for all of them.
        keeps_workers: a new iterator goes on with the workers of the last one, until `close`.
        global_batch_size: samples of a step over all ranks.
        rank: of this process.
        world_size: number of processes.
        num_workers: worker processes; 0 loads in this one.
        pin_memory: copy batches to page-locked memory, for transfers to an accelerator.
        fingerprint: what the order depends on; a saved state of another order is refused.
        segment: sources of this run's mixture; empty if the mixture never changes.
        record: of `Manifest.record`, to describe later what changed.
        new_segment: whether a state of another mixture may go on with this one; None if the user cannot choose.
        on_faults: called for every batch with its unusable samples and the number of usable ones.
        stall_timeout_s: time without progress after which waiting for a batch is an error.
    """

    def __init__(
        self,
        build_dataset: Callable[[Sequence[Segment], int], PositionDataset],
        *,
        collate: Callable[[list[Any]], ImageTextBatch],
        num_steps: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        num_workers: int,
        pin_memory: bool,
        fingerprint: Mapping[str, Any],
        epoch_steps: int | None = None,
        repeat_steps: int | None = None,
        keeps_workers: bool = False,
        segment: Sequence[SegmentSource] = (),
        record: Tensor | None = None,
        new_segment: bool | None = None,
        on_faults: Callable[[Sequence[SampleFault], int], None] | None = None,
        stall_timeout_s: float = STALL_TIMEOUT_S,
    ) -> None:
        self._build_dataset = build_dataset
        self._collate = collate
        self._num_steps = num_steps
        self._epoch_steps, self._repeat_steps = epoch_steps or num_steps, repeat_steps
        self._keeps_workers = keeps_workers
        self._running: Iterator[ImageTextBatch] | None = None
        self._global_batch_size = global_batch_size
        self._rank, self._world_size = rank, world_size
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._fingerprint = dict(fingerprint)
        self._record = record
        self._new_segment = new_segment
        self._on_faults = on_faults
        self._stall_timeout_s = stall_timeout_s
        self._position = 0
        self._history: tuple[Segment, ...] = ()
        self._segment = Segment(0, tuple(segment))
        self._dataset: PositionDataset | None = None
        self._seconds = dict.fromkeys(STAGES, 0.0)

    def __len__(self) -> int:
        return self._epoch_steps

    def __iter__(self) -> Iterator[ImageTextBatch]:
        """Batches from the current place on, to the end of the run.

        Raises:
            UserError: for too many unusable samples; if loading stalls; or if all steps were given already: a trainer
                that needs more would otherwise run empty epochs for ever.
        """
        if not self._keeps_workers:
            yield from self._run()
            return
        if self._running is None:
            self._running = self._run()
        for batch in self._running:  # noqa: UP028 - `yield from` would end it with this iterator
            yield batch
        self._running = None

    def close(self) -> None:
        """End the workers."""
        if isinstance(self._running, Generator):
            self._running.close()
        self._running = None

    def _run(self) -> Iterator[ImageTextBatch]:
        if self._position >= self._stop:
            raise UserError(
                f"all {self._num_steps} steps of the data module were trained, and the trainer wants more; give both "
                "the same max_steps, and trainer.accumulate_grad_batches=1"
            )
        board = StageBoard(self._num_workers)
        loader = self._build(board)
        batches = loader.dataset
        assert isinstance(batches, _Batches), "made by _build"
        with batches.needed():
            for loaded in watch(loader, board, workers=self._num_workers, timeout_s=self._stall_timeout_s):
                if isinstance(loaded, UserError):
                    raise loaded
                # The place moves when the batch is handed over, so what workers prefetch is not counted as seen.
                self._position += self._global_batch_size
                for stage, seconds in loaded.seconds.items():
                    self._seconds[stage] += seconds
                if self._on_faults is not None:
                    self._on_faults(loaded.faults, len(loaded.batch.keys))
                yield loaded.batch

    def take_stage_seconds(self) -> dict[str, float]:
        """Seconds that workers spent in each of `STAGES` for the batches handed over since the last call."""
        taken, self._seconds = self._seconds, dict.fromkeys(STAGES, 0.0)
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Position of the next sample, over all ranks, and what the order depends on."""
        state: dict[str, Any] = {"position": self._position, "fingerprint": dict(self._fingerprint)}
        if self._segment.sources:
            state["segments"] = [
                {"start": start, "sources": [list(source) for source in sources]}
                for start, sources in (*self._history, self._segment)
            ]
        if self._record is not None:
            state["manifest"] = self._record
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved position.

        Raises:
            UserError: if the saved order is another one, with the difference, or the place is outside of this run.
        """
        position = state["position"]
        is_new = self._compare(state)
        if not isinstance(position, int) or position % self._global_batch_size or not 0 <= position <= self._stop:
            raise UserError(
                f"the checkpoint stands at position {position!r}, which must be a multiple of the global batch size "
                f"{self._global_batch_size} in 0..{self._stop} ({self._num_steps} steps)"
            )
        self.close()
        self._position = position
        segments = [
            Segment(entry["start"], tuple(SegmentSource(*source) for source in entry["sources"]))
            for entry in state.get("segments", ())
        ]
        if is_new:
            self._history, self._segment = tuple(segments), self._segment._replace(start=position)
            if self._rank == 0:
                logger.warning("a new segment begins at position %d: %s", position, "; ".join(self._describe(state)))
        elif segments:
            self._history, self._segment = tuple(segments[:-1]), segments[-1]
        self._dataset = None

    def _compare(self, state: Mapping[str, Any]) -> bool:
        """Whether a saved state needs a new segment; refuses one that cannot be continued."""
        saved = state["fingerprint"]
        changed = [key for key in sorted({*saved, *self._fingerprint}) if saved.get(key) != self._fingerprint.get(key)]
        mixture = [key for key in changed if key.startswith(SOURCE_PREFIX)]
        lines = [
            f"{key}: {saved.get(key)!r} then, {self._fingerprint.get(key)!r} now"
            for key in changed
            if key not in mixture
        ]
        if lines:
            raise UserError(
                f"the checkpoint was trained on another order of data ({'; '.join(lines)}); "
                "give these settings their old values, or start a new run with another run.name"
            )
        if not mixture and self._rank == 0 and self._record is not None and "manifest" in state:
            describe_rewritten(read_record(state["manifest"]), read_record(self._record), say=logger.warning)
        if mixture and not self._new_segment:
            fix = "bring the old one back, or start a new run with another run.name"
            if self._new_segment is not None:
                fix += (
                    ", or go on with the new one by data.new_segment=true: sources with the same shards continue where "
                    "they were"
                )
            lines = self._describe(state)
            raise UserError(f"the checkpoint was trained on another mixture of data ({'; '.join(lines)}); {fix}")
        return bool(mixture)

    def _describe(self, state: Mapping[str, Any]) -> list[str]:
        """How the mixture differs from a saved one, a line for each thing."""
        if "manifest" in state and self._record is not None:
            return describe_difference(read_record(state["manifest"]), read_record(self._record))
        saved, now = state["fingerprint"], self._fingerprint
        changed = [key for key in sorted({*saved, *now}) if saved.get(key) != now.get(key)]
        return [
            f"{key}: {saved.get(key)!r} then, {now.get(key)!r} now" for key in changed if key.startswith(SOURCE_PREFIX)
        ]

    @property
    def _stop(self) -> int:
        return self._num_steps * self._global_batch_size

    def _build(self, board: StageBoard) -> DataLoader[Any]:
        positions = rank_positions(
            start=self._position,
            stop=self._stop,
            global_batch_size=self._global_batch_size,
            rank=self._rank,
            world_size=self._world_size,
            repeat_steps=self._repeat_steps,
        )
        if self._dataset is None:
            self._dataset = self._build_dataset(self._history, self._segment.start)
        if self._num_workers == 0:
            self._dataset.clock = StageClock(board, 0)
        return DataLoader(
            _Batches(self._dataset, self._collate, board),
            sampler=positions,  # one by one as needed: those of a long run would fill gigabytes
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self._num_workers,
            pin_memory=self._pin_memory,
            worker_init_fn=_prepare_worker,
            timeout=min(POLL_S, self._stall_timeout_s) if self._num_workers else 0,
            generator=torch.Generator(),
        )


def rank_positions(
    *, start: int, stop: int, global_batch_size: int, rank: int, world_size: int, repeat_steps: int | None = None
) -> Iterator[list[int]]:
    """Positions of one rank's batches between two positions; with `repeat_steps` only those of so many first steps."""
    for place in range(start, stop, global_batch_size):
        first = place % (repeat_steps * global_batch_size) if repeat_steps else place
        yield list(range(first + rank, first + global_batch_size, world_size))


class _Batches(Dataset[Any]):
    """Whole batches by their positions. A user error is returned: workers wrap what they raise in a traceback."""

    def __init__(
        self, dataset: PositionDataset, collate: Callable[[list[Any]], ImageTextBatch], board: StageBoard
    ) -> None:
        self.dataset = dataset
        self.board = board
        self._collate = collate
        self._is_needed = RawValue("b", True)  # shared with the workers

    def __getitem__(self, positions: list[int]) -> Batch | UserError:
        try:
            deliveries = list(self.dataset.deliver(positions))
            self.dataset.clock.enter(TOKENISING)
            batch = self._collate([delivery.sample for delivery in deliveries])
        except UserError as error:
            return error
        faults = tuple(fault for delivery in deliveries for fault in delivery.faults)
        return Batch(batch, faults, self.dataset.clock.take())

    @contextmanager
    def needed(self) -> Iterator[None]:
        """While inside, workers survive SIGTERM, which all processes of a run get, so that the trainer can save."""
        atexit.register(self._end)  # before multiprocessing ends the workers and waits for that
        try:
            yield
        finally:
            self._end()
            atexit.unregister(self._end)

    def heed_signals(self) -> None:
        """In a worker: handle SIGTERM when it is needed no more, or a while later.

        Ctrl-C and a closed terminal are left to the trainer.
        """
        signal.set_wakeup_fd(-1)  # that of the trainer, which hears signals of its own by it
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._on_signal)

    def _end(self) -> None:
        self._is_needed.value = False

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._is_needed.value:
            signal.alarm(_LAST_STEP_S)  # nothing handles that, so it ends the process
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _as_it_is(batch: Any) -> Any:
    return batch


def _prepare_worker(worker: int) -> None:
    torch.set_num_threads(1)
    info = get_worker_info()
    assert info is not None, "called in a worker"
    batches = info.dataset
    assert isinstance(batches, _Batches)
    batches.heed_signals()
    batches.dataset.clock = StageClock(batches.board, worker)
