"""Remote shards from a server that hangs, breaks off, changes or lacks a file; the folder of copies stays bounded."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from m2_encoder.data.content import SampleProblem
from m2_encoder.data.manifest import SourceSpec, build_manifest
from m2_encoder.data.reading import ShardReader
from m2_encoder.data.remote import RemoteShards
from m2_encoder.data.shard_index import INDEX_SUFFIX, open_index
from m2_encoder.errors import UserError
from tests.support.shards import write_numbers
from tests.unit.data.test_stream import make_stream

MANY = 1 << 30


class Server(ThreadingHTTPServer):
    """Serves a folder; a file may misbehave for its next so many requests."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: dict[str, list[str]] = {}
        self.requests: Counter[str] = Counter()
        self.stop = threading.Event()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self._head()

    def do_GET(self) -> None:
        name = self.path.strip("/")
        self.server.requests[name] += 1
        content = self._head()
        fault = self.server.faults.get(name, [])
        what = fault.pop(0) if fault else ""
        if what == "hang":
            self.wfile.write(content[:100])
            self.server.stop.wait(20)
        elif what == "half":
            self.wfile.write(content[: len(content) // 2])
        else:
            self.wfile.write(content)

    def _head(self) -> bytes:
        path = self.server.folder / self.path.strip("/")
        if not path.is_file():
            self.send_error(404)
            return b""
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return content

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    write_numbers(tmp_path / "served", [4, 4, 4])
    server = Server(tmp_path / "served")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2_encoder.data.remote._FIRST_PAUSE_S", 0.01)


def make_remote(tmp_path: Path, **values: float) -> RemoteShards:
    settings = {"max_bytes": MANY, "timeout_s": 1.0, "attempts": 3, **values}
    return RemoteShards(str(tmp_path / "cache"), **settings)  # type: ignore[arg-type]


def test_remote_samples_are_those_of_the_files(tmp_path: Path, server: Server) -> None:
    reader = ShardReader(remote=make_remote(tmp_path))
    spec = SourceSpec("far", server.url("{000000..000002}.tar"))
    manifest = build_manifest([spec], measure=reader.measure)
    assert manifest.sources[0].counts.tolist() == [4, 4, 4]
    local = ShardReader()
    for shard, size in zip(manifest.sources[0].shards, manifest.sources[0].sizes.tolist(), strict=True):
        path = server.folder / shard.rpartition("/")[2]
        for number in range(4):
            assert reader.read(shard, number, size=size) == local.read(str(path), number, size=size)
    assert server.requests["000001.tar"] == 1


def test_an_index_beside_a_remote_shard_saves_its_download(tmp_path: Path, server: Server) -> None:
    open_index(server.folder / "000000.tar")
    reader = ShardReader(remote=make_remote(tmp_path))
    size = reader.measure(server.url("000000.tar"))
    assert size[:2] == (4, (server.folder / "000000.tar").stat().st_size)
    assert server.requests["000000.tar"] == 0
    assert server.requests[f"000000.tar{INDEX_SUFFIX}"] >= 1


@pytest.mark.parametrize("fault", ["hang", "half"])
def test_a_download_that_fails_is_tried_again(tmp_path: Path, server: Server, fault: str) -> None:
    server.faults["000000.tar"] = [fault, fault]
    path = make_remote(tmp_path, timeout_s=0.4).fetch(server.url("000000.tar"))
    assert path.read_bytes() == (server.folder / "000000.tar").read_bytes()
    assert server.requests["000000.tar"] == 3


@pytest.mark.parametrize(("fault", "reason"), [("hang", "remote_timeout"), ("half", "remote_incomplete")])
def test_one_that_always_fails_has_a_reason_and_leaves_nothing(
    tmp_path: Path, server: Server, fault: str, reason: str
) -> None:
    server.faults["000000.tar"] = [fault] * 9
    started = time.monotonic()
    with pytest.raises(SampleProblem) as caught:
        make_remote(tmp_path, timeout_s=0.4).fetch(server.url("000000.tar"))
    assert caught.value.reason == reason
    assert time.monotonic() - started < 10
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_what_is_missing_or_of_another_size_is_not_tried_again(tmp_path: Path, server: Server) -> None:
    remote = make_remote(tmp_path)
    with pytest.raises(SampleProblem, match="shard_missing"):
        remote.fetch(server.url("none.tar"))
    with pytest.raises(SampleProblem, match=r"shard_changed: has \d+ bytes, 77 when the run started"):
        remote.fetch(server.url("000000.tar"), size=77)
    spec = SourceSpec("far", [server.url("000000.tar"), server.url("none.tar")])
    with pytest.raises(UserError, match=r"1 of 2 shards cannot be read: .*none.tar"):
        build_manifest([spec], measure=ShardReader(remote=remote).measure)


def test_the_folder_keeps_what_was_used_last(tmp_path: Path, server: Server) -> None:
    size = (server.folder / "000000.tar").stat().st_size
    remote = make_remote(tmp_path, max_bytes=int(2.5 * size))
    urls = [server.url(f"00000{i}.tar") for i in range(3)]
    first, second = remote.fetch(urls[0]), remote.fetch(urls[1])
    open_index(second)
    time.sleep(0.02)
    remote.fetch(urls[0])
    third = remote.fetch(urls[2])
    assert (first.exists(), second.exists(), third.exists()) == (True, False, True)
    assert not second.with_name(second.name + INDEX_SUFFIX).exists()


def _fetch(remote: RemoteShards, url: str) -> None:
    remote.fetch(url)


def test_processes_share_one_download(tmp_path: Path, server: Server) -> None:
    remote = make_remote(tmp_path)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_fetch, args=(remote, server.url("000000.tar"))) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert server.requests["000000.tar"] == 1


def test_a_stream_fetches_ahead_and_replaces_what_the_remote_withholds(tmp_path: Path, server: Server) -> None:
    reader = ShardReader(remote=make_remote(tmp_path, timeout_s=0.3, attempts=1))
    spec = SourceSpec("far", server.url("{000000..000002}.tar"))
    manifest = build_manifest([spec], measure=reader.measure)
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    server.faults["000001.tar"] = ["half"] * 99
    local = make_stream(server.folder)
    plan = type(local._plan)(manifest, seed=1, lanes=1, window=40)
    stream = type(local)(
        plan, reader=reader, captions=local._captions, decode=local._decode, transform=local._transform
    )
    stream = pickle.loads(pickle.dumps(stream))  # as a worker gets it
    deliveries = [stream[position] for position in range(24)]
    faults = {(f.shard, f.key, f.reason) for d in deliveries for f in d.faults}
    assert faults == {(server.url("000001.tar"), None, "remote_incomplete")}
    assert {int(d.sample.key) // 4 for d in deliveries} == {0, 2}
    assert server.requests["000001.tar"] < 20, "a shard that failed is not asked for again at once"


def test_a_url_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"give data.cache.folder"):
        ShardReader().measure("http://127.0.0.1:9/a.tar")
    with pytest.raises(UserError, match=r"data.cache.max_bytes=0 must be above 0"):
        make_remote(tmp_path, max_bytes=0)
