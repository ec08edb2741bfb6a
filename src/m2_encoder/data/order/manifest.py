"""Sources of a run's mixture: their shards, sizes and weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import numpy as np
import numpy.typing as npt
from torch import Tensor

from m2_encoder.bounds import Count, Many, NotNegative, Paths, Rule, check_fields
from m2_encoder.data.order.manifest_record import RecordedSource, pack_record, write_weight
from m2_encoder.data.samples.language import read_language
from m2_encoder.data.shards.index import IndexHeader
from m2_encoder.data.shards.paths import is_remote, list_shards
from m2_encoder.data.worker_pool import STALL_TIMEOUT_S, map_watched
from m2_encoder.errors import UserError, name_some
from m2_encoder.types import LANGUAGES

_COUNTING_THREADS = 16  # they wait for disks; the first scan of a tar is the only work


def _read_languages(languages: str | Sequence[str]) -> tuple[str | None, ...]:
    names = [languages] if isinstance(languages, str) else languages
    return tuple(dict.fromkeys(map(read_language, names)))


def _are_languages(languages: str | Sequence[str]) -> bool:
    return bool(languages) and set(_read_languages(languages)) <= set(LANGUAGES)


_Languages = Annotated[
    str | Sequence[str],
    Rule(_are_languages, f"some of {', '.join(LANGUAGES)}, or tags of theirs such as zh-CN", "[zh, en]"),
]


@dataclass(frozen=True)
class SourceSpec:
    """Configuration of a source.

    Attributes:
        name: in batches and metrics.
        shards: a path or url, or several; with braces, `*` and `?`, or a folder of `*.tar`.
        languages: of its captions. A caption that is not filed under a language gets the only one, or is told apart by
            its script.
        weight: relative share in the mixture; None in all sources weights them by their number of samples.
        max_samples: use only the first samples; None uses all.
        max_epochs: how often a sample may be used; None sets no limit.
    """

    name: str
    shards: Paths
    languages: _Languages = LANGUAGES
    weight: NotNegative | None = None
    max_samples: Many | None = None
    max_epochs: Count | None = None

    def __post_init__(self) -> None:
        try:
            check_fields(self)
        except UserError as error:
            raise error.under(f"data.sources.{self.name}") from error
        object.__setattr__(self, "languages", _read_languages(self.languages))


@dataclass(frozen=True, eq=False)
class Source:
    """A source whose shards are known."""

    spec: SourceSpec  # as configured
    shards: tuple[str, ...]  # paths or urls, in the order of the configuration
    counts: npt.NDArray[np.int64]  # samples to use of each shard, int64
    sizes: npt.NDArray[np.int64]  # bytes of each tar, int64
    written: npt.NDArray[np.int64]  # when each tar was last written, ns; 0 if unknown, int64
    layouts: npt.NDArray[np.int64]  # checksum of each tar's table of samples; 0 if unknown, int64
    faulty: tuple[str, ...] = ()  # shards with something unusable in them, also those that have nothing else

    @property
    def name(self) -> str:
        """As configured."""
        return self.spec.name

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        return int(self.counts.sum())

    def digest(self) -> str:
        """Hash of shard names without folders, sample counts, sizes and layouts, in order."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.blake2b(digest_size=8)
        names = "\n".join(shard.rpartition("/")[2] for shard in self.shards)
        digest.update(names.encode("utf-8", "surrogateescape"))  # a name need not be UTF-8
        digest.update(self.counts.tobytes())
        digest.update(self.sizes.tobytes())
        digest.update(self.layouts.tobytes())
        return digest.hexdigest()


class Manifest:
    """All sources of a run, sorted by name, with their weights in the mixture, not normalised.

    Raises:
        UserError: for no sources, names that come twice, an empty source, weights for some only, or none above 0.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sorted(sources, key=lambda source: source.name))
        names = [source.name for source in self.sources]
        if not names or len(set(names)) != len(names):
            raise UserError(f"data.sources={names} must be one or more sources of different names")
        empty = next((source for source in self.sources if not source.samples), None)
        if empty is not None:
            raise UserError(
                f"data.sources.{empty.name}: no usable samples in {empty.spec.shards}; m2-data check says why"
            )
        given = [source.spec.weight for source in self.sources]
        silent = [name for name, weight in zip(names, given, strict=True) if weight is None]
        if silent and len(silent) < len(names):
            raise UserError(f"data.sources: {', '.join(silent)} has no weight, others have one; give all or none")
        self.weights = [
            float(source.samples) if w is None else w for source, w in zip(self.sources, given, strict=True)
        ]
        if not any(self.weights):
            raise UserError("data.sources: all weights are 0; give one above 0")

    def fingerprint(self) -> dict[str, str]:
        """A line per source that changes whenever the order of samples would."""
        return {
            f"source {source.name}": (
                f"{source.samples} samples in {len(source.shards)} shards, weight {write_weight(weight)}, "
                f"content {source.digest()}"
            )
            for source, weight in zip(self.sources, self.weights, strict=True)
        }

    def record(self) -> Tensor:
        """All shards and weights, packed for `describe_difference` in a later run, (bytes,) uint8."""
        return pack_record(
            RecordedSource(s.name, weight, s.digest(), s.shards, (s.counts, s.sizes, s.layouts, s.written))
            for s, weight in zip(self.sources, self.weights, strict=True)
        )


def build_manifest(
    specs: Sequence[SourceSpec], *, measure: Callable[[str], IndexHeader], stall_timeout_s: float = STALL_TIMEOUT_S
) -> Manifest:
    """Find the shards of every source and count their samples by `measure`, in several threads.

    Raises:
        UserError: for shards that are not there, do not answer or come twice, and as `Manifest`.
    """
    return Manifest([_build_source(spec, measure, stall_timeout_s) for spec in specs])


def _build_source(spec: SourceSpec, measure: Callable[[str], IndexHeader], stall_timeout_s: float) -> Source:
    try:
        shards = list_shards(spec.shards)
    except UserError as error:
        raise error.under(f"data.sources.{spec.name}.shards") from error
    failed: list[str] = []

    def try_measure(shard: str) -> IndexHeader:
        try:
            return measure(shard)
        except OSError as error:
            failed.append(f"{shard} ({error.strerror or error})")
            return IndexHeader(0, 0)

    found = map_watched(
        try_measure,
        shards,
        threads=_COUNTING_THREADS,
        timeout_s=stall_timeout_s,
        describe=lambda shard: None if is_remote(shard) else shard,  # remote ones have time-outs of their own
    )
    if failed:
        some = name_some(sorted(failed))
        raise UserError(
            f"data.sources.{spec.name}: {len(failed)} of {len(shards)} shards cannot be read: {some}; "
            "bring them back or leave them out of data.sources"
        )
    return make_source(
        spec,
        shards,
        [size.samples for size in found],
        [size.size for size in found],
        written=[size.written for size in found],
        unusable=[size.unusable for size in found],
        layouts=[size.layout for size in found],
    )


def make_source(
    spec: SourceSpec,
    shards: Sequence[str],
    counts: Sequence[int],
    sizes: Sequence[int],
    *,
    written: Sequence[int] | None = None,
    unusable: Sequence[int] | None = None,
    layouts: Sequence[int] | None = None,
) -> Source:
    """Apply `max_samples`, and leave out shards without samples; the numbers are the fields of `IndexHeader`."""
    samples = np.asarray(counts, np.int64)
    before = np.cumsum(samples) - samples
    is_read = np.ones(len(samples), bool)
    if spec.max_samples is not None:
        is_read = before < spec.max_samples
        samples = np.clip(spec.max_samples - before, 0, samples)
    used = np.flatnonzero(samples)

    def take(column: Sequence[int] | None) -> npt.NDArray[np.int64]:
        return np.zeros(len(used), np.int64) if column is None else np.asarray(column, np.int64)[used]

    faulty = [] if unusable is None else np.flatnonzero(is_read & (np.asarray(unusable) > 0)).tolist()
    return Source(
        spec,
        tuple(shards[i] for i in used.tolist()),
        samples[used],
        take(sizes),
        take(written),
        take(layouts),
        tuple(shards[i] for i in faulty),
    )
