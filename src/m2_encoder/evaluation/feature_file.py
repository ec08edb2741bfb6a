"""Files of features, written batch by batch: safetensors or parquet, by suffix.

safetensors
    tensors `features` (N, E) float32 and `index` (N,) int64; metadata `names` (JSON list) and `provenance`
    (JSON).
parquet
    columns `index` int64, `name` string, `feature` fixed-size list of float32; file metadata `provenance`
    (JSON).

`index` is an item's place in the input, from 0; it has gaps where items were skipped.

Letters: N features · B batch · E feature dim.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from m2_encoder.errors import UserError

SUFFIXES = (".safetensors", ".parquet")

MAX_NAMES_BYTES = 64 * 2**20
"""Longest names that fit a safetensors header, which is limited to 100 MB; parquet has no limit."""

_ROWS_PER_GROUP = 8192


class FeatureFile(NamedTuple):
    """Content of a file of features."""

    features: Tensor  # (N, E) float32
    names: tuple[str, ...]  # length N
    places: Tensor  # of the items in the input, (N,) int64
    provenance: dict[str, Any]  # where the features come from: model, weights, input


AddFeatures: TypeAlias = Callable[[Tensor, Sequence[str], Tensor], None]
"""Appends rows: places (B,) int64, B names, features (B, E)."""


def check_feature_path(path: Path, *, overwrite: bool) -> list[str]:
    """Reasons why a file of features cannot be written to a path."""
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
) -> Iterator[AddFeatures]:
    """A function that appends rows to a file, which appears only if the block ends without an exception.

    Missing folders are made; `provenance` holds plain JSON values.

    Raises:
        UserError: for what `check_feature_path` finds, or if writing fails.
    """
    problems = check_feature_path(path, overwrite=overwrite)
    if problems:
        raise UserError("; ".join(problems), key="output", value=path)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    write = _write_parquet if path.suffix == ".parquet" else _write_safetensors
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with write(unfinished, feature_dim, json.dumps(provenance, ensure_ascii=False)) as add:
            yield add
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


@contextmanager
def _write_safetensors(path: Path, feature_dim: int, provenance: str) -> Iterator[AddFeatures]:
    all_names: list[str] = []
    all_places: list[int] = []

    def add(places: Tensor, names: Sequence[str], features: Tensor) -> None:
        body.write(_float_bytes(features, feature_dim))
        all_names.extend(names)
        all_places.extend(places.tolist())

    with tempfile.TemporaryFile(dir=path.parent) as body:  # the header comes first, but holds all names
        yield add
        size, number = body.tell(), len(all_names)
        index = struct.pack(f"<{number}q", *all_places)
        names = json.dumps(all_names, ensure_ascii=False)
        header = {
            "__metadata__": {"format": "pt", "names": names, "provenance": provenance},
            "features": {"dtype": "F32", "shape": [number, feature_dim], "data_offsets": [0, size]},
            "index": {"dtype": "I64", "shape": [number], "data_offsets": [size, size + len(index)]},
        }
        text = json.dumps(header, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        body.seek(0)
        with path.open("wb") as whole:
            whole.write(struct.pack("<Q", len(text)) + text)
            shutil.copyfileobj(body, whole, 2**22)
            whole.write(index)
            whole.flush()
            os.fsync(whole.fileno())


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


@contextmanager
def _write_parquet(path: Path, feature_dim: int, provenance: str) -> Iterator[AddFeatures]:
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema(
        {"index": pyarrow.int64(), "name": pyarrow.string(), "feature": pyarrow.list_(pyarrow.float32(), feature_dim)},
        metadata={"provenance": provenance},
    )
    waiting: list[Any] = []  # tables, until they make a row group

    def add(places: Tensor, names: Sequence[str], features: Tensor) -> None:
        content = pyarrow.py_buffer(_float_bytes(features, feature_dim))
        flat = pyarrow.Array.from_buffers(pyarrow.float32(), features.numel(), [None, content])
        columns = [
            pyarrow.array(places.tolist(), pyarrow.int64()),
            pyarrow.array(names, pyarrow.string()),
            pyarrow.FixedSizeListArray.from_arrays(flat, feature_dim),
        ]
        waiting.append(pyarrow.Table.from_arrays(columns, schema=schema))
        if sum(map(len, waiting)) >= _ROWS_PER_GROUP:
            flush()

    def flush() -> None:
        file.write_table(pyarrow.concat_tables(waiting).combine_chunks())
        waiting.clear()

    with parquet.ParquetWriter(path, schema, compression="zstd") as file:
        yield add
        if waiting:
            flush()


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
