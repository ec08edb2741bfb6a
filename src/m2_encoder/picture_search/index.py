"""An index of a folder of pictures: their features on disk, and the nearest ones to a query.

An index is a folder:

    index.json            root, model, fingerprint, names, sizes, times, what could not be used, the names of the others
    features-*.npy        (N, D) float16 or float32, L2-normalised; row i is of names[i]; memory-mapped
    neighbours-*.usearch  a graph of neighbours by `usearch`, of large indexes only
    encoding/             features of pictures that are not yet in index.json, while it is made
    lock                  while a process writes it

`index.json` is replaced as a whole when the files that it names are complete, so that an index is the old one or the
new one at any moment.

Letters: N pictures · Q queries · D feature dim.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from m2_encoder.errors import UserError
from m2_encoder.evaluation.embedding import Skipped
from m2_encoder.evaluation.measures.nearest import find_nearest
from m2_encoder.evaluation.models.base import import_peer

INDEX_FILE: Final = "index.json"
LOCK_FILE: Final = "lock"
ENCODING_FOLDER: Final = "encoding"
FORMAT: Final = "m2-encoder picture index"
VERSION: Final = 1
SAMPLE: Final = 2000
"""Pictures, by which the scores of a query are judged."""


Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_TILE_ROWS: Final = 8192  # pictures that are compared at once; of float16 they are converted then
_SPARE: Final = 32  # more neighbours than asked for, of which the exact scores choose
_EXPANSION: Final = 512  # candidates that the graph keeps on its way: recall of the first ten above 99 %
_ATTEMPTS: Final = 3  # to open an index that is replaced meanwhile


class IndexModel(NamedTuple):
    """What made the features, as `m2_encoder.load` needs it."""

    model: str  # a name or the path of an exported folder
    weights: str | None
    tokenizer: str | None
    pictures: str | dict[str, str]  # what the pixels of a file are
    fingerprint: str  # of weights, architecture, preprocessing and tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureIndex:
    """An index that is open for reading; it stays readable while a new one takes its place.

    Attributes:
        path: its folder.
        root: the folder of the pictures.
        names: paths below `root`, sorted, length N.
        sizes: of the files in bytes, (N,).
        times: when they were last changed, in nanoseconds since 1970, (N,).
        features: L2-normalised, (N, D) float16 or float32, memory-mapped.
        made_by: the model.
        skipped: pictures without a feature, and why.
        neighbours: file of the graph of neighbours; None where all features are compared.
    """

    path: Path
    root: Path
    names: list[str]
    sizes: Ints
    times: Ints
    features: npt.NDArray[Any]
    made_by: IndexModel
    skipped: list[Skipped]
    neighbours: Path | None

    def __len__(self) -> int:
        """N."""
        return len(self.names)

    @property
    def model(self) -> str:
        """The name or the folder of the model."""
        return self.made_by.model

    @cached_property
    def rows(self) -> dict[str, int]:
        """The row of each name."""
        return {name: row for row, name in enumerate(self.names)}

    def search(self, queries: npt.ArrayLike, k: int) -> tuple[Floats, Ints]:
        """The k best pictures of each query; of equal scores the first by name comes first.

        Args:
            queries: L2-normalised, (Q, D).
            k: at least 1; capped at N.

        Returns:
            Cosines, (Q, k) float32, best first, and rows, (Q, k) int64.

        Raises:
            ValueError: for a k below 1, or queries of another width.
        """
        wanted = torch.from_numpy(np.array(queries, dtype=np.float32))  # copied: it may be read-only
        if wanted.dim() != 2 or wanted.shape[1] != self.features.shape[1]:
            raise ValueError(f"queries have shape {tuple(wanted.shape)}, expected (Q, {self.features.shape[1]})")
        if self._graph is not None and k + _SPARE < len(self):
            return self._search_graph(wanted.numpy(), k)
        found = find_nearest(wanted, torch.from_numpy(self.features), k, chunk_size=_TILE_ROWS)
        return found.scores.float().numpy(), found.rows.numpy()

    @cached_property
    def sample(self) -> Floats:
        """Features of evenly spread pictures, (at most 2,000, D)."""
        return np.asarray(self.features[:: -(-len(self) // SAMPLE)], dtype=np.float32)

    @cached_property
    def _graph(self) -> Any:
        if self.neighbours is None:
            return None
        usearch = import_peer("usearch.index", "indexes with a graph of neighbours", extra="usearch")
        graph = usearch.Index.restore(str(self.neighbours), view=True)
        graph.expansion_search = _EXPANSION
        return graph

    def _search_graph(self, queries: Floats, k: int) -> tuple[Floats, Ints]:
        """The graph names more candidates than asked for; their exact scores order them."""
        scores = np.empty((len(queries), k), dtype=np.float32)
        rows = np.empty((len(queries), k), dtype=np.int64)
        for number, query in enumerate(queries):
            near = np.sort(self._graph.search(query, k + _SPARE).keys.astype(np.int64))
            if len(near) < k:  # it lost its way; all of them are compared
                near = np.arange(len(self))
            exact = np.einsum("nd,d->n", self.features[near].astype(np.float64), query.astype(np.float64))
            best = np.argsort(-exact, kind="stable")[:k]
            scores[number], rows[number] = exact[best], near[best]
        return scores, rows


def find_file(root: Path, name: str | os.PathLike[str]) -> Path | None:
    """The file of a picture, with all links followed; None if that lies outside of the folder of the pictures.

    Raises:
        OSError: for links that go round.
        ValueError: for a name with a NUL.
    """
    whole = Path(os.path.realpath(root))
    path = Path(os.path.realpath(whole / name))
    return path if path.is_relative_to(whole) else None


def open_index(path: str | os.PathLike[str]) -> PictureIndex:
    """Opens an index that `m2-search index` wrote.

    Raises:
        UserError: for a missing, unfinished or damaged one, or one of a newer version.
    """
    folder = Path(path).expanduser()
    for attempt in range(_ATTEMPTS):
        content = read_content(folder)
        try:
            return _open(folder, content)
        except FileNotFoundError as error:  # it was replaced between the two reads, or somebody removed a file
            if attempt + 1 == _ATTEMPTS:
                raise UserError(f"{folder}: damaged: {error.filename} is missing; index again") from error
        except (OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            said = " ".join(str(error).split())[:200]
            raise UserError(f"{folder}: damaged ({said}); remove it and index again") from error
    raise AssertionError


def read_content(folder: Path) -> Mapping[str, Any]:
    """What `index.json` holds.

    Raises:
        UserError: as `open_index`.
    """
    file = folder / INDEX_FILE
    try:
        content = json.loads(file.read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(content["format"])
        version = content["version"]
    except NotADirectoryError as error:
        raise UserError(f"{folder}: is a file; give the folder that m2-search index wrote") from error
    except FileNotFoundError as error:
        if not folder.is_dir():
            raise UserError(f"no such index: {folder}; write it with m2-search index PHOTOS output={folder}") from error
        unfinished = (folder / ENCODING_FOLDER).is_dir()
        what = f"PHOTOS output={folder}" if folder.suffix == ".index" or not any(folder.iterdir()) else str(folder)
        none = f"holds no {INDEX_FILE}, so it is no index; write an index with m2-search index {what}"
        raise UserError(
            f"{folder} {'is not finished; m2-search index goes on with it' if unfinished else none}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged, or of something else; remove the folder and index again") from error
    if version != VERSION:
        raise UserError(f"{file}: of version {version}, this program reads {VERSION}; index again to another output")
    return dict(content)


def _open(folder: Path, content: Mapping[str, Any]) -> PictureIndex:
    features = np.load(folder / content["features"], mmap_mode="c", allow_pickle=False)
    names = list(content["names"])
    sizes, times = (np.array(content[key], dtype=np.int64) for key in ("sizes", "times"))
    counts = {len(names), len(sizes), len(times), *features.shape[:1]}
    if len(counts) != 1 or features.ndim != 2 or features.dtype not in (np.float16, np.float32):
        raise UserError(f"{folder}: damaged: {len(names):,} names, features {features.shape}; remove it, index again")
    neighbours = content["neighbours"] and folder / content["neighbours"]
    if neighbours:
        neighbours.stat()
    return PictureIndex(
        path=folder,
        root=Path(content["root"]),
        names=names,
        sizes=sizes,
        times=times,
        features=features,
        made_by=IndexModel(**content["model"]),
        skipped=[Skipped(*each) for each in content["skipped"]],
        neighbours=neighbours or None,
    )
