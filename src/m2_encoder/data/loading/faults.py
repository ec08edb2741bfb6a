"""Unusable samples: counted by reason, listed once in a file; too many end the run."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from m2_encoder.errors import UserError

logger = logging.getLogger(__name__)

SKIP_REASONS = (
    "truncated_shard",
    "not_a_tar",
    "empty_member",
    "missing_image",
    "missing_caption",
    "bad_json",
    "not_utf8",
    "undecodable_image",
    "too_many_pixels",
    "too_small",
    "absurd_shape",
    "duplicate_key",
    "shard_changed",
    "shard_missing",
    "remote_timeout",
    "remote_incomplete",
    "wrong_type",
)
"""Why a sample is skipped, in the words of the metrics `data/skipped/<reason>`."""

SHARD_REASONS = frozenset({"shard_changed", "shard_missing", "remote_timeout", "remote_incomplete", "not_a_tar"})
"""Reasons that concern a whole shard; it is listed once, not every sample of it."""

_LEAST_SEEN = 1000  # a share of fewer samples is not judged
_SHOWN = 5


class SampleFault(NamedTuple):
    """An unusable sample or shard."""

    source: str  # name of the source
    shard: str  # path or url
    key: str | None  # of the sample; None if the shard as a whole is meant
    reason: str  # one of `SKIP_REASONS`
    detail: str  # what was found

    def describe(self) -> str:
        """Place, reason and detail in one line."""
        place = self.shard if self.key is None else f"{self.shard}:{self.key}"
        return f"{place}: {self.reason} ({self.detail})"


class FaultLog:
    """Counts and lists unusable samples; all processes of a run may share one list.

    Args:
        path: the list, one JSON object per line; None keeps none.
        max_share: the run ends if more of the samples drawn are unusable, 0..1.
        max_samples: the run ends if more are listed, by all processes and earlier parts of the run; None sets no limit.

    Attributes:
        counts: unusable samples drawn so far by this process, by reason; a sample drawn twice counts twice.
        at_start: unusable samples known from the headers of shards, by reason.
    """

    def __init__(self, path: Path | None, *, max_share: float = 0.05, max_samples: int | None = None) -> None:
        self._path = path
        self._max_share, self._max_samples = max_share, max_samples
        self._listed: set[tuple[str, str | None]] = set()
        self._read_to = 0
        self._first: list[SampleFault] = []
        self._seen = 0
        self.counts: Counter[str] = Counter()
        self.at_start: Counter[str] = Counter()

    def list(self, faults: Iterable[SampleFault]) -> None:
        """List the faults that are not listed yet, without counting them."""
        new = {(f.shard, f.key): f for f in faults if (f.shard, f.key) not in self._listed}
        if not new:
            return
        self._first += list(new.values())[: max(0, _SHOWN - len(self._first))]
        if self._path is None:
            self._listed |= set(new)
            return
        try:
            with _locked_file(self._path) as file:
                self._read_others(file)
                lines = [json.dumps(f._asdict(), ensure_ascii=False) for k, f in new.items() if k not in self._listed]
                half = file.tell() > 0 and not _ends_line(file)  # of a process that was killed
                file.write(("\n" * half + "".join(f"{line}\n" for line in lines)).encode("utf-8", "replace"))
                file.flush()
                self._read_to = file.tell()
        except OSError as error:
            raise UserError(f"{self._path}: cannot list unusable samples: {error}") from error
        self._listed |= set(new)

    def start(self, faults: Iterable[SampleFault], *, usable: int, is_counted: bool = True) -> None:
        """Count and list the faults that are known before training, in shards with so many usable samples.

        All ranks find the same: one of them counts them in `at_start`.

        Raises:
            UserError: if there are too many.
        """
        faults = tuple(faults)
        self.list(faults)
        counts = Counter(fault.reason for fault in faults)
        if is_counted:
            self.at_start = counts
        self._check_budget(counts, usable)

    def add(self, faults: Iterable[SampleFault], *, drawn: int) -> None:
        """Count and list the faults that were met while `drawn` usable samples were drawn.

        Raises:
            UserError: if there are too many, with the counts and the first places.
        """
        faults = tuple(faults)
        self._seen += drawn
        if not faults:
            return
        self.counts.update(fault.reason for fault in faults)
        self.list(faults)
        self._check_budget(self.counts, self._seen)

    def _check_budget(self, counts: Counter[str], good: int) -> None:
        bad = sum(counts.values())
        if self._max_samples is not None and len(self._listed) > self._max_samples:
            what = (
                f"{len(self._listed)} unusable samples are listed, more than data.max_bad_samples={self._max_samples}"
            )
        elif bad > self._max_share * max(good + bad, _LEAST_SEEN):
            what = f"{bad} of {good + bad} samples are unusable, more than data.max_bad_share={self._max_share:g}"
        else:
            return
        by_reason = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
        places = "; ".join(fault.describe() for fault in self._first)
        listed = "" if self._path is None else f"; all of them: {self._path}"
        raise UserError(f"{places}: {what}: {by_reason}{listed}; mend the shards, or allow more")

    def _read_others(self, file: IO[bytes]) -> None:
        """Read entries that other processes, or this run before it was interrupted, have added since the last call."""
        file.seek(self._read_to)
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # the half line of a process that was killed
                entry = json.loads(line)
                self._listed.add((entry["shard"], entry["key"]))


def _ends_line(file: IO[bytes]) -> bool:
    file.seek(-1, 2)
    return file.read(1) == b"\n"


@contextlib.contextmanager
def _locked_file(path: Path) -> Iterator[IO[bytes]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
