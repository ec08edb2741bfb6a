"""Features of files, in the place of a model: looked up by the name of a picture, or by a text.

`.safetensors` and `.parquet` as m2-embed writes them; `.npz` with the arrays `features`, (N, E), and `names`, (N,);
`.npy`, (N, E), with the names beside it, one a line, in a `.txt` of the same name.

Letters: N features · E feature dim.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from m2_encoder.errors import UserError, abridge, name_some
from m2_encoder.evaluation.feature_file import SUFFIXES, read_features

_ALL_SUFFIXES = (*SUFFIXES, ".npz", ".npy")


class NamedFeatures(NamedTuple):
    """Content of one file."""

    path: Path
    features: Tensor  # L2-normalised fp32, (N, E)
    rows: dict[str, int]  # by name

    def look_up(self, names: Sequence[str], what: str) -> Tensor:
        """Features by name, (len(names), E).

        Raises:
            UserError: naming those that the file lacks.
        """
        missing = [name for name in dict.fromkeys(names) if name not in self.rows]
        if missing:
            held = f"it holds {len(self.rows):,}, such as {name_some(list(self.rows), 2)}"
            raise UserError(
                f"{self.path} lacks {len(missing):,} of {len(set(names)):,} {what}: {name_some(missing)}; {held}; "
                "names must be those of the set"
            )
        return self.features[[self.rows[name] for name in names]]


class FeatureTable(NamedTuple):
    """Files of features of one model."""

    pictures: NamedFeatures
    texts: NamedFeatures | None


def read_named_features(path: Path) -> NamedFeatures:
    """Reads one file; features are normalised.

    Raises:
        UserError: for a file that is missing, of another kind or damaged, features that are no finite numbers, and
            names that are not as many, or stand for different features.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected features in {', '.join(_ALL_SUFFIXES)}")
    if path.suffix not in _ALL_SUFFIXES:
        raise UserError(f"{path}: must end in {', '.join(_ALL_SUFFIXES)}")
    if path.suffix in SUFFIXES:
        content = read_features(path)
        features, names = content.features.float(), content.names
    else:
        features, names = _read_numpy(path)
    if features.ndim != 2 or len(features) != len(names) or not len(names):
        raise UserError(f"{path}: features of shape {tuple(features.shape)} for {len(names):,} names; expected (N, E)")
    if broken := [name for name, good in zip(names, features.isfinite().all(dim=1).tolist(), strict=True) if not good]:
        raise UserError(f"{path}: features that are not finite: {name_some(broken)}; make the file again")
    rows: dict[str, int] = {}
    for row, name in enumerate(names):
        if not torch.equal(features[rows.setdefault(name, row)], features[row]):
            raise UserError(f"{path}: two different features are called {abridge(name, 120)!r}; names must be unique")
    return NamedFeatures(path, functional.normalize(features, dim=-1), rows)


def _read_numpy(path: Path) -> tuple[Tensor, tuple[str, ...]]:
    beside = path.with_suffix(".txt")
    try:
        loaded = np.load(path, allow_pickle=False)
        if path.suffix == ".npz":
            with loaded:
                if {"features", "names"} - set(loaded.files):
                    found = ", ".join(loaded.files) or "nothing"
                    raise UserError(f"{path}: expected the arrays features and names, found {found}")
                features, names = loaded["features"], [str(name) for name in loaded["names"].tolist()]
        else:
            features, names = loaded, beside.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        return torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32)), tuple(names)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: its names are missing; write them to {beside}, one a line") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is no {path.suffix} of numbers with names: {said}") from error
