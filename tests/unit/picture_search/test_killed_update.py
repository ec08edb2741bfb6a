"""A process that dies at each of its writes leaves the old index or the new one, and the next one goes on."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from m2_encoder.errors import UserError
from m2_encoder.picture_search.index import INDEX_FILE, open_index
from m2_encoder.picture_search.model import SearchModel
from m2_encoder.picture_search.update import Changes, update_index
from tests.support.pictures import FEATURE_DIM, write_picture

WRITES = ("replace", "pwrite", "unlink", "rmdir", "ftruncate", "fsync", "mkdir")


class Means:
    """Encodes a picture to the means of its stripes: quick, and without threads that a fork would lose."""

    def encode_image(self, images: Tensor) -> Tensor:
        stripes = images.float().mean(dim=(1, 2)).unflatten(1, (FEATURE_DIM, -1)).mean(dim=2)
        return torch.nn.functional.normalize(stripes - 127, dim=1)

    def encode_text(self, text: Any) -> Tensor:
        raise NotImplementedError


@pytest.fixture
def quick(model: SearchModel) -> SearchModel:
    return model._replace(encoder=dataclasses.replace(model.encoder, model=Means()))


def dying(number: int, work: Callable[[], Changes]) -> bool:
    """Whether a child finishes its work before its n-th write, at which it dies."""
    pid = os.fork()
    if pid == 0:
        left = iter(range(number))
        for name in WRITES:
            setattr(os, name, _counted(getattr(os, name), left))
        work()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) == 0


def _counted(function: Callable[..., Any], left: Iterator[int]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return call


def expected(photos: Path, quick: SearchModel) -> dict[str, np.ndarray]:
    names = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.*") if path.is_file())
    encode: Any = quick.encoder.model
    return {name: encode.encode_image(quick.encoder.preprocess(photos / name)[None])[0].numpy() for name in names}


def require(path: Path, features: dict[str, np.ndarray]) -> None:
    index = open_index(path)
    assert index.names == list(features)
    np.testing.assert_allclose(index.features, np.stack([*features.values()]), atol=1e-6)


def test_death_at_every_write(tmp_path: Path, photos: Path, quick: SearchModel) -> None:
    path, deaths = tmp_path / "i", 0

    def update() -> Changes:
        return update_index(path, photos, quick, dtype="float32", batch_size=2, num_workers=0)

    first = expected(photos, quick)
    while not dying(deaths, update):
        deaths += 1
        if (path / INDEX_FILE).exists():
            require(path, first)
        else:
            with pytest.raises(UserError, match=r"no such index|is not finished|no index\.json"):
                open_index(path)
    assert deaths >= 8
    require(path, first)
    for name, seed in (("new.png", 20), ("b.png", 21)):
        write_picture(photos / name, seed)
    (photos / "a.jpg").unlink()
    second, deaths = expected(photos, quick), 0
    while not dying(deaths, update):
        deaths += 1
        require(path, first if open_index(path).names == list(first) else second)
    assert deaths >= 8
    require(path, second)
    assert update() == Changes(new=0, changed=0, deleted=0, unchanged=5, skipped=[])
    assert sorted(each.name.partition("-")[0] for each in path.iterdir()) == ["features", INDEX_FILE]
