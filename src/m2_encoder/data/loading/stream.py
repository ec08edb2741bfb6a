"""From positions to training samples: read, decode, augment, and replace what cannot be used.

Everything about a sample is a pure function of (seed, position): which one it is, its caption, its augmentation, and,
if it is unusable, which one stands in for it. So batches are full, and the same for any number of ranks and workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from m2_encoder.data.loading.faults import SHARD_REASONS, SampleFault
from m2_encoder.data.loading.pixel_rows import PixelRows
from m2_encoder.data.loading.stages import DECODING, READING, TRANSFORMING, StageClock
from m2_encoder.data.order.plan import Place, PositionPlan, Stretch
from m2_encoder.data.samples.captions import Caption, CaptionSampler
from m2_encoder.data.samples.parse import SampleProblem, SampleText, name_content, parse_sample_text
from m2_encoder.data.shards.paths import is_remote
from m2_encoder.data.shards.reader import ShardReader
from m2_encoder.errors import ImageError, UserError
from m2_encoder.types import LANGUAGES

MAX_IN_A_ROW = 32
"""Unusable samples in a row, for one position, after which the run ends."""

_READ_AHEAD = 32  # samples whose files are in memory before they are decoded
_SAMPLE_STREAM = 1
_PLAIN_ROLE = "original"  # of a caption that says nothing about itself


class ImageTransform(Protocol):
    """Makes the pixels of a step."""

    def __call__(self, source: Any, *, rng: np.random.Generator) -> Tensor:
        """Augment a decoded image to (3, S, S) uint8, drawing from `rng` alone."""
        ...


class TrainingSample(NamedTuple):
    """A decoded, augmented sample with its drawn captions.

    Attributes:
        image: (3, S, S) uint8.
        captions: one, or one per language.
        key: as in the tar.
        source: name of the source.
        identity: equal numbers mark the same content.
        draw: which draw from the data it is: (seed, position, attempt). Whatever else is random about it is keyed by
            that.
    """

    image: Tensor
    captions: tuple[Caption, ...]
    key: str
    source: str
    identity: int
    draw: tuple[int, ...]


class Delivery(NamedTuple):
    """What a position gives.

    Attributes:
        sample: to train on.
        faults: what was unusable before it, in order; usually nothing.
    """

    sample: Any
    faults: tuple[SampleFault, ...] = ()


class _Opened(NamedTuple):
    """A sample before anything is drawn for it; `captions` as `CaptionSampler` takes them."""

    key: str
    image: Any
    is_decoded: bool
    captions: dict[str, dict[str, list[str]]]
    identity: int


@dataclass(eq=False)
class _Draft:
    """What is known of the sample of a position before it is decoded; of the attempt that is usable so far."""

    position: int
    attempt: int = -1
    faults: list[SampleFault] = field(default_factory=list)
    place: Place = field(init=False)
    opened: _Opened = field(init=False)
    rng: np.random.Generator = field(init=False)
    captions: tuple[Caption, ...] = field(init=False)


class SampleStream(Dataset[Delivery]):
    """Training samples by position.

    Args:
        plan: which sample stands at a position.
        reader: reads their files.
        captions: draws the captions of a step.
        decode: makes of an image file what `transform` takes; raises `ImageError` or `SampleProblem` for one that
            cannot be used.
        transform: augments an image.
        keep_decoded: decode each image once and keep it; for small sources (emoji: 50 MB per process).

    Attributes:
        clock: says what is done, and measures it; a worker sets its own.
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
    ) -> None:
        self._plan = plan
        self._reader = reader
        self._captions = captions
        self._decode = decode
        self._transform = transform
        self._kept: dict[tuple[int, int, int], _Opened] | None = {} if keep_decoded else None
        self._is_remote = any(is_remote(shard) for source in plan.manifest.sources for shard in source.shards)
        self._announced: dict[tuple[int, int], Stretch] = {}
        self.clock = StageClock()

    def __getitem__(self, position: int) -> Delivery:
        """The sample that stands at a position; see `deliver`."""
        return next(self.deliver([position]))

    def deliver(self, positions: Sequence[int]) -> Iterator[Delivery]:
        """The samples that stand at some positions, or their first usable replacements.

        Reading and drawing are done for several samples in a row before any of them is decoded: decoding drives all
        that out of the processor's caches, which makes it several times as slow when the two take turns.

        Args:
            positions: of one batch; the images lie one behind the other in memory.

        Raises:
            UserError: if `MAX_IN_A_ROW` replacements of one are unusable, too; with what is wrong with them.
        """
        rows = PixelRows(len(positions))
        for first in range(0, len(positions), _READ_AHEAD):
            drafts = [self._draft(position) for position in positions[first : first + _READ_AHEAD]]
            drafts.reverse()
            while drafts:
                draft = drafts.pop()  # lets its image file go
                image = rows.keep(self._make_pixels(draft))
                opened = draft.opened
                name = self._plan.manifest.sources[draft.place.source].name
                sample = TrainingSample(
                    image,
                    draft.captions,
                    opened.key,
                    name,
                    opened.identity,
                    (self._plan.seed, draft.position, draft.attempt),
                )
                yield Delivery(sample, tuple(draft.faults))

    def _draft(self, position: int) -> _Draft:
        """Everything about a sample but its pixels."""
        if self._is_remote:
            self._announce(position)
        draft = _Draft(position)
        self._redraft(draft)
        return draft

    def _redraft(self, draft: _Draft) -> None:
        """Go on to the next attempt whose sample can be read and says something."""
        while draft.attempt + 1 < MAX_IN_A_ROW:
            draft.attempt += 1
            draft.place = self._plan.locate(draft.position, attempt=draft.attempt)
            try:
                draft.opened = self._open(draft.place)
                attempt = (draft.attempt,) if draft.attempt else ()
                draft.rng = np.random.default_rng((self._plan.seed, _SAMPLE_STREAM, draft.position, *attempt))
                draft.captions = self._draw_captions(draft)
            except SampleProblem as problem:
                draft.faults.append(self._name(draft.place, problem))
            else:
                return
        first = "; ".join(dict.fromkeys(fault.describe() for fault in draft.faults[:3]))
        raise UserError(f"{first}: {MAX_IN_A_ROW} samples in a row are unusable; mend the shards of this source")

    def _draw_captions(self, draft: _Draft) -> tuple[Caption, ...]:
        try:
            return self._captions(draft.opened.captions, rng=draft.rng)
        except UserError as error:
            raise SampleProblem("wrong_type", str(error)) from error

    def _make_pixels(self, draft: _Draft) -> Tensor:
        """Decoded and augmented; where that fails, the draft becomes that of the next attempt."""
        while True:
            try:
                image = self._decoded(draft)
                self.clock.enter(TRANSFORMING, draft.opened.key)
                return self._transform(image, rng=draft.rng)
            except (SampleProblem, ImageError) as problem:  # noqa: PERF203 - next to decoding it costs nothing
                draft.faults.append(self._name(draft.place, problem))
                self._redraft(draft)

    def _decoded(self, draft: _Draft) -> Any:
        opened, place = draft.opened, draft.place
        if opened.is_decoded:
            return opened.image
        self.clock.enter(DECODING, f"{opened.key} of {self._plan.manifest.sources[place.source].shards[place.shard]}")
        image = self._decode(opened.image)
        if self._kept is not None:
            self._kept[place.source, place.shard, place.number] = opened._replace(image=image, is_decoded=True)
        return image

    def _open(self, place: Place) -> _Opened:
        where = (place.source, place.shard, place.number)
        if self._kept is not None and where in self._kept:
            return self._kept[where]
        source = self._plan.manifest.sources[place.source]
        shard = source.shards[place.shard]
        self.clock.enter(READING, shard)
        size, written = int(source.sizes[place.shard]), int(source.written[place.shard])
        raw = self._reader.read(shard, place.number, size=size, written=written)
        language = source.spec.languages[0] if len(source.spec.languages) == 1 else None
        text = parse_sample_text(raw.json, raw.text, language=language)
        captions = self._sort_captions(text)
        content = name_content(text, key=raw.key, shard=str(place.shard), source=source.name)
        return _Opened(raw.key, raw.image, False, captions, content_identity(content))

    def _sort_captions(self, text: SampleText) -> dict[str, dict[str, list[str]]]:
        captions: dict[str, list[str]] = {language: [] for language in LANGUAGES}
        roles: dict[str, list[str]] = {language: [] for language in LANGUAGES}
        for caption in text.captions:
            captions[caption.language].append(caption.text)
            roles[caption.language].append(caption.role or _PLAIN_ROLE)
        if not any(captions[language] for language in self._captions.languages):
            raise SampleProblem("missing_caption", f"no caption in {' or '.join(self._captions.languages)}")
        return {"captions": captions, "caption_roles": roles}

    def _name(self, place: Place, problem: SampleProblem | ImageError) -> SampleFault:
        source = self._plan.manifest.sources[place.source]
        shard = source.shards[place.shard]
        reason = problem.reason if isinstance(problem, SampleProblem) else "undecodable_image"
        detail = problem.detail if isinstance(problem, SampleProblem) else " ".join(str(problem).split())
        key = None if reason in SHARD_REASONS else self._reader.key(shard, place.number)
        return SampleFault(source.name, shard, key, reason, detail)

    def _announce(self, position: int) -> None:
        """When a lane opens a window, have the shards of the next one fetched."""
        stretch = self._plan.stretch(position)
        if self._announced.get((stretch.source, stretch.lane)) == stretch:
            return
        self._announced[stretch.source, stretch.lane] = stretch
        source = self._plan.manifest.sources[stretch.source]
        following = self._plan.following(stretch)
        wanted = [number for each in (stretch, following) for number in self._plan.shards(each)]
        self._reader.prefetch([(source.shards[number], int(source.sizes[number])) for number in wanted])


def content_identity(content: str) -> int:
    """A number for what a sample shows, 0..2^63 - 1: equal for equal names, and practically never otherwise.

    32 bits would make strangers positives of each other in every eighth batch of 32,768.
    """
    return int.from_bytes(hashlib.blake2b(content.encode("utf-8", "replace"), digest_size=8).digest(), "big") >> 1


def list_index_faults(plan: PositionPlan, reader: ShardReader) -> Iterator[SampleFault]:
    """What headers tell to be unusable; such samples are no part of the plan. Sound shards are not opened.

    Raises:
        OSError: if a shard cannot be read.
    """
    for source in plan.manifest.sources:
        for shard in source.faulty:
            for fault in reader.faults(shard):
                yield SampleFault(source.name, shard, *fault)
