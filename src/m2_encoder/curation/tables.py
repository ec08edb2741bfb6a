"""The columns of curation's tables, and Arrow files that appear whole or not at all.

A row is a pair: one caption of one image. A sample with several captions has several rows, which share what is known
about the image; one without captions has one row with a fault.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from m2_encoder.errors import UserError
from m2_encoder.files import atomic_file

HASH_BYTES: Final = 32

MEASURED: Final = pa.schema(
    [
        pa.field("sample", pa.uint32(), nullable=False),  # place in the shard
        pa.field("key", pa.string(), nullable=False),
        pa.field("text", pa.string()),  # null if the sample has no caption
        pa.field("declared", pa.string()),  # language that the sample or its source says; null to detect it
        pa.field("role", pa.string()),
        pa.field("fault", pa.string()),  # why the pair cannot be used at all
        pa.field("image_extension", pa.string()),
        pa.field("image_offset", pa.int64()),
        pa.field("image_size", pa.int64()),
        pa.field("json_offset", pa.int64()),
        pa.field("json_size", pa.int64()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("image_hash", pa.binary(HASH_BYTES)),  # SHA-256 of the bytes
        pa.field("perceptual_hash", pa.uint64()),
        pa.field("mean_color", pa.uint32()),
    ]
)
"""Columns of a measured shard, before any rule."""


def write_table(path: Path, table: pa.Table, *, notes: Mapping[str, str] | None = None) -> None:
    """Write a table to a new Arrow file, compressed."""
    table = table.replace_schema_metadata({key: str(value) for key, value in (notes or {}).items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with atomic_file(path) as partial, pa.ipc.new_file(str(partial), table.schema, options=options) as writer:
        writer.write_table(table.combine_chunks())


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read an Arrow file, or some columns of it.

    Raises:
        UserError: if it is damaged.
    """
    try:
        options = pa.ipc.IpcReadOptions()
        if columns is not None:
            names = _open(path).schema.names
            options = pa.ipc.IpcReadOptions(included_fields=[names.index(name) for name in columns])
        with pa.OSFile(str(path)) as file:
            table = pa.ipc.open_file(file, options=options).read_all()
        return table if columns is None else table.select(list(columns))
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: is damaged ({error}); delete it and run again") from error


def read_notes(path: Path) -> dict[str, str]:
    """The notes that `write_table` stored with a table."""
    metadata = _open(path).schema.metadata or {}
    return {key.decode(): value.decode() for key, value in metadata.items()}


def column_names(path: Path) -> list[str]:
    """Names of the columns of an Arrow file."""
    names: list[str] = _open(path).schema.names
    return names


def write_buckets(path: Path, columns: Mapping[str, npt.NDArray[Any]], bucket: npt.NDArray[Any], count: int) -> None:
    """Write rows sorted by bucket, 0 .. `count` - 1, so that each bucket can be read alone."""
    order = np.argsort(bucket, kind="stable")
    edges = np.searchsorted(bucket[order], np.arange(count + 1))
    sorted_columns = {name: pa.array(values[order]) for name, values in columns.items()}
    batch = pa.record_batch(sorted_columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial, pa.ipc.new_file(str(partial), batch.schema) as writer:
        for low, high in itertools.pairwise(edges.tolist()):
            writer.write_batch(batch.slice(low, high - low))


def read_bucket(paths: Sequence[Path], number: int) -> dict[str, npt.NDArray[Any]]:
    """One bucket of several files, one after the other, as arrays."""
    batches = []
    for path in paths:
        with pa.memory_map(str(path)) as file:
            batch = pa.ipc.open_file(file).get_batch(number)
            values = {name: batch.column(name).to_numpy(zero_copy_only=False) for name in batch.schema.names}
            batches.append({name: column.copy() for name, column in values.items()})  # the map is closed after this
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def hash_words(column: Any) -> npt.NDArray[np.uint64]:
    """The first 16 bytes of each hash as two numbers, (2, n) uint64; zeros for null."""
    filled = pc.fill_null(column, bytes(HASH_BYTES)) if column.null_count else column
    if isinstance(filled, pa.ChunkedArray):
        filled = filled.combine_chunks()
    if not len(filled):
        return np.empty((2, 0), dtype=np.uint64)
    width = filled.type.byte_width
    raw = np.frombuffer(filled.buffers()[1], dtype=np.uint8)
    raw = raw[filled.offset * width : (filled.offset + len(filled)) * width].reshape(-1, width)
    return np.ascontiguousarray(raw[:, :16]).view(">u8").astype(np.uint64).T


def _open(path: Path) -> Any:
    try:
        with pa.OSFile(str(path)) as file:
            return pa.ipc.open_file(file)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: is damaged ({error}); delete it and run again") from error
