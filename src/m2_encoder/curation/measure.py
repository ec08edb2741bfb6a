"""The first stage: read a shard once and write a table of all that the rules need."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from m2_encoder.curation.images import ImageMeasure, measure_image
from m2_encoder.curation.sources import Shard
from m2_encoder.curation.tables import MEASURED, write_table
from m2_encoder.data.samples.parse import UNDECLARED, SampleProblem, parse_sample_text
from m2_encoder.data.shards.index import IndexedSample, Member, build_index
from m2_encoder.errors import UserError


class MeasureTask(NamedTuple):
    """A shard to read."""

    output: str  # where the table goes; `tables.MEASURED` with notes `rows`, `samples`, `fault`
    shard: Shard
    max_pixels: int


def measure_shard(task: MeasureTask) -> None:
    """Read a shard, decode its images, write its table; damage becomes rows with a fault.

    Raises:
        UserError: if the shard was replaced since it was listed.
    """
    check_unchanged(task.shard)
    index = build_index(task.shard.path)
    rows: list[dict[str, Any]] = []
    with open(task.shard.path, "rb") as file:
        for number in range(len(index)):
            rows += _rows(number, index[number], file, task)
    check_unchanged(task.shard)
    unusable = [fault for fault in index.faults if fault.key is not None]
    rows += [
        {"sample": number, "key": _printable(str(fault.key)), "fault": fault.reason}
        for number, fault in enumerate(unusable, start=len(index))
    ]
    notes = {
        "rows": str(len(rows)),
        "samples": str(len(index) + len(unusable)),
        "fault": "; ".join(f"{fault.reason}: {fault.detail}" for fault in index.faults if fault.key is None),
    }
    write_table(Path(task.output), pa.Table.from_pylist(rows, schema=MEASURED), notes=notes)


def check_unchanged(shard: Shard) -> None:
    """Check that a shard is still the one that was listed.

    Raises:
        UserError: if its size or time of change differs, or it is gone.
    """
    try:
        status = os.stat(shard.path)
    except OSError as error:
        raise UserError(f"{shard.path}: shard_missing: it was there when the curation started; start again") from error
    if (status.st_size, status.st_mtime_ns) != (shard.size, shard.written):
        raise UserError(f"{shard.path}: shard_changed: it was replaced during the curation; start again")


def read_member(file: BinaryIO, member: Member) -> bytes:
    """Bytes of a file inside an open tar; fewer than its size if the tar was cut."""
    return os.pread(file.fileno(), member.size, member.offset)


def _rows(number: int, sample: IndexedSample, file: BinaryIO, task: MeasureTask) -> Iterator[dict[str, Any]]:
    image, fault = _measure(read_member(file, sample.image), task.max_pixels)
    shared: dict[str, Any] = {
        "sample": number,
        "key": _printable(sample.key),
        "image_extension": sample.extension,
        "image_offset": sample.image.offset,
        "image_size": sample.image.size,
        "json_offset": sample.json.offset if sample.json else None,
        "json_size": sample.json.size if sample.json else None,
        **(image._asdict() if image else {}),
    }
    json_file = read_member(file, sample.json) if sample.json else None
    text_file = read_member(file, sample.text) if sample.text else None
    try:
        said = parse_sample_text(json_file, text_file, language=task.shard.language or UNDECLARED)
        captions = (*said.captions, *said.left_out)
    except SampleProblem as problem:
        captions = problem.left_out
        if not captions:
            yield {**shared, "fault": fault or problem.reason}
    for caption in captions:
        declared = None if caption.language == UNDECLARED else caption.language
        yield {**shared, "text": caption.text, "declared": declared, "role": caption.role, "fault": fault}


def _measure(content: bytes, max_pixels: int) -> tuple[ImageMeasure | None, str | None]:
    try:
        return measure_image(content, max_pixels=max_pixels), None
    except SampleProblem as problem:
        return None, problem.reason


def _printable(key: str) -> str:
    """The key with bytes that are not UTF-8 escaped."""
    return key.encode("utf-8", "backslashreplace").decode()
