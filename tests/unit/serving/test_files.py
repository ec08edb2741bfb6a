"""Which files are served, and how they are shown."""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from m2_encoder.evaluation.models.base import EvaluatedModel
from m2_encoder.picture_search.index import PictureIndex
from m2_encoder.picture_search.thumbnails import make_thumbnail
from m2_encoder.serving.app import build_app
from tests.support.serving import Client, encode_files, index_in_memory, running, write_picture
from tests.unit.serving.conftest import LIMITS

SECRET = b"\x89PNG\r\n\x1a\n the secret of another folder"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures beside what nobody may see."""
    root = tmp_path / "photos"
    write_picture(root / "a.png", 1)
    write_picture(root / "deep" / "b.jpg", 2)
    (tmp_path / "secret.png").write_bytes(SECRET)
    (tmp_path / "photos.old").mkdir()
    (tmp_path / "photos.old" / "c.png").write_bytes(SECRET)
    return root


@pytest.fixture
def client(model: EvaluatedModel, folder: Path) -> Iterator[Client]:
    """Serves an index that names files in every bad way, as a damaged one might."""
    (folder / "out.png").symlink_to("../secret.png")
    (folder / "away").symlink_to("..")
    (folder / "in.png").symlink_to("deep/b.jpg")
    (folder / "gone.png").symlink_to("nothing")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "folder.png").mkdir()
    (folder / "page.png").write_text("<html><script>alert(1)</script></html>")
    (folder / "drawing.png").write_text("<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>")
    os.mkfifo(folder / "pipe.png")
    names = [
        "a.png", "deep/b.jpg", "in.png", "out.png", "away/secret.png", "gone.png", "loop.png", "folder.png",
        "page.png", "drawing.png", "pipe.png", "../secret.png", str(folder.parent / "secret.png"),
        "../photos.old/c.png", "deep/../../secret.png", "nul\0.png",
    ]  # fmt: skip
    index = index_in_memory(folder, names, np.eye(len(names), 16, dtype=np.float32))
    app = build_app(model, index=index, api_key=None, only_loopback=True, limits=LIMITS)
    with running(app) as client:
        yield client


def test_only_pictures_below_the_folder_are_served(client: Client, folder: Path) -> None:
    for name in ("a.png", "deep/b.jpg", "in.png"):
        answer = client.get(f"/api/files/{name}")
        assert (answer.status, answer.body) == (200, (folder / name).read_bytes()), name
        assert answer.headers["content-type"] == ("image/png" if name == "a.png" else "image/jpeg")
        assert client.get(f"/api/thumbnails/{name}").status == 200
    refused = {
        "out.png": 404, "away/secret.png": 404, "gone.png": 404, "loop.png": 404, "folder.png": 404, "page.png": 415,
        "drawing.png": 415, "../secret.png": 404, "../photos.old/c.png": 404, "deep/../../secret.png": 404,
        str(folder.parent / "secret.png"): 404, "nul\0.png": 404,
    }  # fmt: skip
    for name, status in refused.items():
        for kind in ("files", "thumbnails"):
            for written in {quote(name), quote(name, safe="")}:
                answer = client.get(f"/api/{kind}/{written}")
                assert answer.status == status, (kind, written, answer)
                assert b"secret of" not in answer.body
                assert answer.headers["content-type"] == "application/json"


def test_a_pipe_does_not_hold_up_the_server(client: Client) -> None:
    assert client.get("/api/files/pipe.png").status == 415
    assert client.get("/api/thumbnails/pipe.png").status == 415


@pytest.mark.parametrize(
    "path",
    [
        "/api/files/../../secret.png", "/api/files/..%2fsecret.png", "/api/files/%2e%2e/secret.png",
        "/api/files/..%5csecret.png", "/api/files/%252e%252e%252fsecret.png", "/api/files//etc/passwd",
        "/api/files/%2fetc%2fpasswd", "/api/files/a.png/../../secret.png", "/api/files/a.png%00.jpg",
        "/api/files/file:///etc/passwd", "/api/files/%c0%ae%c0%ae/secret.png", "/api/files/", "/api/files/a.png/",
        "/api/files/A.PNG", "/../../../etc/passwd", "//etc/passwd", "/assets/../search.html",
    ],
)  # fmt: skip
def test_addresses_that_climb(server: Client, path: str) -> None:
    """Sent as they are written, which clients that tidy them up would not do."""
    with socket.create_connection((server.host, server.port), timeout=20) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.split()[1] in (b"404", b"400")
    assert b"root:" not in answer


def test_a_file_that_is_gone_or_changed_since(client: Client, folder: Path) -> None:
    before = client.get("/api/thumbnails/a.png")
    again = client.get("/api/thumbnails/a.png", If_None_Match=before.headers["etag"])
    assert (again.status, again.body) == (304, b"")
    write_picture(folder / "a.png", 9, size=(90, 50))
    changed = client.get("/api/thumbnails/a.png", If_None_Match=before.headers["etag"])
    assert changed.status == 200
    assert changed.body != before.body
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:200])
    cut = client.get("/api/thumbnails/a.png")
    assert (cut.status, cut.json["code"]) == (415, "no_picture")
    (folder / "a.png").unlink()
    assert client.get("/api/thumbnails/a.png").json["code"] == "gone"
    assert client.get("/api/files/a.png").json["code"] == "gone"


@pytest.mark.parametrize("name", ["我的 图片/3 #?%41.jpg", "two\nlines\n.jpg"])
def test_names_with_any_sign(server: Client, index: PictureIndex, name: str) -> None:
    assert server.get(f"/api/files/{quote(name)}").body == (index.root / name).read_bytes()
    assert server.get(f"/api/thumbnails/{quote(name)}").status == 200


def test_thumbnails(server: Client) -> None:
    answer = server.get("/api/thumbnails/beach/1.png?size=1600")
    with Image.open(io.BytesIO(answer.body)) as image:
        assert (image.format, image.size) == ("JPEG", (60, 40)), "nothing is enlarged"
    for size in ("0", "321", "99999", "x", "-320", "3.2e2"):
        assert server.get(f"/api/thumbnails/beach/1.png?size={size}").status == 422


def test_a_thumbnail_is_upright_and_on_white() -> None:
    pixels = np.zeros((400, 800, 4), dtype=np.uint8)
    pixels[:, :400] = (255, 0, 0, 255)
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned: left is up
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    with Image.open(io.BytesIO(make_thumbnail(buffer.getvalue(), 320))) as image:
        assert image.size == (160, 320)
        up, down = image.getpixel((80, 40)), image.getpixel((80, 280))
    assert isinstance(up, tuple)
    assert isinstance(down, tuple)
    assert up[0] > 240
    assert max(up[1:]) < 20
    assert min(down) > 240


def test_a_phone_s_heic_is_shown_and_found(model: EvaluatedModel, index: PictureIndex, tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif", reason="needs the extra heic")
    with Image.open(index.root / "beach/3.png") as image:
        heif.from_pillow(image.convert("RGB")).save(tmp_path / "a.heic", quality=95)
    write_picture(tmp_path / "b.png", 50)
    names = ["a.heic", "b.png"]
    made = index_in_memory(tmp_path, names, encode_files(tmp_path, names, model))
    app = build_app(model, index=made, api_key=None, only_loopback=True, limits=LIMITS)
    with running(app) as client:
        assert client.get("/api/thumbnails/a.heic").headers["content-type"] == "image/jpeg"
        assert client.get("/api/files/a.heic").headers["content-type"] == "image/heic"
        found = client.send_form("/api/search", {"image": (tmp_path / "a.heic").read_bytes()}).json
    assert found["results"][0] == {"name": "a.heic", "score": pytest.approx(1, abs=1e-5)}


def test_a_file_may_be_read_in_parts(server: Client, photo: Path) -> None:
    answer = server.get("/api/files/beach/3.png", Range="bytes=10-19")
    assert (answer.status, answer.body) == (206, photo.read_bytes()[10:20])
    assert server.get("/api/files/beach/3.png", Range="bytes=-10").body == photo.read_bytes()[-10:]


@pytest.mark.parametrize("part", ["bytes=x", "bytes=9-3", "bytes=-0", "bytes=0-1,4-5", "lines=1-2", "bytes=1-x", "x"])
def test_a_part_that_makes_no_sense_is_the_whole_file(server: Client, photo: Path, part: str) -> None:
    answer = server.get("/api/files/beach/3.png", Range=part)
    assert (answer.status, answer.body) == (200, photo.read_bytes())


def test_a_part_after_the_end(server: Client, photo: Path) -> None:
    answer = server.get("/api/files/beach/3.png", Range="bytes=99999999-")
    assert (answer.status, answer.json["code"]) == (416, "no_such_part")
    assert answer.headers["content-range"] == f"bytes */{photo.stat().st_size}"


@pytest.mark.parametrize("path", ["/api/files/beach/3.png", "/api/thumbnails/beach/3.png"])
def test_what_the_client_has_is_not_sent_again(server: Client, path: str) -> None:
    tag = server.get(path).headers["etag"]
    for given in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = server.get(path, If_None_Match=given)
        assert (again.status, again.body, again.headers["etag"]) == (304, b"", tag)
    assert server.get(path, If_None_Match='"other"').status == 200
