"""What a query finds in an index, and how it is written: as a table, paths, or JSON.

Letters: D feature dim · k results.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from m2_encoder.data.images.opening import read_picture_file
from m2_encoder.data.images.suffixes import PICTURE_SUFFIXES
from m2_encoder.errors import ImageError, UserError, abridge
from m2_encoder.picture_search.ending import find_end
from m2_encoder.picture_search.index import PictureIndex

SEEN_FOR_END: Final = 1000
"""Results among which the probable end is looked for, however many are shown."""


class Result(NamedTuple):
    """A picture that was found."""

    rank: int  # from 1
    name: str  # below the index's root
    score: float  # cosine with the query
    is_likely: bool  # whether it stands before the probable end


class Results(NamedTuple):
    """The best pictures of a query."""

    query: str  # as it was read
    rows: list[Result]  # best first
    end: int  # results that probably belong to the query; `rows` may be fewer


def find_results(
    index: PictureIndex, feature: npt.NDArray[np.float32], top: int, *, query: str, without: Collection[int] = ()
) -> Results:
    """The best pictures for a feature.

    Args:
        index: open.
        feature: of the query, L2-normalised, (D,).
        top: k.
        query: what is searched for, in words.
        without: rows that are no results, such as the query's own.
    """
    found, rows = index.search(feature[None], max(top, SEEN_FOR_END) + len(without))
    scores, names, end = judge(index, feature, found[0], rows[0], without)
    return Results(
        query,
        [
            Result(number + 1, name, score, number < end)
            for number, (name, score) in enumerate(zip(names[:top], scores[:top].tolist(), strict=True))
        ],
        end,
    )


def judge(
    index: PictureIndex,
    feature: npt.NDArray[np.float32],
    scores: npt.NDArray[np.float32],
    rows: npt.NDArray[np.int64],
    without: Collection[int] = (),
) -> tuple[npt.NDArray[np.float32], list[str], int]:
    """What a search found, without the query's own pictures, and how many of that probably belong to the query.

    Args:
        index: open.
        feature: of the query, L2-normalised, (D,).
        scores: of the best pictures, (k,).
        rows: of the best pictures, (k,).
        without: rows that are no results.

    Returns:
        Cosines, -1 to 1, (n,); n names; and how many of the first ones probably belong to the query.
    """
    kept = ~np.isin(rows, list(without))
    scores = scores[kept].clip(-1, 1)  # features are rounded, so that copies may have more
    return scores, [index.names[row] for row in rows[kept]], count_likely(index, scores, feature)


def count_likely(index: PictureIndex, scores: npt.NDArray[np.float32], feature: npt.NDArray[np.float32]) -> int:
    """How many of the best pictures probably belong to a query.

    Args:
        index: open.
        scores: of the best pictures, without those of the query, (k,).
        feature: of the query, L2-normalised, (D,).
    """
    # Not `@`: BLAS starts threads for it, which wait for each other where many queries come at once.
    return find_end(scores, np.einsum("sd,d->s", index.sample, feature), len(index))


def cut_tail(results: Results) -> Results:
    """The results before the probable end."""
    return results._replace(rows=results.rows[: results.end])


def is_picture(index: PictureIndex, name: str) -> bool:
    """Whether a picture of the index, or a picture file, has this name."""
    place = os.path.expanduser(name)
    return name in index.rows or (place.lower().endswith(tuple(PICTURE_SUFFIXES)) and os.path.isfile(place))


def find_row(index: PictureIndex, name: str) -> int | None:
    """The row of a picture, by its name in the index or by the path of its file; None if it is not in the index."""
    path = Path(name).expanduser()
    if not path.exists():
        return index.rows.get(name)
    whole, root = path.resolve(), index.root.resolve()
    row = index.rows.get(whole.relative_to(root).as_posix()) if whole.is_relative_to(root) else None
    if row is None:
        return None
    found = path.stat()
    return row if (found.st_size, found.st_mtime_ns) == (index.sizes[row], index.times[row]) else None


def read_picture(index: PictureIndex, name: str) -> bytes | npt.NDArray[np.float32]:
    """A picture of a query: its feature, if the index has it, or else the content of a file.

    Raises:
        UserError: if there is neither; its key is `query`.
    """
    if (row := find_row(index, name)) is not None:
        return np.asarray(index.features[row], dtype=np.float32)
    try:
        return read_picture_file(Path(name).expanduser())
    except ImageError as error:
        rule = f"{error.text}, and no picture of the index; words in a combination stand in quotes"
        raise UserError(f"{abridge(name, 120)}: {rule}", key="query") from error


def table_of(results: Results) -> str:
    """Rank, cosine and name of each, with a line where they probably end."""
    lines = [f"{'rank':>4}  {'cosine':>6}  picture"]
    for row in results.rows:
        if row.rank == results.end + 1:
            lines.append("----  ------  " + ("probably nothing that fits" if not results.end else "probably the end"))
        lines.append(f"{row.rank:>4}  {row.score:>6.3f}  {abridge(row.name, 200)}")
    return "\n".join(lines)


def json_of(results: Results, index: PictureIndex) -> str:
    """All of it, with paths."""
    content: dict[str, Any] = {
        "query": results.query,
        "index": str(index.path),
        "root": str(index.root),
        "end": results.end,
        "results": [{**row._asdict(), "path": str(index.root / row.name)} for row in results.rows],
    }
    return json.dumps(content, ensure_ascii=False, indent=1)
