"""What the samples of a source look like, and what is wrong with them: the measurements behind `m2-data check`.

A shard is inspected by itself, in any process: all its headers, and some or all of its samples. Samples are read,
their captions parsed and their images checked exactly as training does it.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from m2_encoder.data.images.limits import ImageFacts, ImageLimits, read_image_facts
from m2_encoder.data.samples.captions import check_roles
from m2_encoder.data.samples.parse import SampleProblem, SampleText, name_content, parse_sample_text
from m2_encoder.data.shards.index import IndexedSample, Member, ShardIndex, open_index
from m2_encoder.data.shards.paths import is_remote
from m2_encoder.data.shards.remote import RemoteShards
from m2_encoder.data.shards.tar_scan import scan_tar
from m2_encoder.errors import UserError
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.tokenizers.words import count_words
from m2_encoder.types import LANGUAGES

SAMPLE_ROW = np.dtype([("width", "i4"), ("height", "i4"), ("num_bytes", "i8"), ("image", "u8"), ("identity", "u8")])
"""One usable sample: size as stored, bytes of the image file, hashes of the image and of what marks its content."""

CAPTION_ROW = np.dtype(
    [("row", "i8"), ("language", "i1"), ("text", "u8"), ("characters", "i4"), ("words", "i4"), ("tokens", "i4")]
)
"""One caption: its sample's row, index into `LANGUAGES`, hash, lengths; -1 for lengths that were not counted."""

MAX_EXAMPLES = 3
"""Faults of one reason in one shard that are named; all are counted."""

_CONTEXT_LENGTH = 1 << 16  # captions are counted whole, whatever a model would cut


class InspectionOptions(NamedTuple):
    """What is looked at.

    Attributes:
        samples_per_shard: evenly spread over a shard; None takes all.
        decode: decode images, too, which finds cut ones; otherwise only their headers are read.
        num_decoded: images of a shard to decode, evenly spread; None decodes all that are read.
        limits: images outside are faults.
        language: of captions without one; None detects it by the script.
        words: count words.
        tokenizer: content of a SentencePiece file, to count tokens with; None does not.
    """

    samples_per_shard: int | None = 250
    decode: bool = True
    num_decoded: int | None = None
    limits: ImageLimits = ImageLimits()
    language: str | None = None
    words: bool = False
    tokenizer: bytes | None = None


class ShardTask(NamedTuple):
    """One shard to inspect.

    Attributes:
        path: of the tar, or its url.
        options: what is looked at.
        remote: local copies of remote shards; None refuses urls.
    """

    path: str
    options: InspectionOptions
    remote: RemoteShards | None = None


class Fault(NamedTuple):
    """Something unusable.

    Attributes:
        shard: path of the tar.
        key: of the sample; None if it concerns the shard.
        reason: one word, as in the metrics `data/skipped/<reason>`.
        detail: what was found.
    """

    shard: str
    key: str | None
    reason: str
    detail: str


class ShardInspection(NamedTuple):
    """What one shard holds.

    Attributes:
        path: of the tar, or its url.
        num_bytes: of the tar; 0 if it is not there.
        indexed: samples that are usable as far as headers tell.
        header_faults: samples that are not, by reason.
        inspected: samples that were read.
        content_faults: those of them that cannot be used, by reason.
        decoded: images that were decoded.
        damaged: those of them that cannot be.
        shard_faults: what is wrong with the shard as a whole, by reason.
        examples: some faults.
        extensions: members by extension; where a part of the samples is read, those at the start of the shard.
        json_keys: inspected samples by key of their JSON.
        formats: inspected images by kind.
        rows: usable inspected samples, `SAMPLE_ROW`.
        captions: theirs, `CAPTION_ROW`.
    """

    path: str
    num_bytes: int
    indexed: int
    header_faults: Counter[str]
    inspected: int
    content_faults: Counter[str]
    decoded: int
    damaged: int
    shard_faults: Counter[str]
    examples: tuple[Fault, ...]
    extensions: Counter[str]
    json_keys: Counter[str]
    formats: Counter[str]
    rows: npt.NDArray[np.void]
    captions: npt.NDArray[np.void]


def inspect_shard(task: ShardTask) -> ShardInspection:
    """Look at one shard; whatever is in it, or if it is not there, becomes a fault."""
    faults = _Faults(task.path)
    seen = _Seen(task.path)
    index, descriptor = None, -1
    indexed = inspected = 0
    header_faults: Counter[str] = Counter()
    try:
        index, descriptor = _open(task.path, task.remote)
        header_faults = _add_header_faults(index, faults)
        seen.extensions = _count_extensions(descriptor, index, task.options)
        indexed = len(index)
        counter = _Counter(task.options)
        chosen = _choose(indexed, task.options.samples_per_shard)
        decoded = {chosen[i] for i in _choose(len(chosen), task.options.num_decoded)} if task.options.decode else set()
        for number in chosen:
            inspected += 1
            sample = index[number]
            try:
                _inspect_sample(descriptor, sample, task.options, counter, seen, decode=number in decoded)
            except SampleProblem as problem:
                faults.add(sample.key, problem.reason, problem.detail, content=True)
    except FileNotFoundError:
        faults.add(None, "shard_missing", "no such file")
    except SampleProblem as problem:
        faults.add(None, problem.reason, problem.detail)
    except OSError as error:
        faults.add(None, "shard_missing", f"cannot be read: {error.strerror or error}")
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    return ShardInspection(
        path=task.path,
        num_bytes=0 if index is None else index.size,
        indexed=indexed,
        header_faults=header_faults,
        inspected=inspected,
        content_faults=faults.content,
        decoded=seen.decoded,
        damaged=seen.damaged,
        shard_faults=faults.of_shard,
        examples=tuple(faults.examples),
        extensions=seen.extensions,
        json_keys=seen.json_keys,
        formats=seen.formats,
        rows=np.array(seen.rows, SAMPLE_ROW),
        captions=np.array(seen.captions, CAPTION_ROW),
    )


def find_captions(
    path: str, wanted: Sequence[int], options: InspectionOptions, *, remote: RemoteShards | None = None
) -> dict[int, str]:
    """Texts of a shard by their hash, those that are wanted; what cannot be read is left out."""
    left, found = set(wanted), {}
    index, descriptor = _open(path, remote)
    try:
        for number in _choose(len(index), options.samples_per_shard):
            try:
                said = _read_text(descriptor, index[number], options)
            except SampleProblem:
                continue
            for caption in said.captions:
                if (key := hash_bytes(caption.text.encode())) in left:
                    found[key] = caption.text
                    left.remove(key)
            if not left:
                break
    finally:
        os.close(descriptor)
    return found


def hash_bytes(content: bytes) -> int:
    """64 bits; among a hundred million distinct contents two share a hash with a probability of 0.03 %."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


class _Faults:
    """Counts faults and keeps the first few of each reason."""

    def __init__(self, shard: str) -> None:
        self._shard = shard
        self.content: Counter[str] = Counter()
        self.of_shard: Counter[str] = Counter()
        self.examples: list[Fault] = []
        self._kept: Counter[str] = Counter()

    def add(self, key: str | None, reason: str, detail: str, *, content: bool = False) -> None:
        if key is None:
            self.of_shard[reason] += 1
        elif content:
            self.content[reason] += 1
        if self._kept[reason] < MAX_EXAMPLES:
            self._kept[reason] += 1
            self.examples.append(Fault(self._shard, key, reason, detail))


class _Seen:
    """What the usable samples of a shard are like."""

    def __init__(self, shard: str) -> None:
        self._shard = shard
        self.rows: list[tuple[int, ...]] = []
        self.captions: list[tuple[int, ...]] = []
        self.json_keys: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()
        self.extensions: Counter[str] = Counter()
        self.decoded = self.damaged = 0

    def add(self, sample: IndexedSample, image: bytes, facts: ImageFacts, said: SampleText, counter: _Counter) -> None:
        identity = name_content(said, key=sample.key, shard=self._shard, source="")
        self.formats[facts.format] += 1
        for caption in said.captions:
            words, tokens = counter.words(caption.text, caption.language), counter.tokens(caption.text)
            language = LANGUAGES.index(caption.language)
            text = hash_bytes(caption.text.encode())
            self.captions.append((len(self.rows), language, text, len(caption.text), words, tokens))
        self.rows.append((facts.width, facts.height, len(image), hash_bytes(image), hash_bytes(identity.encode())))


class _Counter:
    """Counts words and tokens where that is asked for, -1 where not."""

    def __init__(self, options: InspectionOptions) -> None:
        self._words = options.words
        self._tokenizer: SentencePieceTokenizer | None = None
        if options.tokenizer is not None:
            self._tokenizer = SentencePieceTokenizer(options.tokenizer, context_length=_CONTEXT_LENGTH)

    def words(self, text: str, language: str) -> int:
        return count_words(text, language) if self._words else -1

    def tokens(self, text: str) -> int:
        return -1 if self._tokenizer is None else len(self._tokenizer.encode(text))


def _open(path: str, remote: RemoteShards | None) -> tuple[ShardIndex, int]:
    """A shard's index and the shard, opened; of a remote one its local copy.

    Raises:
        SampleProblem: shard_changed, if it is another one than was indexed, or what a download can end in.
        UserError: for a url without a folder for copies.
    """
    if is_remote(path):
        if remote is None:
            raise UserError(f"{path} is remote: say where copies of remote shards are kept")
        path = str(remote.fetch(path))
    path = path.removeprefix("file://")
    index = open_index(path)
    descriptor = os.open(path, os.O_RDONLY)
    status = os.fstat(descriptor)
    if (status.st_size, status.st_mtime_ns) != (index.size, index.written):
        os.close(descriptor)
        raise SampleProblem("shard_changed", "it was written anew while it was read")
    return index, descriptor


def _add_header_faults(index: ShardIndex, faults: _Faults) -> Counter[str]:
    counts: Counter[str] = Counter()
    for key, reason, detail in index.faults:
        faults.add(key, reason, detail)
        if key is not None:
            counts[reason] += 1
    return counts


def _count_extensions(descriptor: int, index: ShardIndex, options: InspectionOptions) -> Counter[str]:
    """Members by extension, from as many headers as samples are read: all of a large tar take longer than the rest."""
    limit = options.samples_per_shard
    size = index.size if limit is None or len(index) <= limit else index[limit].image.offset
    names = (Path(member.name).name for member in scan_tar(descriptor, size=size).members)
    return Counter(f".{rest}" if dot else "no extension" for _, dot, rest in (name.partition(".") for name in names))


def _choose(count: int, limit: int | None) -> Sequence[int]:
    """Evenly spread numbers below `count`, at most `limit` of them."""
    if limit is None or limit >= count:
        return range(count)
    return [(2 * i + 1) * count // (2 * limit) for i in range(limit)]


def _inspect_sample(
    descriptor: int,
    sample: IndexedSample,
    options: InspectionOptions,
    counter: _Counter,
    seen: _Seen,
    *,
    decode: bool,
) -> None:
    said = _read_text(descriptor, sample, options)
    seen.json_keys.update(said.metadata.keys())
    check_roles(said.captions)
    image = _read(descriptor, sample.image)
    assert image is not None, "an indexed sample has an image"
    facts = read_image_facts(image, options.limits, decode=False)
    if decode:
        seen.decoded += 1
        try:
            read_image_facts(image, options.limits, decode=True)
        except SampleProblem:
            seen.damaged += 1
            raise
    seen.add(sample, image, facts, said, counter)


def _read_text(descriptor: int, sample: IndexedSample, options: InspectionOptions) -> SampleText:
    return parse_sample_text(_read(descriptor, sample.json), _read(descriptor, sample.text), language=options.language)


def _read(descriptor: int, member: Member | None) -> bytes | None:
    if member is None:
        return None
    content = os.pread(descriptor, member.size, member.offset)
    if len(content) != member.size:
        raise SampleProblem("shard_changed", f"{len(content):,} of {member.size:,} bytes: the tar was cut while read")
    return content
