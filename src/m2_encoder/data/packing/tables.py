"""Parquet tables whose images are bytes, paths or URLs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from m2_encoder.data.packing.listed import hash_json
from m2_encoder.data.packing.records import (
    URL_SCHEMES,
    Columns,
    Failure,
    Place,
    Record,
    image_path,
    locate_tables,
    read_row,
    stamp_files,
)
from m2_encoder.errors import UserError

_ROWS_AT_A_TIME = 64  # rows with images in them are large


@dataclasses.dataclass(frozen=True)
class ParquetSlice:
    """Consecutive rows of a Parquet file."""

    place: Place
    path: str
    file_bytes: int  # its size; another size is another file
    first_row: int  # from 0
    num_rows: int
    names: tuple[str, ...]  # the columns to read
    path_names: tuple[str, ...]
    columns: Columns

    def __len__(self) -> int:
        return self.num_rows

    def fingerprint(self) -> str:
        """Of the file's name and size, the rows, and what the columns mean; the rows are not read."""
        return hash_json(
            ["parquet", self.place[1:], self.file_bytes, self.first_row, self.num_rows, self.names, self.columns]
        )

    def stamp(self) -> str:
        """Of the file, whose rows the fingerprint leaves out, and of the images that rows name."""
        if not self.path_names:
            return stamp_files([self.path])
        rows = self._rows(self.path_names)
        found = (self.columns.find(row, "image") for row in rows)
        paths = (image_path(image, self.place.root) for image in found if isinstance(image, str))
        return stamp_files(chain([self.path], (path for path in paths if not path.startswith(URL_SCHEMES))))

    def read(self) -> Iterator[Record | Failure]:
        """Read the rows, a few at a time."""
        for number, row in enumerate(self._rows(self.names), start=self.first_row):
            yield read_row(row, self.columns, f"{self.place.name}: row {number}", self.place)

    def _rows(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        import pyarrow
        import pyarrow.parquet

        start = 0
        first, last = self.first_row, self.first_row + self.num_rows
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                for group in range(file.num_row_groups):
                    end = start + file.metadata.row_group(group).num_rows
                    if start < last and end > first:
                        skip = max(0, first - start)
                        yield from _rows_of_group(file, group, names, skip, min(end, last) - start)
                    start = end
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{self.path}: cannot be read: {' '.join(str(error).split())}") from error


def slice_parquet(
    paths: Sequence[Path], size: int, columns: Columns, *, root: str | None = None
) -> Iterator[ParquetSlice]:
    """Cut Parquet files into slices, none of which spans two files.

    Images are bytes, a struct with `bytes` or `path`, or a path or URL. Relative paths count from `root`, by default
    the folder of each file.

    Raises:
        UserError: if pyarrow is not installed, a file is not Parquet, or lacks images or captions.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("Parquet needs an extra; install it with pip install 'm2-encoder[parquet]'") from error
    for path, place in locate_tables(paths, root):
        try:
            schema = pyarrow.parquet.read_schema(path)
            num_rows = pyarrow.parquet.read_metadata(path).num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a Parquet file: {' '.join(str(error).split())}") from error
        columns.check(schema.names, str(path))
        names = tuple(name for name in schema.names if columns.reads(name))
        images = [name for name in names if columns.has_role(name, "image")]
        with_paths = tuple(name for name in images if pyarrow.types.is_string(schema.field(name).type))
        for first in range(0, num_rows, size):
            count = min(size, num_rows - first)
            yield ParquetSlice(place, str(path), path.stat().st_size, first, count, names, with_paths, columns)


def _rows_of_group(file: Any, group: int, names: Sequence[str], first: int, last: int) -> Iterator[dict[str, Any]]:
    """Rows `first` to `last` of a row group, those before them read but not converted."""
    start = 0
    for batch in file.iter_batches(batch_size=_ROWS_AT_A_TIME, row_groups=[group], columns=list(names)):
        end = start + batch.num_rows
        if end > first:
            low = max(0, first - start)
            yield from batch.slice(low, min(end, last) - start - low).to_pylist()
        start = end
        if start >= last:
            return
