"""Record of a run's shards in its checkpoint, to describe later what changed."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m2_encoder.errors import name_some


class RecordedSource(NamedTuple):
    """A source of a mixture."""

    name: str  # as configured
    weight: float  # share in the mixture, not normalised
    digest: str  # of content and order
    shards: Sequence[str]  # paths or urls
    # of each shard samples, bytes, layout, and when it was written (of a remote one the tag of its version), int64
    columns: Sequence[npt.NDArray[np.int64]]


def pack_record(sources: Iterable[RecordedSource]) -> Tensor:
    """Sources in little memory, (bytes,) uint8: 12 bytes a shard, and a quarter of a second for 600,000 shards."""
    heads, parts = [], []
    for name, weight, digest, shards, columns in sources:
        names = "\0".join(shards).encode("utf-8", "replace")
        heads.append([name, weight, digest, len(shards), len(names), len(columns)])
        parts += [names, *map(_by_weight, columns)]
    head = json.dumps(heads, ensure_ascii=False).encode("utf-8", "replace")
    packed = zlib.compress(b"\0".join([head, b"".join(parts)]), 1)
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def read_record(record: Tensor) -> dict[str, Any]:
    """What `pack_record` packed: by source its `weight`, `digest`, `shards` as [path, samples, bytes, layout, written].

    `written` is 0, unknown, in records of earlier versions.
    """
    head, _, content = zlib.decompress(record.numpy().tobytes()).partition(b"\0")
    found, at = {}, 0
    for name, weight, digest, shards, names_size, *more in json.loads(head):
        num_columns = more[0] if more else 3
        names = content[at : at + names_size].decode().split("\0")
        at += names_size
        columns = np.frombuffer(content, np.uint8, num_columns * 8 * shards, at).reshape(num_columns, 8, shards)
        at += columns.size
        numbers = np.ascontiguousarray(columns.transpose(2, 0, 1)).view("<i8")[..., 0].tolist()
        rows = [[shard, *(*values, 0)[:4]] for shard, values in zip(names, numbers, strict=True)]
        found[name] = {"weight": weight, "digest": digest, "shards": rows}
    return found


def _by_weight(column: npt.NDArray[np.int64]) -> bytes:
    """Bytes of the same significance side by side, (8, shards): most of the high ones are 0, which compresses best."""
    return np.ascontiguousarray(column, "<i8").view(np.uint8).reshape(-1, 8).T.tobytes()


def describe_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Differences of two results of `read_record`; empty if both give the same order of samples."""
    lines = [f"source {name} removed" for name in before if name not in now]
    lines += [f"source {name} added ({len(now[name]['shards'])} shards)" for name in now if name not in before]
    for name in (name for name in now if name in before):
        then, new = before[name], now[name]
        if then["weight"] != new["weight"]:
            lines.append(
                f"source {name}: weight {write_weight(then['weight'])} then, {write_weight(new['weight'])} now"
            )
        if then["digest"] != new["digest"]:
            lines += [f"source {name}: {line}" for line in _describe_shards(then["shards"], new["shards"])]
    return lines


def describe_rewritten(before: Mapping[str, Any], now: Mapping[str, Any], *, say: Callable[[str], object]) -> None:
    """Say which shards of two equal orders were written anew, at the same size and layout.

    What is compared is the time of writing, or the version that a remote tells: no content.
    """
    found = [
        new[0]
        for name in now
        if name in before
        for then, new in zip(before[name]["shards"], now[name]["shards"], strict=False)
        if then[:4] == new[:4] and then[4] and new[4] and then[4] != new[4]
    ]
    if found:
        say(
            f"{len(found)} shard(s) of the same size were written anew since it was saved ({name_some(found)}), by "
            "their time of writing, or the ETag of a remote; copies without it count, too: if samples changed, the run "
            "is no longer the uninterrupted one"
        )


def write_weight(weight: float) -> str:
    """All digits, because any of them may change the order; without the point of a whole number."""
    return repr(float(weight)).removesuffix(".0")


def _describe_shards(before: list[list[Any]], now: list[list[Any]]) -> Iterator[str]:
    then, new = ({shard: tuple(values[:3]) for shard, *values in part} for part in (before, now))
    removed, added = [s for s in then if s not in new], [s for s in new if s not in then]
    changed = [s for s in new if s in then and then[s] != new[s]]
    for what, shards in (("added", added), ("removed", removed)):
        if shards:
            yield f"{len(shards)} shard(s) {what} ({name_some(shards)})"
    if changed:
        first = changed[0]
        what = f"{then[first][0]} samples in {then[first][1]} bytes then, {new[first][0]} in {new[first][1]} now"
        if then[first][:2] == new[first][:2]:
            what = "of the same size, but its samples have other names, sizes or places"
        yield f"{len(changed)} shard(s) changed ({name_some(changed)}; {first}: {what})"
    if not (removed or added or changed):
        yield "the same shards in another order"
