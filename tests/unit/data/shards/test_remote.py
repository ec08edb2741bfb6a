"""Remote shards from a server that hangs, breaks off, changes or lacks a file; the folder of copies stays bounded."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from m2_encoder.data.order.manifest import SourceSpec, build_manifest
from m2_encoder.data.samples.parse import SampleProblem
from m2_encoder.data.shards.index import INDEX_SUFFIX, IndexHeader, open_index
from m2_encoder.data.shards.reader import ShardReader
from m2_encoder.data.shards.remote import RemoteShards
from m2_encoder.errors import UserError
from tests.support.shard_server import ShardServer, serve_shards
from tests.support.shards import make_image, write_numbers, write_tar
from tests.unit.data.loading.test_stream import make_stream

MANY = 1 << 30


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ShardServer]:
    write_numbers(tmp_path / "served", [4, 4, 4])
    with serve_shards(tmp_path / "served") as server:
        yield server


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2_encoder.data.shards.remote._FIRST_PAUSE_S", 0.01)


def make_remote(tmp_path: Path, **values: float) -> RemoteShards:
    settings = {"max_bytes": MANY, "timeout_s": 1.0, "attempts": 3, **values}
    return RemoteShards(str(tmp_path / "cache"), **settings)  # type: ignore[arg-type]


def test_remote_samples_are_those_of_the_files(tmp_path: Path, server: ShardServer) -> None:
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


def test_an_index_beside_a_remote_shard_saves_its_download(tmp_path: Path, server: ShardServer) -> None:
    open_index(server.folder / "000000.tar")
    reader = ShardReader(remote=make_remote(tmp_path))
    size = reader.measure(server.url("000000.tar"))
    assert size[:2] == (4, (server.folder / "000000.tar").stat().st_size)
    assert server.requests["000000.tar"] == 0
    assert server.requests[f"000000.tar{INDEX_SUFFIX}"] >= 1


@pytest.mark.parametrize("fault", ["hang", "half"])
def test_a_download_that_fails_is_tried_again(tmp_path: Path, server: ShardServer, fault: str) -> None:
    server.faults["000000.tar"] = [fault, fault]
    path = make_remote(tmp_path, timeout_s=0.4).fetch(server.url("000000.tar"))
    assert path.read_bytes() == (server.folder / "000000.tar").read_bytes()
    assert server.requests["000000.tar"] == 3


@pytest.mark.parametrize(("fault", "reason"), [("hang", "remote_timeout"), ("half", "remote_incomplete")])
def test_one_that_always_fails_has_a_reason_and_leaves_nothing(
    tmp_path: Path, server: ShardServer, fault: str, reason: str
) -> None:
    server.faults["000000.tar"] = [fault] * 9
    started = time.monotonic()
    with pytest.raises(SampleProblem) as caught:
        make_remote(tmp_path, timeout_s=0.4).fetch(server.url("000000.tar"))
    assert caught.value.reason == reason
    assert time.monotonic() - started < 10
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_what_is_missing_or_of_another_size_is_not_tried_again(tmp_path: Path, server: ShardServer) -> None:
    remote = make_remote(tmp_path)
    with pytest.raises(SampleProblem, match="shard_missing"):
        remote.fetch(server.url("none.tar"))
    with pytest.raises(SampleProblem, match=r"shard_changed: has \d+ bytes, 77 when the run started"):
        remote.fetch(server.url("000000.tar"), size=77)
    spec = SourceSpec("far", [server.url("000000.tar"), server.url("none.tar")])
    with pytest.raises(UserError, match=r"1 of 2 shards cannot be read: .*none.tar"):
        build_manifest([spec], measure=ShardReader(remote=remote).measure)


def test_the_folder_keeps_what_was_used_last(tmp_path: Path, server: ShardServer) -> None:
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


def test_processes_share_one_download(tmp_path: Path, server: ShardServer) -> None:
    remote = make_remote(tmp_path, timeout_s=60)  # starting a process takes a second on a busy machine
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["m2_encoder.data.shards.remote"])
    processes = [context.Process(target=_fetch, args=(remote, server.url("000000.tar"))) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert server.requests["000000.tar"] == 1


def test_a_stream_fetches_ahead_and_replaces_what_the_remote_withholds(tmp_path: Path, server: ShardServer) -> None:
    reader = ShardReader(remote=make_remote(tmp_path, timeout_s=10, attempts=1))
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
    with pytest.raises(UserError, match=r"max_bytes=0: must be a number, above 0"):
        make_remote(tmp_path, max_bytes=0)


def test_an_attempt_that_was_given_up_does_not_write_into_the_next_one(tmp_path: Path, server: ShardServer) -> None:
    server.faults["000000.tar"] = ["wake", "half"]
    server.pause_s = 1.2
    remote = make_remote(tmp_path, timeout_s=0.6, attempts=3)
    path = remote.fetch(server.url("000000.tar"))
    expected = (server.folder / "000000.tar").read_bytes()
    assert path.read_bytes() == expected
    time.sleep(server.pause_s)
    assert path.read_bytes() == expected


def test_a_server_that_never_answers_is_given_up(tmp_path: Path, server: ShardServer) -> None:
    server.always["000000.tar"] = "silent"
    started = time.monotonic()
    with pytest.raises(OSError, match=r"no byte for 0.3 s"):
        make_remote(tmp_path, timeout_s=0.3, attempts=2).stat(server.url("000000.tar"))
    assert time.monotonic() - started < 5


def test_a_full_folder_ends_the_run_instead_of_blaming_the_server(
    tmp_path: Path, server: ShardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.open

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.suffix == ".partial":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(
        UserError, match=r"data.cache.folder=.*takes no copy \(No space left on device\); make room"
    ) as e:
        make_remote(tmp_path).fetch(server.url("000000.tar"))
    assert not isinstance(e.value, SampleProblem)
    assert server.requests["000000.tar"] <= 1, "trying again would not help"


def test_a_copy_that_another_process_removes_is_fetched_again(
    tmp_path: Path, server: ShardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = make_remote(tmp_path)
    fetch, removed = remote.fetch, []

    def fetch_and_lose(url: str, *, size: int | None = None, tag: int = 0) -> Path:
        path = fetch(url, size=size, tag=tag)
        if len(removed) < 2:
            removed.append(path)
            path.unlink()
        return path

    monkeypatch.setattr(remote, "fetch", fetch_and_lose)
    url = server.url("000000.tar")
    size = (server.folder / "000000.tar").stat().st_size
    assert ShardReader(remote=remote).read(url, 2, size=size).key == "000002"
    assert len(removed) == 2


def test_what_headers_of_remote_shards_tell_is_listed(tmp_path: Path, server: ShardServer) -> None:
    server.tells_version = False
    write_tar(server.folder / "000000.tar", [("alone.png", make_image(1)), ("both.png", b""), ("both.txt", b"x")])
    reader = ShardReader(remote=make_remote(tmp_path))
    url = server.url("000000.tar")
    assert reader.measure(url)[:4] == (0, (server.folder / "000000.tar").stat().st_size, 0, 2)
    faults = {(fault.key, fault.reason) for fault in reader.faults(url)}
    assert faults == {("alone", "missing_caption"), ("both", "empty_member")}
    open_index(server.folder / "000000.tar")
    asked = server.requests["000000.tar"]
    assert {(fault.key, fault.reason) for fault in reader.faults(url)} == faults
    assert server.requests["000000.tar"] == asked, "the index beside it says the same"


def test_a_shard_that_was_replaced_by_one_of_equal_size(tmp_path: Path, server: ShardServer) -> None:
    url, path = server.url("000000.tar"), server.folder / "000000.tar"
    size, written = path.stat().st_size, path.read_bytes()

    def start() -> tuple[ShardReader, IndexHeader]:
        reader = ShardReader(remote=make_remote(tmp_path))
        return reader, reader.measure(url)

    reader, header = start()
    old = reader.read(url, 0, size=size, written=header.written)
    changed = written.replace(old.image[-20:], bytes(20), 1)
    assert len(changed) == size
    path.write_bytes(changed)
    again, now = start()
    assert (now.samples, now.size, now.layout) == (header.samples, header.size, header.layout)
    assert now.written != header.written
    assert again.read(url, 0, size=size, written=now.written).image == old.image[:-20] + bytes(20)
    assert server.requests["000000.tar"] == 2
    assert start()[1] == now
    assert server.requests["000000.tar"] == 2, "what has not changed is not downloaded again"
    with pytest.raises(SampleProblem, match="shard_changed: was replaced on the remote since the run started"):
        ShardReader(remote=make_remote(tmp_path)).read(url, 0, size=size, written=header.written)


def test_a_remote_that_tells_no_version_is_compared_by_size(tmp_path: Path, server: ShardServer) -> None:
    server.tells_version = False
    reader = ShardReader(remote=make_remote(tmp_path))
    header = reader.measure(server.url("000000.tar"))
    assert header.written == 0
    assert reader.read(server.url("000000.tar"), 0, size=header.size).key == "000000"
    assert server.requests["000000.tar"] == 1


def test_a_body_without_an_end_is_cut(tmp_path: Path, server: ShardServer) -> None:
    server.always["000000.tar"] = "endless"
    remote = make_remote(tmp_path, max_bytes=1 << 20, timeout_s=5.0, attempts=1)
    started = time.monotonic()
    with pytest.raises((SampleProblem, UserError)) as caught:
        remote.fetch(server.url("000000.tar"))
    assert time.monotonic() - started < 5
    assert "gives more than 1,048,576 bytes" in str(caught.value)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]
