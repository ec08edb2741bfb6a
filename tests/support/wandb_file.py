"""Reads back what W&B's client has written for a run: the page of the run before there is one."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_HEADER = 7  # bytes, of the file and of a piece
_BLOCK = 32_768  # bytes


class WandbPage(NamedTuple):
    """A run as W&B would show it."""

    run: Any  # its record: id, name, group, job type, notes, tags
    config: dict[str, Any]
    history: list[dict[str, Any]]  # rows in their order, with `_step`
    summary: dict[str, Any]
    goals: dict[str, str]  # by metric, which value of it counts: "max" or "min"
    tables: dict[str, dict[str, Any]]  # `columns` and `data`, by name
    images: dict[str, Path]  # by name
    artifacts: dict[str, list[str]]  # files by name of the artifact

    @property
    def rows(self) -> dict[int, dict[str, Any]]:
        """The rows by W&B's own step, without what W&B adds."""
        steps = [row["_step"] for row in self.history]
        assert steps == sorted(set(steps)), "every step once, in order"
        return {row["_step"]: {k: v for k, v in row.items() if not k.startswith("_")} for row in self.history}


def read_page(folder: Path) -> WandbPage:
    """The run in a folder `wandb/*run-*-ID`."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    page = WandbPage(None, {}, [], {}, {}, {}, {}, {})
    for data in _read_pieces(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            page = page._replace(run=record.run)
            page.config.update({item.key: json.loads(item.value_json) for item in record.run.config.update})
        elif kind == "history":
            row: dict[str, Any] = {}
            _set(row, record.history.item)
            page.history.append(row)
        elif kind == "summary":
            _set(page.summary, record.summary.update)
        elif kind == "metric" and record.metric.name:
            for word in ("max", "min"):
                if getattr(record.metric.summary, word):
                    page.goals[record.metric.name] = word
        elif kind == "artifact":
            page.artifacts[record.artifact.name] = [item.path for item in record.artifact.manifest.contents]
    for name, value in page.summary.items():
        path = folder / "files" / str(value.get("path")) if isinstance(value, dict) else folder
        if path.name.endswith(".table.json"):
            page.tables[name] = json.loads(path.read_bytes())
        elif path.suffix == ".png":
            page.images[name] = path
    return page


def _set(values: dict[str, Any], items: Any) -> None:
    for item in items:
        *above, last = [item.key] if item.key else list(item.nested_key)
        node = values
        for key in above:
            inner = node.get(key)
            node[key] = inner if isinstance(inner, dict) else {}
            node = node[key]
        node[last] = json.loads(item.value_json)


def _read_pieces(content: bytes) -> Iterator[bytes]:
    """The records of a file, which LevelDB's log format cuts into pieces; a cut-off end is left out."""
    position, record = _HEADER, b""
    while position + _HEADER <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + _HEADER])
        record += content[position + _HEADER : position + _HEADER + length]
        position += _HEADER + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""
