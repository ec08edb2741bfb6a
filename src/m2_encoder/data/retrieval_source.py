"""Samples of an evaluation set, one after the other, and an error for the first that cannot be used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from m2_encoder.data.samples.parse import SampleProblem, SampleText, parse_sample_text
from m2_encoder.data.shards.reader import OpenShard
from m2_encoder.errors import UserError


class SetSample(NamedTuple):
    """One sample as it is stored."""

    origin: str  # its place, as "shard:key"
    shard: str  # the tar that it lies in
    key: str  # the name of its files there
    image: bytes  # the image file
    text: SampleText


def read_samples(folder: str | os.PathLike[str]) -> Iterator[SetSample]:
    """Every sample of the tars of a folder, sorted by name.

    Raises:
        UserError: for a folder without samples, and for anything unusable, by name.
    """
    shards = sorted(map(str, Path(folder).glob("*.tar")))
    if not shards:
        raise UserError(f"{folder}: no *.tar shards there")
    is_empty = True
    for shard in shards:
        with closing(_open(shard)) as tar:
            for number in range(len(tar.index)):
                origin = shard
                try:
                    raw = tar.read(number)
                    origin = f"{shard}:{raw.key}"
                    text = parse_sample_text(raw.json, raw.text)
                except SampleProblem as problem:
                    raise UserError(f"{origin}: {problem}; write the shard again") from problem
                yield SetSample(origin, shard, raw.key, raw.image, text)
                is_empty = False
    if is_empty:
        raise UserError(f"{folder}: no samples in its {len(shards)} tar(s)")


def _open(shard: str) -> OpenShard:
    """A tar in which everything is usable, as far as its headers tell; its folder is left as it is."""
    try:
        tar = OpenShard(shard, write_index=False)
    except (OSError, SampleProblem) as error:
        raise UserError(f"{shard}: not a readable tar ({error}); write the shard again") from error
    if tar.index.faults:
        tar.close()
        key, reason, detail = tar.index.faults[0]
        place = shard if key is None else f"{shard}:{key}"
        raise UserError(f"{place}: {reason} ({detail}); an evaluation skips nothing: write the shard again")
    return tar
