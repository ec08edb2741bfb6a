"""The order of training samples over many shards: a pure function of (seed, position).

    position p -> lane = p mod L, j = p div L              positions of one of the L lanes share shards
    mixture    -> block j div 1000: whole quotas per source, shuffled by (seed, segment, lane, block)
    source     -> n, how many of its samples the lane had before; (n*L + lane) div (samples of the source) is the epoch,
                  and n without those of earlier epochs is the offset in the lane's part of it
    sample     -> shards are shuffled anew in every epoch, cut into lanes and windows, each window is shuffled
    batch t of rank r of R holds the positions t*B + r, t*B + r + R, ...

Neighbours of a lane come from the few shards of a window, and where the number of ranks divides L, a rank reads only
its own lanes; so few files are open, and a machine fetches few remote shards. The order depends on neither ranks nor
workers. Memory grows with the number of shards, not of samples.

Letters: L lanes · B global batch size · R ranks
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from m2_encoder.data.order.keyed_random import KeyedPermutation, mix
from m2_encoder.data.order.manifest import Manifest, Source
from m2_encoder.data.order.mixture import BLOCK, Mixture
from m2_encoder.errors import UserError

_BLOCK_STREAM, _SHARD_STREAM, _WINDOW_STREAM, _SPARE_STREAM = 1, 2, 3, 4
_NEAR_ATTEMPTS, _LANE_ATTEMPTS = 4, 8  # replacements from the same window, then from the same lane, then from anywhere
_EPOCHS_KEPT = 2  # lanes go from one epoch to the next one after the other


class SegmentSource(NamedTuple):
    """A source in a segment."""

    name: str  # of the source
    digest: str  # of its content; equal ones go on where they were
    weight: float  # share in the mixture


class Segment(NamedTuple):
    """A part of a run with one mixture."""

    start: int  # its first position
    sources: tuple[SegmentSource, ...]  # of its mixture


class Place(NamedTuple):
    """Which sample stands at a position."""

    source: int  # index of the source in the manifest
    epoch: int  # how often the lane went through its part of the source before
    shard: int  # index of the shard in the source
    number: int  # index of the sample in the shard


class Stretch(NamedTuple):
    """A window: what a lane reads of a source for a while."""

    source: int  # index of the source in the manifest
    lane: int  # of the plan
    epoch: int  # of the lane in the source
    window: int  # index of the window in the lane's epoch


class PositionPlan:
    """Place of the sample at every position.

    Args:
        manifest: of the last segment.
        seed: of all shuffles; 0 or more.
        lanes: L; a power of two keeps the lanes of ranks apart.
        window: samples that are shuffled together; at least those of a few shards.
        history: earlier segments, oldest first.
        start: first position of the last segment.

    Attributes:
        segments: all, the manifest's last.

    Raises:
        UserError: for values out of range, or a source with fewer samples than lanes.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        seed: int,
        lanes: int,
        window: int,
        history: Sequence[Segment] = (),
        start: int = 0,
    ) -> None:
        for name, value, least in (("seed", seed, 0), ("data.lanes", lanes, 1), ("data.window", window, 1)):
            if value < least:
                raise UserError(f"{name}={value!r} must be {least} or more")
        small = [f"{s.name} has {s.samples}" for s in manifest.sources if s.samples < lanes]
        if small:
            raise UserError(
                f"data.lanes={lanes} exceeds the samples of a source ({', '.join(small)}); "
                f"for example data.lanes={_power_below(min(s.samples for s in manifest.sources))}"
            )
        self.manifest = manifest
        self.seed, self.lanes, self.window = seed, lanes, window
        own = tuple(
            SegmentSource(source.name, source.digest(), weight)
            for source, weight in zip(manifest.sources, manifest.weights, strict=True)
        )
        self.segments = (*history, Segment(start, own))
        self._layouts = [_Layout(source, number=i, plan=self) for i, source in enumerate(manifest.sources)]
        self._mixture = Mixture(manifest.weights)
        self._blocks: OrderedDict[tuple[int, int], tuple[list[int], list[int]]] = OrderedDict()
        self._base: dict[int, list[int]] = {}

    def locate(self, position: int, *, attempt: int = 0) -> Place:
        """Which sample stands at a position of the last segment.

        Attempts 1, 2, ... give the replacements of an unusable sample: of the same source, first from the same window,
        then the same lane, at last from anywhere.
        """
        lane, source, ordinal = self._draw(position)
        return self._layouts[source].locate(lane, ordinal, spare=(position, attempt))

    def stretch(self, position: int) -> Stretch:
        """The window that the sample of a position belongs to."""
        lane, source, ordinal = self._draw(position)
        return self._layouts[source].stretch(lane, ordinal)

    def following(self, stretch: Stretch) -> Stretch:
        """The window that the lane reads after this one from the same source."""
        return self._layouts[stretch.source].following(stretch)

    def shards(self, stretch: Stretch) -> list[int]:
        """Indices of the shards that a window reads, in the order of the epoch."""
        return self._layouts[stretch.source].shards(stretch)

    def counts(self, stop: int) -> npt.NDArray[np.int64]:
        """Samples of each source that each lane had before a position, over all segments, (lanes, sources)."""
        rows = [
            np.array(self._start(lane)) + self._consumed(lane, self._steps(stop, lane)) for lane in range(self.lanes)
        ]
        return np.stack(rows)

    def check_repeats(self, stop: int) -> None:
        """Check `max_epochs` of all sources.

        Raises:
            UserError: if the run to position `stop` needs more.
        """
        counts = self.counts(stop)
        last = (counts - 1) * self.lanes + np.arange(self.lanes)[:, None]  # that a lane draws, as its source counts
        for number, source in enumerate(self.manifest.sources):
            limit = source.spec.max_epochs
            if limit is not None and int(last[:, number].max()) >= limit * source.samples:
                raise UserError(
                    f"data.sources.{source.name}: the run draws {int(counts[:, number].sum())} samples of its "
                    f"{source.samples}, more than max_epochs={limit} allow; give it less weight, train fewer steps, "
                    "or allow more epochs"
                )

    def _draw(self, position: int) -> tuple[int, int, int]:
        """Lane, source, and how many samples of the source the lane had before."""
        step = self._steps(position, lane := position % self.lanes)
        assert step >= 0, f"position {position} lies before the segment, {self.segments[-1].start}"
        if len(self._layouts) == 1:
            return lane, 0, self._start(lane)[0] + step
        block, place = divmod(step, BLOCK)
        sources, ordinals = self._block(lane, block)
        source = sources[place]
        return lane, source, self._start(lane)[source] + ordinals[place]

    def _steps(self, position: int, lane: int) -> int:
        """Positions of a lane between the start of the last segment and a position."""
        return _count(position, lane, self.lanes) - _count(self.segments[-1].start, lane, self.lanes)

    def _block(self, lane: int, block: int) -> tuple[list[int], list[int]]:
        """By place in the block: the source, and how many of its samples the lane had before in the segment."""
        found = self._blocks.get((lane, block))
        if found is None:
            key = (self.seed, _BLOCK_STREAM, self.segments[-1].start, lane, block)
            found = _shuffle_block(self._mixture, block, mix(*key))
            self._blocks[lane, block] = found
            while len(self._blocks) > 2 * self.lanes:
                self._blocks.popitem(last=False)
        return found

    def _consumed(self, lane: int, steps: int) -> npt.NDArray[np.int64]:
        """Samples of each source among the first steps of a lane in the last segment."""
        block, place = divmod(steps, BLOCK)
        sources = self._block(lane, block)[0][:place]
        return self._mixture.before(block) + np.bincount(sources, minlength=len(self._layouts))

    def _start(self, lane: int) -> list[int]:
        """Samples of each source that a lane had before the last segment; 0 for those with other content since."""
        found = self._base.get(lane)
        if found is None:
            found = _carry(self.segments, lane, lanes=self.lanes, seed=self.seed)
            self._base[lane] = found
        return found


class _Layout:
    """One source: how its shards become epochs, lanes and windows."""

    def __init__(self, source: Source, *, number: int, plan: PositionPlan) -> None:
        self._counts = source.counts
        self._samples = source.samples
        self._number = number
        self._seed, self._lanes, self._window = plan.seed, plan.lanes, plan.window
        self._name = mix(*source.name.encode())
        self._windows: dict[int, tuple[int, tuple[int, int, KeyedPermutation]]] = {}
        self._epochs: OrderedDict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = OrderedDict()

    def locate(self, lane: int, ordinal: int, *, spare: tuple[int, int]) -> Place:
        epoch, offset = self._offset(lane, ordinal)
        first, length = self._part(lane, epoch)
        position, attempt = spare
        low, high, shuffle = self._open_window(lane, epoch, offset, length)
        if attempt == 0:
            place = first + low + shuffle(offset - low)
        else:
            number = mix(self._seed, _SPARE_STREAM, position, attempt)
            if attempt <= _NEAR_ATTEMPTS:
                place = first + low + number % (high - low)
            elif attempt <= _LANE_ATTEMPTS:
                place = first + number % length
            else:
                place = number % self._samples
        order, starts = self._epoch(epoch)
        shard = int(starts.searchsorted(place, "right")) - 1
        return Place(self._number, epoch, int(order[shard]), place - int(starts[shard]))

    def _open_window(self, lane: int, epoch: int, offset: int, length: int) -> tuple[int, int, KeyedPermutation]:
        """First offset of a lane's window, the one after its last, and its shuffle; kept for the next call."""
        found = self._windows.get(lane)
        if found is None or found[0] != epoch or not found[1][0] <= offset < found[1][1]:
            _, low, high = self._window_of(offset, length)
            key = mix(self._seed, _WINDOW_STREAM, self._name, epoch, lane, low)
            found = epoch, (low, high, KeyedPermutation(high - low, key))
            self._windows[lane] = found
        return found[1]

    def stretch(self, lane: int, ordinal: int) -> Stretch:
        epoch, offset = self._offset(lane, ordinal)
        return Stretch(self._number, lane, epoch, self._window_of(offset, self._part(lane, epoch)[1])[0])

    def following(self, stretch: Stretch) -> Stretch:
        if stretch.window + 1 < self._num_windows(self._part(stretch.lane, stretch.epoch)[1]):
            return stretch._replace(window=stretch.window + 1)
        return stretch._replace(epoch=stretch.epoch + 1, window=0)

    def shards(self, stretch: Stretch) -> list[int]:
        first, length = self._part(stretch.lane, stretch.epoch)
        windows = self._num_windows(length)
        low, high = (first + (stretch.window + end) * length // windows for end in (0, 1))
        order, starts = self._epoch(stretch.epoch)
        begin, end = int(starts.searchsorted(low, "right")) - 1, int(starts.searchsorted(high - 1, "right"))
        return order[begin:end].tolist()

    def _offset(self, lane: int, ordinal: int) -> tuple[int, int]:
        """The epoch in which a lane comes to so many samples before, and how many of them it had in that epoch."""
        epoch = (ordinal * self._lanes + lane) // self._samples
        return epoch, ordinal - _count(epoch * self._samples, lane, self._lanes)

    def _part(self, lane: int, epoch: int) -> tuple[int, int]:
        """First sample and number of samples of a lane in an epoch: lanes end it together, also where one has more."""
        begin, end = epoch * self._samples, (epoch + 1) * self._samples
        lanes = self._lanes
        lower = [place // lanes * lane + min(place % lanes, lane) for place in (begin, end)]  # of all lanes before it
        return lower[1] - lower[0], _count(end, lane, lanes) - _count(begin, lane, lanes)

    def _num_windows(self, length: int) -> int:
        return max(1, (length + self._window // 2) // self._window)

    def _window_of(self, offset: int, length: int) -> tuple[int, int, int]:
        """Index of the window that holds an offset of a lane, its first offset, and the one after its last."""
        windows = self._num_windows(length)
        number = ((offset + 1) * windows - 1) // length
        return number, number * length // windows, (number + 1) * length // windows

    def _epoch(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Shards in the order of an epoch, and the number of samples before each."""
        found = self._epochs.get(epoch)
        if found is None:
            key = mix(self._seed, _SHARD_STREAM, self._name, epoch)
            order = KeyedPermutation(len(self._counts), key).table()
            counts = self._counts[order]
            found = order, np.cumsum(counts) - counts
            self._epochs[epoch] = found
            while len(self._epochs) > _EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return found


def _count(position: int, lane: int, lanes: int) -> int:
    """Positions of a lane before a position."""
    return (position - lane + lanes - 1) // lanes


def _shuffle_block(mixture: Mixture, block: int, key: int) -> tuple[list[int], list[int]]:
    """By place in a block: the source, and how many of its samples there were before since the first block."""
    quotas, before = mixture.quotas(block), mixture.before(block)
    sources = np.repeat(np.arange(len(quotas)), quotas)[KeyedPermutation(BLOCK, key).table()]
    ordinals = np.empty(BLOCK, np.int64)
    ordinals[np.argsort(sources, kind="stable")] = np.concatenate(
        [np.arange(first, first + quota) for first, quota in zip(before, quotas, strict=True)]
    )
    return sources.tolist(), ordinals.tolist()


def _carry(segments: Sequence[Segment], lane: int, *, lanes: int, seed: int) -> list[int]:
    """Samples of each source of the last segment that a lane had before it, of the same content."""
    had: dict[tuple[str, str], int] = {}
    for segment, following in pairwise(segments):
        mixture = Mixture([source.weight for source in segment.sources])
        start = _count(segment.start, lane, lanes)
        block, place = divmod(_count(following.start, lane, lanes) - start, BLOCK)
        key = mix(seed, _BLOCK_STREAM, segment.start, lane, block)
        sources = _shuffle_block(mixture, block, key)[0][:place]
        counts = mixture.before(block) + np.bincount(sources, minlength=len(segment.sources))
        for source, count in zip(segment.sources, counts, strict=True):
            had[source[:2]] = had.get(source[:2], 0) + int(count)
    return [had.get(source[:2], 0) for source in segments[-1].sources]


def _power_below(value: int) -> int:
    return 1 << (max(1, value).bit_length() - 1)
