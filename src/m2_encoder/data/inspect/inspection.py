"""Measurements and faults of the samples of a shard, for `m2-data check`.

All headers of a shard are inspected, and some or all of its samples: read, parsed and checked exactly as in training.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from m2_encoder.data.images.limits import ImageFacts, ImageLimits, read_image_facts
from m2_encoder.data.images.rgb import FLAT
from m2_encoder.data.samples.captions import check_roles
from m2_encoder.data.samples.language import doubt_english
from m2_encoder.data.samples.parse import CaptionText, SampleProblem, SampleText, name_content, parse_sample_text
from m2_encoder.data.shards.grouping import group_members, has_dotted_name
from m2_encoder.data.shards.index import IMAGE_EXTENSIONS, ShardIndex
from m2_encoder.data.shards.names import is_clutter
from m2_encoder.data.shards.paths import is_remote
from m2_encoder.data.shards.reader import OpenShard, SampleBytes
from m2_encoder.data.shards.remote import RemoteShards
from m2_encoder.data.shards.tar_scan import scan_tar
from m2_encoder.errors import UserError
from m2_encoder.pictures import STANDARD, PicturePolicy
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.tokenizers.words import count_words
from m2_encoder.types import LANGUAGES

SAMPLE_ROW = np.dtype([("width", "i4"), ("height", "i4"), ("num_bytes", "i8"), ("image", "u8"), ("identity", "u8")])
"""One usable sample: size as stored, bytes of the image file, hashes of the image and of what marks its content."""

CAPTION_ROW = np.dtype(
    [
        ("row", "i8"),
        ("language", "i1"),
        ("text", "u8"),
        ("characters", "i4"),
        ("words", "i4"),
        ("tokens", "i4"),
        ("foreign", "i4"),
    ]
)
"""One caption: its sample's row, index into `LANGUAGES`, hash, lengths, and how many tokens are bytes or unknown; -1
for what was not counted."""

MAX_EXAMPLES = 3
"""Faults of one reason in one shard that are named; all are counted."""


class InspectionOptions(NamedTuple):
    """What is looked at."""

    samples_per_shard: int | None = 250  # evenly spread over a shard; None takes all
    decode: bool = True  # decode images, too, which finds cut ones; otherwise only their headers are read
    num_decoded: int | None = None  # images of a shard to decode, evenly spread; None decodes all that are read
    limits: ImageLimits = ImageLimits()  # images outside are faults
    pictures: PicturePolicy = STANDARD  # what the pixels of images are
    language: str | None = None  # of captions without one; None detects it by the script
    words: bool = False
    tokenizer: SentencePieceTokenizer | None = None  # to count tokens with, before it cuts them; None does not


class ShardTask(NamedTuple):
    """One shard to inspect."""

    path: str
    options: InspectionOptions
    remote: RemoteShards | None = None  # local copies of remote shards; None refuses urls


class Fault(NamedTuple):
    """Something unusable."""

    shard: str
    key: str | None  # of the sample; None if it concerns the shard
    reason: str  # one word, as in the metrics `data/skipped/<reason>`
    detail: str


class ShardInspection(NamedTuple):
    """What one shard holds.

    Attributes:
        num_bytes: of the tar; 0 if it is not there.
        indexed: samples that are usable by the tar's headers.
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
        effects: decoded images by what the policy does to them, of `rgb.EFFECTS`.
        flat: names of some that become one flat colour.
        beside: further pictures of samples, as (extension, that of the one that is used).
        rows: usable inspected samples, `SAMPLE_ROW`.
        captions: theirs, `CAPTION_ROW`.
        left_out: captions of inspected samples that are neither Chinese nor English, by language.
        doubts: captions that count as English, by why they may not be.
        dotted: inspected samples that are named up to the last dot.
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
    effects: Counter[str]
    flat: tuple[str, ...]
    beside: Counter[tuple[str, str]]
    rows: npt.NDArray[np.void]
    captions: npt.NDArray[np.void]
    left_out: Counter[str]
    doubts: Counter[str]
    dotted: int = 0


def inspect_shard(task: ShardTask) -> ShardInspection:
    """Inspect one shard; anything wrong with it, even that it is missing, becomes a fault."""
    faults = _Faults(task.path)
    seen = _Seen(task.path)
    shard = None
    indexed = inspected = dotted = 0
    header_faults: Counter[str] = Counter()
    try:
        shard = _open(task.path, task.remote)
        header_faults = _add_header_faults(shard.index, faults)
        seen.extensions, seen.beside = _count_extensions(shard, task.options)
        indexed = len(shard.index)
        counter = _Counter(task.options)
        chosen = _choose(indexed, task.options.samples_per_shard)
        decoded = {chosen[i] for i in _choose(len(chosen), task.options.num_decoded)} if task.options.decode else set()
        for number in chosen:
            inspected += 1
            dotted += has_dotted_name(shard.index[number].key)
            try:
                _inspect_sample(shard.read(number), task.options, counter, seen, decode=number in decoded)
            except SampleProblem as problem:
                faults.add(shard.index[number].key, problem.reason, problem.detail, content=True)
                seen.leave_out(problem.left_out)
    except FileNotFoundError:
        faults.add(None, "shard_missing", "no such file")
    except SampleProblem as problem:
        faults.add(None, problem.reason, problem.detail)
    except OSError as error:
        faults.add(None, "shard_missing", f"cannot be read: {error.strerror or error}")
    finally:
        if shard is not None:
            shard.close()
    return ShardInspection(
        path=task.path,
        num_bytes=0 if shard is None else shard.index.size,
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
        effects=seen.effects,
        flat=tuple(seen.flat),
        beside=seen.beside,
        rows=np.array(seen.rows, SAMPLE_ROW),
        captions=np.array(seen.captions, CAPTION_ROW),
        left_out=seen.left_out,
        doubts=seen.doubts,
        dotted=dotted,
    )


def find_captions(
    path: str, wanted: Sequence[int], options: InspectionOptions, *, remote: RemoteShards | None = None
) -> dict[int, str]:
    """The wanted captions of a shard, by hash; samples that cannot be read are left out."""
    left, found = set(wanted), {}
    with closing(_open(path, remote)) as shard:
        for number in _choose(len(shard.index), options.samples_per_shard):
            try:
                raw = shard.read(number)
                said = parse_sample_text(raw.json, raw.text, language=options.language)
            except SampleProblem:
                continue
            for caption in said.captions:
                if (key := hash_bytes(caption.text.encode())) in left:
                    found[key] = caption.text
                    left.remove(key)
            if not left:
                break
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
    """Collects properties of the usable samples of a shard."""

    def __init__(self, shard: str) -> None:
        self._shard = shard
        self.rows: list[tuple[int, ...]] = []
        self.captions: list[tuple[int, ...]] = []
        self.json_keys: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()
        self.effects: Counter[str] = Counter()
        self.flat: list[str] = []
        self.beside: Counter[tuple[str, str]] = Counter()
        self.extensions: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.doubts: Counter[str] = Counter()
        self.decoded = self.damaged = 0

    def leave_out(self, captions: Iterable[CaptionText]) -> None:
        self.left_out.update(caption.language for caption in captions)

    def add(self, raw: SampleBytes, facts: ImageFacts, said: SampleText, counter: _Counter) -> None:
        identity = name_content(said, key=raw.key, shard=self._shard, source="")
        self.formats[facts.format] += 1
        self.effects.update(facts.effects)
        if FLAT in facts.effects and len(self.flat) < MAX_EXAMPLES:
            self.flat.append(f"{Path(self._shard).name}:{raw.key}")
        for caption in said.captions:
            words, (tokens, foreign) = counter.words(caption.text, caption.language), counter.tokens(caption.text)
            language = LANGUAGES.index(caption.language)
            if caption.language == "en" and (doubt := doubt_english(caption.text)):
                self.doubts[doubt] += 1
            text = hash_bytes(caption.text.encode())
            self.captions.append((len(self.rows), language, text, len(caption.text), words, tokens, foreign))
        self.rows.append(
            (facts.width, facts.height, len(raw.image), hash_bytes(raw.image), hash_bytes(identity.encode()))
        )


class _Counter:
    """Counts words and tokens where that is asked for, -1 where not."""

    def __init__(self, options: InspectionOptions) -> None:
        self._words = options.words
        self._tokenizer = options.tokenizer

    def words(self, text: str, language: str) -> int:
        return count_words(text, language) if self._words else -1

    def tokens(self, text: str) -> tuple[int, int]:
        """All, and those that are bytes or unknown."""
        if self._tokenizer is None:
            return -1, -1
        ids = self._tokenizer.encode(text)
        return len(ids), self._tokenizer.count_foreign(ids)


def _open(path: str, remote: RemoteShards | None) -> OpenShard:
    """A shard; of a remote one its local copy.

    Raises:
        SampleProblem: shard_changed, if it is another one than was indexed, or what a download can end in.
    """
    if is_remote(path):
        if remote is None:
            raise UserError(f"{path} is remote: say where copies of remote shards are kept")
        path = str(remote.fetch(path))
    return OpenShard(path.removeprefix("file://"))


def _add_header_faults(index: ShardIndex, faults: _Faults) -> Counter[str]:
    counts: Counter[str] = Counter()
    for key, reason, detail in index.faults:
        faults.add(key, reason, detail)
        if key is not None:
            counts[reason] += 1
    return counts


def _count_extensions(shard: OpenShard, options: InspectionOptions) -> tuple[Counter[str], Counter[tuple[str, str]]]:
    """Members by extension, and further pictures of samples.

    From as many headers as samples are read: reading all of a large tar would take longest.
    """
    limit, index = options.samples_per_shard, shard.index
    size = index.size if limit is None or len(index) <= limit else index[limit].image.offset
    members = scan_tar(shard.descriptor, size=size).members
    names = (Path(member.name).name for member in members if not is_clutter(member.name))
    found = Counter(f".{rest}" if dot else "no extension" for _, dot, rest in (name.partition(".") for name in names))
    samples, _ = group_members(members, pictures=IMAGE_EXTENSIONS)
    pictures = ([name for name in IMAGE_EXTENSIONS if name in own] for own in samples.values())
    beside = Counter((name, used) for used, *others in filter(None, pictures) for name in others)
    return found, beside


def _choose(count: int, limit: int | None) -> Sequence[int]:
    """Evenly spread numbers below `count`, at most `limit` of them."""
    if limit is None or limit >= count:
        return range(count)
    return [(2 * i + 1) * count // (2 * limit) for i in range(limit)]


def _inspect_sample(
    raw: SampleBytes, options: InspectionOptions, counter: _Counter, seen: _Seen, *, decode: bool
) -> None:
    said = parse_sample_text(raw.json, raw.text, language=options.language)
    seen.json_keys.update(said.metadata.keys())
    seen.leave_out(said.left_out)
    check_roles(said.captions)
    facts = read_image_facts(raw.image, options.limits, decode=False)
    if decode:
        seen.decoded += 1
        try:
            facts = read_image_facts(raw.image, options.limits, decode=True, pictures=options.pictures)
        except SampleProblem:
            seen.damaged += 1
            raise
    seen.add(raw, facts, said, counter)
