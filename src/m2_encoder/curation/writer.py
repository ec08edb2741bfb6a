"""The last stage: write kept pairs to new shards; the same decisions give the same bytes."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa

from m2_encoder.curation.decide import COPIED, kept_samples
from m2_encoder.curation.measure import check_unchanged, read_member
from m2_encoder.curation.sources import Shard
from m2_encoder.curation.tables import column_names, read_table
from m2_encoder.data.samples.parse import PLAIN_CAPTION_KEYS, parse_json_object
from m2_encoder.data.shards.index import Member, open_index
from m2_encoder.errors import UserError
from m2_encoder.files import atomic_file, write_text

_COLUMNS = (
    "sample", "keep", "key", "text", "language", "role", "image_extension", "image_offset", "image_size", "json_offset",
    "json_size", "image_hash",
)  # fmt: skip
_CAPTION_KEYS = ("captions", "caption_roles", "caption_scores", "caption_rewrite", *PLAIN_CAPTION_KEYS)
_DEFAULT_ROLE = "original"  # of a caption without a role, where others of its sample have one
_IDENTITY_BYTES = 12  # of the image's hash: no two of 10^12 different images meet by accident


class Part(NamedTuple):
    """Some kept samples of a shard."""

    shard: Shard
    decisions: str  # the shard's decided table
    start: int  # the first one, counted among the kept samples
    stop: int  # behind the last one


class WriteTask(NamedTuple):
    """One shard to write."""

    output: str  # a marker with `samples`, `pairs` and `bytes`, written after the tar
    tar: str
    parts: tuple[Part, ...]  # what goes into it, in order


def plan_shards(
    decided: Sequence[tuple[Shard, str, int]], *, samples_per_shard: int
) -> list[tuple[str, tuple[Part, ...]]]:
    """Assign the kept samples of each source to new shards, in their old order.

    `decided` holds old shards with the path of their decisions and the number of their kept samples.

    Returns:
        Names `<source>/<number>.tar` with their parts.
    """
    planned: list[tuple[str, tuple[Part, ...]]] = []
    for source in dict.fromkeys(shard.source for shard, _, _ in decided):
        parts: list[Part] = []
        room, number = samples_per_shard, 0
        for shard, path, count in decided:
            start = 0
            while shard.source == source and start < count:
                stop = min(count, start + room)
                parts.append(Part(shard, path, start, stop))
                room -= stop - start
                start = stop
                if not room:
                    planned.append((f"{source}/{number:06d}.tar", tuple(parts)))
                    parts, room, number = [], samples_per_shard, number + 1
        if parts:
            planned.append((f"{source}/{number:06d}.tar", tuple(parts)))
    return planned


def write_shard(task: WriteTask) -> None:
    """Write one shard, then its marker.

    Raises:
        UserError: if an old shard was replaced since it was measured.
    """
    tar = Path(task.tar)
    tar.parent.mkdir(parents=True, exist_ok=True)
    keys = Counter(key for part in task.parts for key in _keys(part))
    samples = pairs = 0
    with atomic_file(tar) as partial, tarfile.open(partial, "w", format=tarfile.GNU_FORMAT) as archive:
        for part in task.parts:
            for key, rows, image, metadata in _read_part(part):
                # Keys of different old shards may be equal; in one shard they must not.
                name = key if keys[key] == 1 else f"{key}-{part.shard.number:06d}-{rows[0]['sample']:06d}"
                _add(archive, f"{name}.{rows[0]['image_extension']}", image)
                if metadata.get("key") == key:
                    metadata = {**metadata, "key": name}  # still no more than the name of its files
                _add(archive, f"{name}.json", _describe(rows, metadata))
                samples, pairs = samples + 1, pairs + len(rows)
    open_index(tar)  # writes the index, so that training need not
    marker = Path(task.output)
    marker.parent.mkdir(parents=True, exist_ok=True)
    content = {"samples": samples, "pairs": pairs, "bytes": tar.stat().st_size}
    write_text(marker, json.dumps(content) + "\n")


def _table(part: Part) -> pa.Table:
    """Rows of the part that are kept."""
    path = Path(part.decisions)
    present = column_names(path)
    table = read_table(path, [*_COLUMNS, *(name for name in ("score", "rewrite", COPIED) if name in present)])
    samples = kept_samples(table)[part.start : part.stop]
    keep = table.column("keep").to_numpy() & np.isin(table.column("sample").to_numpy(), samples)
    return table.filter(pa.array(keep))


def _keys(part: Part) -> Iterator[str]:
    table = _table(part)
    first = np.unique(table.column("sample").to_numpy(), return_index=True)[1]
    yield from table.column("key").take(pa.array(first)).to_pylist()


def _read_part(part: Part) -> Iterator[tuple[str, list[dict[str, Any]], bytes, dict[str, Any]]]:
    check_unchanged(part.shard)
    with open(part.shard.path, "rb") as file:
        for rows in _by_sample(_table(part)):
            image = _read(file, part, rows[0], "image")
            has_json = rows[0]["json_offset"] is not None
            metadata = parse_json_object(_read(file, part, rows[0], "json")) if has_json else {}
            yield rows[0]["key"], rows, image, {k: v for k, v in metadata.items() if k not in _CAPTION_KEYS}
    check_unchanged(part.shard)


def _by_sample(table: pa.Table) -> Iterator[list[dict[str, Any]]]:
    rows = (row for batch in table.to_batches(max_chunksize=1024) for row in batch.to_pylist())
    for _, group in itertools.groupby(rows, key=lambda row: row["sample"]):
        yield list(group)


def _read(file: BinaryIO, part: Part, row: dict[str, Any], what: str) -> bytes:
    member = Member(row[f"{what}_offset"], row[f"{what}_size"])
    content = read_member(file, member)
    if len(content) != member.size:
        raise UserError(f"{part.shard.path}: {row['key']}: shard_changed: its {what} is cut; start again")
    return content


def _describe(rows: list[dict[str, Any]], metadata: dict[str, Any]) -> bytes:
    """The sample's JSON: its own metadata, and the captions that are kept, by language."""
    by_language: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_language.setdefault(row["language"], []).append(row)

    def column(name: str, convert: Any = lambda value: value) -> dict[str, list[Any]]:
        return {language: [convert(row[name]) for row in own] for language, own in by_language.items()}

    described = {**metadata, "captions": column("text")}
    if any(row["role"] for row in rows):
        described["caption_roles"] = column("role", lambda role: role or _DEFAULT_ROLE)
    if "score" in rows[0]:
        described["caption_scores"] = column("score", lambda score: None if score is None else round(score, 4))
        described["caption_rewrite"] = column("rewrite")
    # An `identity` in the metadata is kept; a `key` is not one, because most tools make it up for each sample.
    if rows[0].get(COPIED) and metadata.get("identity") is None:
        described["identity"] = rows[0]["image_hash"][:_IDENTITY_BYTES].hex()
    return json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # its defaults (no time, no owner) make the bytes a function of the content
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))
