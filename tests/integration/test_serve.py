"""m2-serve as a process of its own, from which no other machine can be reached."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("python_multipart", reason="needs the extra serve")

from m2_encoder import load
from m2_encoder.picture_search.model import open_search_model
from m2_encoder.picture_search.update import update_index
from tests.support.graphs import small_graphs
from tests.support.serving import Answer, Client, write_picture

# Python imports this module first: no socket of the process connects, or looks up, beyond this machine.
NO_NETWORK = """
import ipaddress, socket, sys
def refuse(address):
    host = address[0] if isinstance(address, tuple) else "127.0.0.1"
    if not ipaddress.ip_address(host).is_loopback:
        print("CONNECTED TO", address, file=sys.stderr, flush=True)
        raise ConnectionRefusedError(address)
def hook(event, arguments):
    if event == "socket.connect":
        refuse(arguments[1])
    elif event == "socket.getaddrinfo" and arguments[0] not in (None, "localhost", "127.0.0.1", "::1"):
        print("LOOKED UP", arguments, file=sys.stderr, flush=True)
        raise socket.gaierror(arguments)
sys.addaudithook(hook)
"""
START = "import sys; from m2_encoder.cli import commands; sys.exit(commands.SERVE())"


class Started:
    """A server, and what it prints."""

    def __init__(self, process: subprocess.Popen[str], errors: Path) -> None:
        self.process, self.errors = process, errors
        assert process.stdout is not None
        self.line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/", self.line)
        assert found, self.line + errors.read_text(encoding="utf-8")
        self.client = Client(found[0])

    def resident_mb(self) -> float:
        """Memory of the process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024


RUNTIMES = {"torch": "torch", "onnx": "ONNX Runtime"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with graphs, twelve pictures and their index."""
    folder = tmp_path_factory.mktemp("serve")
    shutil.copytree(small_graphs(tmp_path_factory), folder / "export")
    for seed in range(12):
        write_picture(folder / "photos" / f"{seed:02}.png", seed)
    update_index(folder / "photos.index", folder / "photos", open_search_model(folder / "export"), num_workers=0)
    (folder / "secret.png").write_bytes((folder / "photos" / "00.png").read_bytes())
    return folder


@contextlib.contextmanager
def _start(
    folder: Path, repo_root: Path, *, name: str, first: str = "", given: tuple[str, ...] = ("index=photos.index",)
) -> Iterator[Started]:
    """The command, with the defaults of all but the port; `first` runs before anything in its process."""
    offline, errors = folder / name, folder / f"{name}.txt"
    offline.mkdir()
    (offline / "sitecustomize.py").write_text(first, encoding="utf-8")
    paths = [str(offline), str(repo_root / "src"), *filter(None, sys.path)]
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", START, *given, "port=0", "api_key=sesame"],
            stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        ) as process,
    ):  # fmt: skip
        try:
            yield Started(process, errors)
        finally:
            process.kill()


def _ask_all(client: Client, folder: Path, number: int) -> Answer:
    """One of all kinds of requests."""
    photo = (folder / "photos" / f"{number % 12:02}.png").read_bytes()
    visual = json.dumps({"clip": {"visual": {"modelName": "ViT-B-32__openai"}}})
    match number % 10:
        case 0:
            return client.post("/api/search", {"query": f"红色的水果 {number}"})
        case 1:
            return client.send_form("/predict", {"entries": visual, "image": photo})
        case 2:
            return client.post("/clip/txt", {"text": f"a dog {number}"}, api_key="sesame")
        case 3:
            return client.post("/api/similar", {"name": f"{number % 12:02}.png"})
        case 4:
            return client.get(f"/api/thumbnails/{number % 12:02}.png?size={(320, 1600)[number % 2]}")
        case 5:
            return client.send_form("/api/search", {"image": photo, "query": "猫"})
        case 6:
            return client.get("/api/files/..%2fsecret.png")
        case 7:
            return client.send_form("/predict", {"entries": visual, "image": photo[: number % len(photo)]})
        case 8:
            return client.ask("POST", "/api/search", photo, Content_Type="multipart/form-data; boundary=b")
        case _:
            return client.get(f"/api/files/{number % 12:02}.png")


GOOD = (0, 1, 2, 3, 4, 5, 9)


@pytest.mark.parametrize("runtime", ["torch", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_process_answers_all_doors_at_once_and_ends_by_ctrl_c(folder: Path, repo_root: Path, runtime: str) -> None:
    given = ("index=photos.index", f"runtime={runtime}")
    with _start(folder, repo_root, name=f"offline-{runtime}", first=NO_NETWORK, given=given) as started:
        client = started.client
        assert started.line.startswith("12 pictures, ")
        assert f"export on {RUNTIMES[runtime]}: http" in started.line
        assert client.get("/api/status").json["runtime"] == runtime
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda number: _ask_all(client, folder, number), range(80)))
        for number, answer in enumerate(answers):
            assert (answer.status == 200) == (number % 10 in GOOD), (number, answer)
            assert answer.status < 500
        loaded = load(folder / "export")
        with torch.no_grad():
            wanted = loaded.model.encode_text(loaded.tokenizer(["a dog 12"]))[0].numpy()
        cosine = np.array([float(each) for each in answers[12].json["result"][:16]]) @ wanted
        assert cosine >= 0.9999
        assert b"<title>" in client.get("/", Accept="text/html").body
        started.process.send_signal(signal.SIGINT)
        assert started.process.wait(20) == 0
        assert started.errors.read_text(encoding="utf-8") == "m2-serve: ended\n", (
            "nothing was looked up or connected to"
        )


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_memory_stays_flat_over_thousands_of_requests(folder: Path, repo_root: Path, runtime: str) -> None:
    given = ("index=photos.index", f"runtime={runtime}")
    with (
        _start(folder, repo_root, name=f"long-{runtime}", given=given) as started,
        ThreadPoolExecutor(8) as pool,
    ):
        sizes = []
        for part in range(6):
            numbers = range(part * 1000, part * 1000 + 1000)
            for answer in pool.map(lambda number: _ask_all(started.client, folder, number), numbers):
                assert answer.status < 500
            time.sleep(0.2)
            sizes.append(started.resident_mb())
        assert sizes[-1] - sizes[1] < 15, sizes
        assert len(list(Path(f"/proc/{started.process.pid}/fd").iterdir())) < 60
    assert started.errors.read_text(encoding="utf-8") == ""


@pytest.mark.slow
def test_the_built_in_drawings_are_indexed_once(folder: Path, repo_root: Path) -> None:
    given = ("index=drawings", f"model={folder / 'export'}")
    with _start(folder, repo_root, name="drawings", given=given) as started:
        assert started.line.startswith("7,074 pictures, ")
        found = started.client.post("/api/search", {"query": "红苹果", "count": 1}).json["results"]
        assert started.client.get(f"/api/thumbnails/{quote(found[0]['name'])}").status == 200
    (made,) = (folder / "outputs" / "drawings").glob("*.index/features-*.npy")
    with _start(folder, repo_root, name="again", given=given) as started:
        assert started.line.startswith("7,074 pictures, ")
    assert [*made.parent.glob("features-*.npy")] == [made]
