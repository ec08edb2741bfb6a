"""Training samples by position: reads, decodes and augments them, and replaces unusable ones.

Everything about a sample is a function of (seed, position): which one it is, its caption, its augmentation, its
replacement. So batches are full, and the same for any number of ranks and workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from m2_encoder.data.loading.faults import SHARD_REASONS, SampleFault
from m2_encoder.data.loading.pixel_rows import PixelRows
from m2_encoder.data.loading.stages import DECODING, READING, TRANSFORMING, StageClock
from m2_encoder.data.order.plan import Place, PositionPlan, Stretch
from m2_encoder.data.samples.captions import CaptionSampler
from m2_encoder.data.samples.parse import SampleProblem, name_content, parse_sample_text
from m2_encoder.data.samples.sample import Column, Sample
from m2_encoder.data.shards.paths import is_remote
from m2_encoder.data.shards.reader import ShardReader
from m2_encoder.errors import ImageError, UserError

MAX_IN_A_ROW = 32
"""Unusable samples in a row, for one position, after which the run ends."""

_READ_AHEAD = 32  # samples whose files are in memory before they are decoded
_SAMPLE_STREAM = 1


class ImageTransform(Protocol):
    """Augments the images of a step."""

    def __call__(self, source: Any, *, rng: np.random.Generator) -> Tensor:
        """Augment a decoded image to (3, S, S) uint8, drawing from `rng` alone."""
        ...


class Delivery(NamedTuple):
    """The sample of a position."""

    sample: Any  # to train on
    faults: tuple[SampleFault, ...] = ()  # what was unusable before it, in order; usually nothing


class SampleStream(Dataset[Delivery]):
    """Training samples by position.

    `decode` raises `ImageError` or `SampleProblem` for unusable images. `keep_decoded` decodes each image once and
    keeps it, for small sources (emoji: 50 MB per process).
    """

    def __init__(
        self,
        plan: PositionPlan,
        *,
        reader: ShardReader,
        captions: CaptionSampler,
        decode: Callable[[bytes], Any],
        transform: ImageTransform,
        keep_decoded: bool = False,
        columns: Mapping[str, Column] | None = None,
    ) -> None:
        self._plan = plan
        self._reader = reader
        self._captions = captions
        self._decode = decode
        self._transform = transform
        self._columns = dict(columns or {})
        self._kept: dict[tuple[int, int, int], Sample] | None = {} if keep_decoded else None
        self._is_remote = any(is_remote(shard) for source in plan.manifest.sources for shard in source.shards)
        self._announced: dict[tuple[int, int], Stretch] = {}
        self.clock = StageClock()

    def __getitem__(self, position: int) -> Delivery:
        """The sample that stands at a position; see `deliver`."""
        return next(self.deliver([position]))

    def deliver(self, positions: Sequence[int]) -> Iterator[Delivery]:
        """The samples at the positions of one batch, or their first usable replacements.

        Several samples are read before the first one is decoded: reading is several times as slow right after decoding
        has emptied the processor's caches. The images lie one behind the other in memory.

        Raises:
            UserError: if `MAX_IN_A_ROW` samples in a row are unusable.
        """
        rows = PixelRows(len(positions))
        for first in range(0, len(positions), _READ_AHEAD):
            drawn = [self._begin(position) for position in positions[first : first + _READ_AHEAD]]
            drawn.reverse()
            while drawn:
                yield self._finish(*drawn.pop(), rows)  # lets its image file go

    def _begin(self, position: int) -> tuple[Sample, np.random.Generator, list[SampleFault]]:
        """A sample before decoding, its generator, and what was unusable before it."""
        if self._is_remote:
            self._announce(position)
        faults: list[SampleFault] = []
        return *self._draw(position, 0, faults), faults

    def _draw(self, position: int, attempt: int, faults: list[SampleFault]) -> tuple[Sample, np.random.Generator]:
        """The first readable sample with captions, from an attempt on."""
        for number in range(attempt, MAX_IN_A_ROW):
            place = self._plan.locate(position, attempt=number)
            try:
                sample = self._open(place)
                again = (number,) if number else ()
                rng = np.random.default_rng((self._plan.seed, _SAMPLE_STREAM, position, *again))
                captions = self._captions(sample.text, rng=rng)
                sample = sample._replace(captions=captions, draw=(self._plan.seed, position, number))
                return self._read_columns(sample) if self._columns else sample, rng
            except SampleProblem as problem:
                faults.append(self._name(place, problem))
        first = "; ".join(dict.fromkeys(fault.describe() for fault in faults[:3]))
        raise UserError(f"{first}: {MAX_IN_A_ROW} samples in a row are unusable; mend the shards of this source")

    def _read_columns(self, sample: Sample) -> Sample:
        values, name = {}, ""
        try:
            for name, column in self._columns.items():
                values[name] = column.read(sample)
        except SampleProblem:
            raise
        except (LookupError, TypeError, ValueError) as error:
            raise SampleProblem("wrong_type", f"column {name}: {type(error).__name__}: {error}") from error
        return sample._replace(columns=values)

    def _finish(self, sample: Sample, rng: np.random.Generator, faults: list[SampleFault], rows: PixelRows) -> Delivery:
        """Decode and augment; where that fails, continue with the next attempt."""
        while True:
            try:
                image = self._decoded(sample)
                self.clock.enter(TRANSFORMING, sample.key)
                pixels = self._transform(image, rng=rng)
            except (SampleProblem, ImageError) as problem:  # noqa: PERF203 - next to decoding it costs nothing
                faults.append(self._name(sample.place, problem))
                _, position, attempt = sample.draw
                sample, rng = self._draw(position, attempt + 1, faults)
            else:
                return Delivery(sample._replace(image=rows.keep(pixels), is_decoded=True), tuple(faults))

    def _decoded(self, sample: Sample) -> Any:
        if sample.is_decoded:
            return sample.image
        place = sample.place
        self.clock.enter(DECODING, f"{sample.key} of {self._plan.manifest.sources[place.source].shards[place.shard]}")
        image = self._decode(sample.image)
        if self._kept is not None:
            self._kept[place.source, place.shard, place.number] = sample._replace(image=image, is_decoded=True)
        return image

    def _open(self, place: Place) -> Sample:
        if self._kept and (kept := self._kept.get((place.source, place.shard, place.number))) is not None:
            return kept._replace(place=place)
        source = self._plan.manifest.sources[place.source]
        shard = source.shards[place.shard]
        self.clock.enter(READING, shard)
        size, written = int(source.sizes[place.shard]), int(source.written[place.shard])
        raw = self._reader.read(shard, place.number, size=size, written=written)
        language = source.spec.languages[0] if len(source.spec.languages) == 1 else None
        text = parse_sample_text(raw.json, raw.text, language=language)
        content = name_content(text, key=raw.key, shard=str(place.shard), source=source.name)
        return Sample(raw.key, source.name, place, text, content_identity(content), raw.files, raw.image)

    def _name(self, place: Place, problem: SampleProblem | ImageError) -> SampleFault:
        source = self._plan.manifest.sources[place.source]
        shard = source.shards[place.shard]
        reason = problem.reason if isinstance(problem, SampleProblem) else "undecodable_image"
        detail = problem.detail if isinstance(problem, SampleProblem) else " ".join(str(problem).split())
        key = None if reason in SHARD_REASONS else self._reader.key(shard, place.number)
        return SampleFault(source.name, shard, key, reason, detail)

    def _announce(self, position: int) -> None:
        """When a lane opens a window, start downloading its shards and those of the lane's next window."""
        stretch = self._plan.stretch(position)
        if self._announced.get((stretch.source, stretch.lane)) == stretch:
            return
        self._announced[stretch.source, stretch.lane] = stretch
        source = self._plan.manifest.sources[stretch.source]
        following = self._plan.following(stretch)
        wanted = [number for each in (stretch, following) for number in self._plan.shards(each)]
        self._reader.prefetch([(source.shards[number], int(source.sizes[number])) for number in wanted])


def content_identity(content: str) -> int:
    """Hash of a sample's content name, 0..2^63 - 1; 32 bits would collide in every eighth batch of 32,768."""
    return int.from_bytes(hashlib.blake2b(content.encode("utf-8", "replace"), digest_size=8).digest(), "big") >> 1


def list_index_faults(plan: PositionPlan, reader: ShardReader) -> Iterator[SampleFault]:
    """Faults that the headers of shards show; the plan leaves such samples out. Sound shards are not opened.

    Raises:
        OSError: if a shard cannot be read.
    """
    for source in plan.manifest.sources:
        for shard in source.faulty:
            for fault in reader.faults(shard):
                yield SampleFault(source.name, shard, *fault)
