"""Bodies, pictures, queues and hosts: what is too much is refused by a clear answer, and the server goes on."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import json
import re
import socket
import threading
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m2_encoder.evaluation.models.base import EvaluatedModel
from m2_encoder.picture_search.index import PictureIndex
from m2_encoder.serving import bodies
from m2_encoder.serving.app import ServerLimits, build_app
from m2_encoder.serving.guard import is_loopback
from tests.support.serving import Client, running, write_form
from tests.unit.serving.conftest import LIMITS


def _exchange(client: Client, *parts: bytes) -> bytes:
    """The raw answer to raw bytes."""
    with socket.create_connection((client.host, client.port), timeout=20) as connection:
        for part in parts:
            connection.sendall(part)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_a_large_body_is_refused_by_its_length_and_the_answer_arrives(server: Client) -> None:
    answer = server.send_form("/predict", {"image": bytes(3 * LIMITS.max_body_bytes)})
    assert (answer.status, answer.json["code"]) == (413, "too_large")
    assert f"at most {LIMITS.max_body_bytes:,} are read" in answer.json["detail"]
    assert server.get("/ping").status == 200


def test_a_large_body_without_a_length_is_refused_as_well(server: Client) -> None:
    head = (
        "POST /api/search HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
    )
    start = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    chunks = [start, *[bytes(2**16)] * 20, b"\r\n--x--\r\n", b""]
    sent = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    answer = _exchange(server, head.encode() + sent)
    assert answer.split()[1] == b"413"
    assert b"more than 1,048,576 bytes" in answer


def test_json_of_a_megabyte_is_too_long(model: EvaluatedModel) -> None:
    app = build_app(model, index=None, api_key=None, only_loopback=True, limits=ServerLimits())
    with running(app) as client:
        answer = client.post("/api/embed", {"texts": ["x" * (2**20 + 1)]})
        assert (answer.status, answer.json["code"]) == (413, "too_large")
        answer = client.post("/api/embed", {"texts": ["x" * 10_001]})
        assert (answer.status, answer.json["code"]) == (413, "too_long")
        for texts in ([], ["x"] * 65, "x", [1], None):
            assert client.post("/api/embed", {"texts": texts}).status == 422


def test_a_body_that_never_arrives(server: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "TIMEOUT_S", 0.1)
    for kind in ("application/json", "multipart/form-data; boundary=x"):
        path = "search" if kind.startswith("multi") else "similar"
        head = f"POST /api/{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 900\r\n"
        answer = _exchange(server, f"{head}Content-Type: {kind}\r\n\r\n--x".encode())
        assert answer.split()[1] == b"408", answer
        assert b"did not arrive" in answer


def test_bodies_that_stop_arriving_make_room(
    model: EvaluatedModel, index: PictureIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "IDLE_S", 0.3)
    limits = dataclasses.replace(LIMITS, max_waiting=2)
    app = build_app(model, index=index, api_key=None, only_loopback=True, limits=limits)
    head = (
        "POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{"
    )
    with running(app) as client, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection((client.host, client.port), 20)) for _ in range(2)]
        for each in idle:
            each.sendall(head.encode())
        for each in idle:
            assert each.recv(65536).split()[1] == b"408"
        assert client.post("/api/search", {"query": "cat"}).status == 200


def _bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["cut", "empty", "text", "bomb", "header"])
def test_pictures_that_cannot_be_used(server: Client, photo: Path, kind: str) -> None:
    small = {
        "cut": photo.read_bytes()[:200],
        "empty": b"",
        "text": "这不是图片".encode(),
        "header": b"\xff\xd8\xff" + bytes(50),
    }
    content = _bomb() if kind == "bomb" else small[kind]
    for path in ("/api/search", "/api/embed"):
        answer = server.send_form(path, {"image": content})
        assert (answer.status, answer.json["code"]) == (415, "no_picture"), answer
        assert "the picture cannot be used: " in answer.json["detail"]


class _Stuck:
    """A model that does not come back before it is told to."""

    def __init__(self, model: Any) -> None:
        self._model, self.may_go, self.reached = model, threading.Event(), threading.Event()

    def encode_text(self, text: Any) -> Any:
        self.reached.set()
        assert self.may_go.wait(20)
        return self._model.encode_text(text)


def test_a_crowd_is_told_to_come_back(model: EvaluatedModel) -> None:
    stuck = _Stuck(model.model)
    limits = ServerLimits(batch_size=2, max_body_bytes=2**16, max_waiting=4)
    slow = dataclasses.replace(model, model=stuck)  # type: ignore[arg-type]
    app = build_app(slow, index=None, api_key=None, only_loopback=True, limits=limits)
    answers: list[Any] = []
    with running(app) as client:
        ask = [threading.Thread(target=lambda: answers.append(client.post("/api/embed", {"texts": ["猫"]})))
               for _ in range(12)]  # fmt: skip
        for thread in ask:
            thread.start()
        assert stuck.reached.wait(10)
        while len(answers) < 8:
            threading.Event().wait(0.01)
        refused = [answer for answer in answers if answer.status == 503]
        assert len(refused) == len(answers) == 8
        assert all(answer.headers["retry-after"] == "1" and answer.json["code"] == "busy" for answer in refused)
        assert client.get("/ping").status == 200, "immich may still ask whether it lives"
        stuck.may_go.set()
        for thread in ask:
            thread.join()
        assert sorted(answer.status for answer in answers) == [200] * 4 + [503] * 8
        assert client.post("/api/embed", {"texts": ["猫"]}).status == 200


def test_a_model_with_broken_weights_says_so(model: EvaluatedModel, index: PictureIndex, photo: Path) -> None:
    class Broken:
        def encode_image(self, images: Any) -> Any:
            return images.float().mean(dim=(1, 2, 3))[:, None].expand(-1, 16) * float("nan")

    app = build_app(dataclasses.replace(model, model=Broken()), index=index, api_key=None,  # type: ignore[arg-type]
                    only_loopback=True, limits=LIMITS)  # fmt: skip
    with running(app) as client:
        answer = client.send_form("/api/search", {"image": photo.read_bytes()})
        assert (answer.status, answer.json["code"]) == (500, "broken_model")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("localhost:8600", 200), ("LOCALHOST:1", 200), ("127.0.0.1", 200), ("[::1]:8600", 200),
        ("evil.example", 403), ("evil.example:8600", 403), ("127.0.0.1.evil.example", 403), ("localhost.evil", 403),
        ("192.168.0.4", 403), ("", 403),
    ],
)  # fmt: skip
def test_names_of_other_hosts_are_refused_on_loopback(server: Client, host: str, status: int) -> None:
    for path in ("/", "/api/pictures", "/api/files/beach/0.png"):
        assert server.get(path, Host=host).status == status


def test_any_name_may_be_used_elsewhere(model: EvaluatedModel) -> None:
    app = build_app(model, index=None, api_key=None, only_loopback=False, limits=LIMITS)
    with running(app) as client:
        assert client.get("/ping", Host="nas.home:3003").status == 200
    assert is_loopback("127.3.4.5")
    assert is_loopback("::1")
    assert not is_loopback("0.0.0.0")
    assert not is_loopback("nas.home")


def test_browsers_run_nothing_but_the_page_itself(server: Client) -> None:
    for path in ("/", "/api"):
        answer = server.get(path, Accept="text/html,application/xhtml+xml,*/*;q=0.8")
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert not re.findall(rb"""(?:src|href)=["'](?:https?:)?//""", answer.body)
        assert not re.search(rb"\son[a-z]+=[\"']", answer.body), "scripts in attributes would not run"
    for path in ("/api/files/beach/0.png", "/api/thumbnails/beach/0.png", "/api/status", "/nothing"):
        headers = server.get(path).headers
        assert headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'; sandbox"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in headers


def test_the_page_has_the_same_words_in_both_languages() -> None:
    html = (files("m2_encoder") / "assets" / "serving" / "search.html").read_text(encoding="utf-8")
    chinese, english = (html.partition(f"  {name}: {{ brand")[2].partition("not_image")[0] for name in ("zh", "en"))
    keys = [re.findall(r"(?:[{,]|^)\s*([a-z_]+):", each, re.MULTILINE) for each in (chinese, english)]
    assert keys[0] == keys[1]
    assert len(keys[0]) > 30
    used = set(re.findall(r'data-(?:text|title)="([a-z]+)"', html))
    assert used <= {*keys[0], "brand"}


def _malformed(rng: np.random.Generator, photo: bytes) -> tuple[str, str, bytes, dict[str, str]]:
    """A request that is broken somehow."""
    path = str(
        rng.choice(["/predict", "/api/search", "/api/similar", "/api/embed", "/clip/img", "/clip/txt", "/check"])
    )
    entries = json.dumps({"clip": {"visual": {"modelName": "ViT-B-32__openai"}}})
    body = write_form({"entries": entries, "image": photo, "file": photo, "query": "猫"}, "b")
    kind = int(rng.integers(8))
    if kind == 0:  # a form that is cut
        body = body[: rng.integers(len(body))]
    elif kind == 1:  # bytes that are turned
        changed = bytearray(body)
        for place in rng.integers(len(body), size=rng.integers(1, 40)):
            changed[place] = rng.integers(256)
        body = bytes(changed)
    elif kind == 2:  # random bytes
        body = rng.bytes(int(rng.integers(2000)))
    elif kind == 3:  # JSON that is cut or odd
        odd = [b'{"query": "\\ud800"}', b"[" * 5000, b"{}", b"null", b'{"texts": [[]]}', b'{"query": 1e999}', b"NaN",
               b'{"name": null}', b'{"text": {}}', b'{"query": "a", "count": 1e3}', b"\xff\xfe{\0"]  # fmt: skip
        body = odd[rng.integers(len(odd))]
    elif kind == 4:
        body = b""
    types = ["multipart/form-data; boundary=b", "multipart/form-data", "multipart/form-data; boundary=", "text/plain",
             "application/json", "application/json; charset=utf-99", "", "multipart/form-data; boundary=" + "b" * 300,
             "multipart/form-data; boundary=b; charset=utf-99"]  # fmt: skip
    headers = {"Content-Type": str(rng.choice(types)), "api-key": "sesame"}
    return path, str(rng.choice(["POST", "POST", "POST", "PUT", "DELETE"])), body, headers


def test_hundreds_of_malformed_requests(server: Client, photo: Path) -> None:
    rng = np.random.default_rng(20240126)
    statuses = set()
    for number in range(400):
        path, method, body, headers = _malformed(rng, photo.read_bytes())
        answer = server.ask(method, path, body, **headers)
        statuses.add(answer.status)
        assert answer.status < 500, (number, method, path, headers, body[:300], answer)
        assert answer.status == 200 or (answer.json["code"] and answer.json["detail"]), number
    assert {200, 400, 405, 415, 422} <= statuses
    assert server.post("/api/search", {"query": "猫"}).status == 200


def test_bytes_that_are_no_http(server: Client) -> None:
    rng = np.random.default_rng(3)
    for start in (
        b"",
        b"GET / HTTP/1.1\r\n",
        b"POST /predict HTTP/1.1\r\nContent-Length: -1\r\n",
        b"GET " + b"/" * 99_999,
    ):
        answer = _exchange(server, start + rng.bytes(300) + b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 4") or answer == b"", answer[:200]
    with socket.create_connection((server.host, server.port)) as connection:  # hangs up in the middle
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nabc")
    assert server.get("/ping").status == 200


def test_late_bodies_leave_no_task_cancelled() -> None:
    async def read() -> str:
        async with bodies._in_time():
            await asyncio.sleep(0)
        return "read"

    assert asyncio.run(read()) == "read"
