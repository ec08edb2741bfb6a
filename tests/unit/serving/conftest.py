"""A server in a thread, with an index in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("python_multipart", reason="needs the extra serve")

from m2_encoder.evaluation.models.base import EvaluatedModel
from m2_encoder.evaluation.models.onnx_model import open_graphs
from m2_encoder.picture_search.index import PictureIndex
from m2_encoder.serving.app import ServerLimits, build_app
from tests.support.graphs import small_graphs
from tests.support.serving import Client, encode_files, index_in_memory, running, small_model, write_picture

API_KEY = "sesame"
LIMITS = ServerLimits(batch_size=8, max_body_bytes=2**20, max_waiting=32)


@pytest.fixture(scope="session")
def model() -> EvaluatedModel:
    return small_model()


@pytest.fixture(scope="session")
def index(model: EvaluatedModel, tmp_path_factory: pytest.TempPathFactory) -> PictureIndex:
    """Thirty pictures; read-only by agreement."""
    root = tmp_path_factory.mktemp("photos")
    names = [
        *(f"beach/{number}.png" for number in range(25)),
        *(f"我的 图片/{number} #?%41.jpg" for number in range(4)),
        "two\nlines\n.jpg",
    ]
    for seed, name in enumerate(names):
        write_picture(root / name, seed)
    return index_in_memory(root, names, encode_files(root, names, model))


@pytest.fixture(scope="session", params=["torch", "onnx"])
def server(
    request: pytest.FixtureRequest, model: EvaluatedModel, index: PictureIndex, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    """By both runtimes, from the same weights."""
    served = model if request.param == "torch" else open_graphs(small_graphs(tmp_path_factory), name="small")
    app = build_app(served, index=index, api_key=API_KEY, only_loopback=True, limits=LIMITS)
    with running(app) as client:
        yield client


@pytest.fixture
def photo(index: PictureIndex) -> Path:
    """A file that is in the index."""
    return index.root / "beach/3.png"
