"""A small model, pictures with an index in memory, a server on loopback, and requests as other programs write them."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import torch
import uvicorn
from PIL import Image
from starlette.applications import Starlette

from m2_encoder import M2Encoder, M2EncoderConfig
from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.evaluation.models.base import EvaluatedModel
from m2_encoder.evaluation.models.own import wrap_towers
from m2_encoder.picture_search.index import IndexModel, PictureIndex
from m2_encoder.serving.server import listen, url_of
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer


def small_tokenizer() -> SentencePieceTokenizer:
    """The embedded one."""
    return SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=24)


def small_encoder(tokenizer: SentencePieceTokenizer) -> M2Encoder:
    """Random weights, features of 16 numbers."""
    config = M2EncoderConfig.from_name(
        "tiny", embed_dim=32, num_heads=2, num_layers=1, feature_dim=16, image_size=32,
        vocab_size=tokenizer.vocab_size,
    )  # fmt: skip
    torch.manual_seed(0)
    return M2Encoder(config).eval()


def small_model() -> EvaluatedModel:
    """Both, as servers take them."""
    tokenizer = small_tokenizer()
    return wrap_towers(small_encoder(tokenizer), EvalTransform(32), tokenizer, name="small")


def index_in_memory(root: Path, names: list[str], features: npt.NDArray[np.float32]) -> PictureIndex:
    """An index that was never on disk."""
    unknown = np.zeros(len(names), dtype=np.int64)
    made_by = IndexModel("small", None, None, "official", "")
    return PictureIndex(
        path=root, root=root, names=names, sizes=unknown, times=unknown, features=features, made_by=made_by,
        skipped=[], neighbours=None,
    )  # fmt: skip


def write_picture(path: Path, seed: int, size: tuple[int, int] = (60, 40)) -> Path:
    """A picture of noise in soft colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size).save(path)
    return path


def encode_files(root: Path, names: list[str], model: EvaluatedModel) -> npt.NDArray[np.float32]:
    """Features of picture files, (n, 16)."""
    assert model.model is not None
    with torch.no_grad():
        return model.model.encode_image(torch.stack([model.preprocess(root / name) for name in names])).numpy()


class Answer(NamedTuple):
    """Of a server."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """Requests to one server, each on a connection of its own; the path is sent as it is given."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.host, self.port = str(urlsplit(url).hostname), int(urlsplit(url).port or 0)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body=body, headers=named)
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, **headers)

    def post(self, path: str, values: Any, **headers: str) -> Answer:
        return self.ask("POST", path, json.dumps(values).encode(), Content_Type="application/json", **headers)

    def send_form(self, path: str, fields: Mapping[str, str | bytes], **headers: str) -> Answer:
        """A form as `FormData` of Node and of browsers writes it: bytes are a file named blob."""
        boundary = "----formdata-undici-042113371337"
        return self.ask("POST", path, write_form(fields, boundary),
                        Content_Type=f"multipart/form-data; boundary={boundary}", **headers)  # fmt: skip


def write_form(fields: Mapping[str, str | bytes], boundary: str) -> bytes:
    """A body of multipart/form-data."""
    parts = []
    for name, value in fields.items():
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"'
        if isinstance(value, bytes):
            parts.append(f'{head}; filename="blob"\r\nContent-Type: application/octet-stream\r\n\r\n'.encode() + value)
        else:
            parts.append(f"{head}\r\n\r\n".encode() + value.encode("utf-8", "surrogatepass"))
        parts.append(b"\r\n")
    return b"".join(parts) + f"--{boundary}--\r\n".encode()


@contextlib.contextmanager
def running(app: Starlette, port: int = 0) -> Iterator[Client]:
    """A server in a thread of this process."""
    opened = listen("127.0.0.1", port)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="critical", ws="none", http="h11", lifespan="on", timeout_graceful_shutdown=2)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            threading.Event().wait(0.01)
        yield Client(url_of(opened, "127.0.0.1"))
    finally:
        server.should_exit = True
        thread.join()
