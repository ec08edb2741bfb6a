"""immich's and MT-Photos' requests as these programs send them, answered by the model that `load` opens."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from m2_encoder import load
from m2_encoder.checkpoints.export import export_model
from m2_encoder.hub import LoadedModel
from m2_encoder.serving.immich import choose_name
from tests.support.serving import Client, small_encoder, small_tokenizer
from tests.unit.serving.conftest import API_KEY

TEXTS = [
    "一只猫",
    "a dog\non  the \t beach",
    "红色的水果 and a cup",
    "",
    "长" * 250,
    "word " * 100,
    "😀",
    "\u3000全角\u3000空格",
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The model of the server from a folder, by the public call."""
    tokenizer = small_tokenizer()
    folder = tmp_path_factory.mktemp("model") / "export"
    return load(export_model(folder, model=small_encoder(tokenizer), tokenizer=tokenizer), pictures="official")


def _pictures() -> dict[str, bytes]:
    """Files as cameras and screenshots make them."""
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 256, (37, 61, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = 6
    made: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "alpha.png": (Image.fromarray(pixels), {}),
        "turned.jpg": (Image.fromarray(pixels[..., :3]), {"exif": exif}),
        "grey.webp": (Image.fromarray(pixels[..., 0]), {}),
        "wide.jpg": (Image.fromarray(pixels[:4, :, :3]), {}),
    }
    contents = {}
    for name, (image, options) in made.items():
        buffer = io.BytesIO()
        image.save(buffer, {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[name.rpartition(".")[2]], **options)
        contents[name] = buffer.getvalue()
    return contents


def _cosine(one: Any, other: Any) -> float:
    one, other = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def _text_job(model: str = "ViT-B-32__openai") -> str:
    return json.dumps({"clip": {"textual": {"modelName": model, "options": {"language": "zh-CN"}}}})


def _picture_job(model: str = "ViT-B-32__openai") -> str:
    return json.dumps({"clip": {"visual": {"modelName": model}}})


def test_immich_sees_its_own_server(server: Client) -> None:
    ping = server.get("/ping")
    assert (ping.status, ping.body) == (200, b"pong")
    assert server.get("/").json == {"message": "Immich ML"}
    assert server.get("/", Accept="*/*").json == {"message": "Immich ML"}


@pytest.mark.parametrize("text", TEXTS)
def test_immich_texts(server: Client, loaded: LoadedModel, text: str) -> None:
    answer = server.send_form("/predict", {"entries": _text_job(), "text": text})
    assert answer.status == 200, answer.body
    assert list(answer.json) == ["clip"]
    assert re.fullmatch(r"\[[-0-9., e]+\]", answer.json["clip"]), "pgvector reads a list of numbers in brackets"
    vector = json.loads(answer.json["clip"])
    with torch.no_grad():
        (wanted,) = loaded.model.encode_text(loaded.tokenizer([text])).numpy()
    assert len(vector) == 512
    assert not any(vector[16:])
    assert _cosine(vector[:16], wanted) >= 0.9999
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["alpha.png", "turned.jpg", "grey.webp", "wide.jpg"])
def test_immich_pictures(server: Client, loaded: LoadedModel, name: str) -> None:
    content = _pictures()[name]
    answer = server.send_form("/predict", {"entries": _picture_job("ViT-L-14__openai"), "image": content})
    assert answer.status == 200, answer.body
    height = 4 if name == "wide.jpg" else 37
    assert (answer.json["imageWidth"], answer.json["imageHeight"]) == (61, height)
    vector = json.loads(answer.json["clip"])
    with torch.no_grad():
        (wanted,) = loaded.model.encode_image(loaded.preprocess(content)[None]).numpy()
    assert len(vector) == 768
    assert _cosine(vector[:16], wanted) >= 0.9999


@pytest.mark.parametrize(
    ("fields", "status", "said"),
    [
        ({"entries": json.dumps({"facial-recognition": {"detection": {"modelName": "buffalo_l"}}}), "image": b"x"},
         501, "facial-recognition is not answered here"),
        ({"entries": json.dumps({"ocr": {}}), "image": b"x"}, 501, "ocr is not answered here"),
        ({"entries": _text_job("XLM-Roberta-Large-Vit-B-16Plus"), "text": "猫"},
         422, "choose one of: ViT-B-32__openai, ViT-L-14__openai"),
        ({"entries": _text_job(), "image": b"x"}, 400, "needs the field text"),
        ({"entries": _picture_job(), "text": "猫"}, 400, "needs the file image"),
        ({"entries": _picture_job(), "image": b"no picture"}, 415, "cannot be used: not an image"),
        ({"text": "猫"}, 422, "entries is missing"),
        ({"entries": "{", "text": "猫"}, 400, "entries is no JSON"),
        ({"entries": "{}", "text": "猫"}, 422, "must be one job"),
        ({"entries": '{"clip": {"textual": 3}}', "text": "猫"}, 422, "must have a modelName"),
    ],
)  # fmt: skip
def test_immich_asks_its_next_server_for_the_rest(
    server: Client, fields: dict[str, str | bytes], status: int, said: str
) -> None:
    answer = server.send_form("/predict", fields)
    assert answer.status == status
    assert said in answer.json["detail"]


def test_the_model_to_choose_in_immich() -> None:
    assert [choose_name(width) for width in (16, 512, 513, 768, 1024, 1025)] == [
        "ViT-B-32__openai", "ViT-B-32__openai", "ViT-L-14__openai", "ViT-L-14__openai",
        "ViT-H-14__laion2b-s32b-b79k", None,
    ]  # fmt: skip


def test_mt_photos(server: Client, loaded: LoadedModel) -> None:
    assert server.ask("POST", "/check", api_key=API_KEY).json["result"] == "pass"
    for text in TEXTS:
        answer = server.post("/clip/txt", {"text": text}, api_key=API_KEY)
        assert answer.status == 200, answer.body
        assert all(re.fullmatch(r"-?\d\.\d{16}", each) for each in answer.json["result"])
        with torch.no_grad():
            (wanted,) = loaded.model.encode_text(loaded.tokenizer([text])).numpy()
        assert len(answer.json["result"]) == 512
        assert _cosine([float(each) for each in answer.json["result"][:16]], wanted) >= 0.9999
    for content in _pictures().values():
        answer = server.send_form("/clip/img", {"file": content}, api_key=API_KEY)
        with torch.no_grad():
            (wanted,) = loaded.model.encode_image(loaded.preprocess(content)[None]).numpy()
        assert _cosine([float(each) for each in answer.json["result"][:16]], wanted) >= 0.9999
        assert {*answer.json["result"][16:]} == {f"{0:.16f}"}


def test_mt_photos_needs_its_key(server: Client, photo: Path) -> None:
    wrong: list[dict[str, str]] = [{}, {"api_key": ""}, {"api_key": "wrong"}, {"api_key": "sésame"}]
    for headers in wrong:
        answers = (
            server.ask("POST", "/check", **headers),
            server.post("/clip/txt", {"text": "猫"}, **headers),
            server.send_form("/clip/img", {"file": photo.read_bytes()}, **headers),
        )
        for answer in answers:
            assert (answer.status, answer.json["code"], answer.json["result"]) == (401, "wrong_key", [])
            assert answer.json["msg"] == answer.json["detail"]


def test_mt_photos_is_told_what_is_wrong(server: Client) -> None:
    for body, status in (({}, 422), ({"text": 3}, 422), ([], 422)):
        answer = server.post("/clip/txt", body, api_key=API_KEY)
        assert (answer.status, answer.json["result"]) == (status, [])
    answer = server.send_form("/clip/img", {"file": b"GIF89a" + bytes(20)}, api_key=API_KEY)
    assert (answer.status, answer.json["code"]) == (415, "no_picture")
