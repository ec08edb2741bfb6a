"""Files of features: safetensors or parquet, written batch by batch, read back with one call.

safetensors
    tensors `features` (N, E) float32 and `index` (N,) int64; metadata `names` (JSON list) and `provenance`
    (JSON).
parquet
    columns `index` int64, `name` string, `feature` fixed-size list of float32; file metadata `provenance`
    (JSON).

`index` is an item's place in the input from 0: what was skipped leaves a gap there, not in the rows.

Legend: N features · B batch · E feature dim.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from m2_encoder.errors import UserError

SUFFIXES = (".safetensors", ".parquet")
"""Kinds of files, told apart by their suffix."""

MAX_NAMES_BYTES = 64 * 2**20
"""Names beyond this do not fit a safetensors header, whose limit is 100 MB; parquet has none."""

_ROWS_PER_GROUP = 8192


class FeatureFile(NamedTuple):
    """What a file of features holds."""

    features: Tensor  # (N, E) float32
    names: tuple[str, ...]  # length N
    places: Tensor  # of the items in the input, (N,) int64
    provenance: dict[str, Any]  # where the features come from: model, weights, input


class FeatureWriter(Protocol):
    """Takes features batch by batch."""

    def add(self, places: Tensor, names: Sequence[str], features: Tensor) -> None:
        """Append rows: places (B,) int64, B names, features (B, E)."""
        ...


def check_feature_path(path: Path, *, overwrite: bool) -> list[str]:
    """What speaks against writing a file of features, one reason each; empty if nothing does."""
    problems = []
    if path.suffix not in SUFFIXES:
        problems.append(f"must end in {' or '.join(SUFFIXES)}")
    elif path.suffix == ".parquet" and find_spec("pyarrow") is None:
        problems.append("needs pyarrow; install it with pip install 'm2-encoder[parquet]'")
    if path.is_dir():
        problems.append("is a folder; give the name of a file")
    elif path.exists() and not overwrite:
        problems.append("exists; choose another name, or replace it with overwrite=true")
    folder = next((parent for parent in path.absolute().parents if parent.exists()), Path("/"))
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        problems.append(f"cannot be written: {folder} is no folder that you may write to")
    return problems


@contextmanager
def open_feature_file(
    path: Path, *, feature_dim: int, provenance: Mapping[str, Any], overwrite: bool = False
) -> Iterator[FeatureWriter]:
    """A writer whose file appears under its name when the block ends without an exception, or not at all.

    Args:
        path: ends in one of `SUFFIXES`; missing folders are made.
        feature_dim: E.
        provenance: plain JSON values.
        overwrite: replace an existing file.

    Raises:
        UserError: for what `check_feature_path` finds, or a disk that refuses.
    """
    problems = check_feature_path(path, overwrite=overwrite)
    if problems:
        raise UserError("; ".join(problems), key="output", value=path)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    write = _write_parquet if path.suffix == ".parquet" else _write_safetensors
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with write(unfinished, feature_dim, json.dumps(provenance, ensure_ascii=False)) as writer:
            yield writer
        os.replace(unfinished, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def read_features(path: str | os.PathLike[str]) -> FeatureFile:
    """Reads a file that `open_feature_file` wrote.

    Raises:
        UserError: for a missing or damaged file, one of another kind, or parquet without pyarrow.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} must end in {' or '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return _read_parquet(path) if path.suffix == ".parquet" else _read_safetensors(path)


class _SafetensorsWriter:
    """Features go to the disk at once; names and places wait for the header, which is written last."""

    def __init__(self, file: IO[bytes], feature_dim: int) -> None:
        self._file = file
        self._feature_dim = feature_dim
        self.names: list[str] = []
        self.places: list[int] = []

    def add(self, places: Tensor, names: Sequence[str], features: Tensor) -> None:
        self._file.write(_float_bytes(features, self._feature_dim))
        self.names += names
        self.places += places.tolist()


@contextmanager
def _write_safetensors(path: Path, feature_dim: int, provenance: str) -> Iterator[_SafetensorsWriter]:
    body = path.with_name(f"{path.name}.body")
    try:
        with body.open("wb") as file:
            writer = _SafetensorsWriter(file, feature_dim)
            yield writer
            size = file.tell()
        index = struct.pack(f"<{len(writer.places)}q", *writer.places)
        names = json.dumps(writer.names, ensure_ascii=False)
        header = {
            "__metadata__": {"format": "pt", "names": names, "provenance": provenance},
            "features": _entry("F32", [len(writer.names), feature_dim], 0, size),
            "index": _entry("I64", [len(writer.places)], size, size + len(index)),
        }
        text = json.dumps(header, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as whole, body.open("rb") as part:
            whole.write(struct.pack("<Q", len(text)) + text)
            shutil.copyfileobj(part, whole, 2**22)
            whole.write(index)
            whole.flush()
            os.fsync(whole.fileno())
    finally:
        body.unlink(missing_ok=True)


def _entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def _read_safetensors(path: Path) -> FeatureFile:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return FeatureFile(
                features=file.get_tensor("features"),
                names=tuple(json.loads(metadata["names"])),
                places=file.get_tensor("index"),
                provenance=json.loads(metadata["provenance"]),
            )
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise UserError(f"{path} is no file of features that m2-embed wrote: {error}") from error


class _ParquetWriter:
    """Collects batches to row groups of a size that parquet likes."""

    def __init__(self, writer: Any, schema: Any, feature_dim: int) -> None:
        self._writer = writer
        self._schema = schema
        self._feature_dim = feature_dim
        self._waiting: list[tuple[list[int], list[str], bytes]] = []
        self._num_waiting = 0

    def add(self, places: Tensor, names: Sequence[str], features: Tensor) -> None:
        self._waiting.append((places.tolist(), list(names), _float_bytes(features, self._feature_dim)))
        self._num_waiting += len(names)
        if self._num_waiting >= _ROWS_PER_GROUP:
            self.flush()

    def flush(self) -> None:
        if not self._waiting:
            return
        import pyarrow

        numbers = [number for part, _, _ in self._waiting for number in part]
        names = [name for _, part, _ in self._waiting for name in part]
        content = pyarrow.py_buffer(b"".join(part for _, _, part in self._waiting))
        flat = pyarrow.Array.from_buffers(pyarrow.float32(), len(names) * self._feature_dim, [None, content])
        features = pyarrow.FixedSizeListArray.from_arrays(flat, self._feature_dim)
        columns = [pyarrow.array(numbers, pyarrow.int64()), pyarrow.array(names, pyarrow.string()), features]
        self._writer.write_table(pyarrow.Table.from_arrays(columns, schema=self._schema))
        self._waiting, self._num_waiting = [], 0


@contextmanager
def _write_parquet(path: Path, feature_dim: int, provenance: str) -> Iterator[_ParquetWriter]:
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema(
        [
            ("index", pyarrow.int64()),
            ("name", pyarrow.string()),
            ("feature", pyarrow.list_(pyarrow.float32(), feature_dim)),
        ],
        metadata={"provenance": provenance},
    )
    with parquet.ParquetWriter(path, schema, compression="zstd") as file:
        writer = _ParquetWriter(file, schema, feature_dim)
        yield writer
        writer.flush()


def _read_parquet(path: Path) -> FeatureFile:
    if find_spec("pyarrow") is None:
        raise UserError(f"{path} needs pyarrow; install it with pip install 'm2-encoder[parquet]'")
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
        provenance = json.loads((table.schema.metadata or {})[b"provenance"])
        feature_dim = table.schema.field("feature").type.list_size
        flat = table.column("feature").combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return FeatureFile(
            features=torch.tensor(flat, dtype=torch.float32).reshape(-1, feature_dim),
            names=tuple(table.column("name").to_pylist()),
            places=torch.tensor(table.column("index").to_numpy(), dtype=torch.long),
            provenance=provenance,
        )
    except (pyarrow.ArrowException, KeyError, ValueError, AttributeError, OSError) as error:
        raise UserError(f"{path} is no file of features that m2-embed wrote: {error}") from error


def _float_bytes(features: Tensor, feature_dim: int) -> bytes:
    if features.dim() != 2 or features.shape[1] != feature_dim:
        raise ValueError(f"features have shape {tuple(features.shape)}, expected (B, {feature_dim})")
    return features.detach().cpu().to(torch.float32).contiguous().numpy().astype("<f4", copy=False).tobytes()
