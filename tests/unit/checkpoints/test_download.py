"""Weights behind a URL, from a local server with every fault."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from m2_encoder import CheckpointError
from m2_encoder.checkpoints.download import cache_folder, download, is_url
from m2_encoder.checkpoints.weight_files import check_download
from tests.support.file_server import FileServer, serve

CONTENT = bytes(range(256)) * 12_000  # three chunks
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serve(CONTENT) as running:
        yield running


def _part(folder: Path) -> Path:
    (part,) = folder.glob("*.part")
    return part


def test_file_is_fetched_once(server: FileServer, tmp_path: Path) -> None:
    path = download(server.url(), folder=tmp_path)
    assert path.read_bytes() == CONTENT
    assert path.name.endswith("-weights.ckpt")
    assert download(server.url(), folder=tmp_path) == path
    assert len(server.requested_ranges) == 1
    assert not list(tmp_path.glob("*.part"))


def test_addresses_do_not_collide(server: FileServer, tmp_path: Path) -> None:
    first = download(server.url("a/weights.ckpt"), folder=tmp_path)
    server.content = b"other"
    assert download(server.url("b/weights.ckpt"), folder=tmp_path).read_bytes() == b"other"
    assert first.read_bytes() == CONTENT


def test_interrupted_download_is_continued(server: FileServer, tmp_path: Path) -> None:
    server.stop_after = 1_000_000
    with pytest.raises(CheckpointError, match=r"ended after 1,000,000 of 3,072,000 bytes; run it again"):
        download(server.url(), folder=tmp_path)
    assert _part(tmp_path).stat().st_size == 1_000_000
    with pytest.raises(CheckpointError, match="ended after 2,000,000 of 3,072,000"):
        download(server.url(), folder=tmp_path)
    server.stop_after = None
    assert download(f"{server.url()}", folder=tmp_path).read_bytes() == CONTENT
    assert server.requested_ranges == [None, "bytes=1000000-", "bytes=2000000-"]


def _break_off(server: FileServer, folder: Path, said: str = "run it again to continue") -> None:
    server.stop_after = 1_000_000
    with pytest.raises(CheckpointError, match=f"ended after 1,000,000 .*{said}$"):
        download(server.url(), folder=folder)
    server.stop_after = None


OTHER = bytes(len(CONTENT))
"""A file of the same length."""


@pytest.mark.parametrize("heeds", [True, False])
@pytest.mark.parametrize("modified", [None, "Wed, 21 Oct 2026 07:28:00 GMT"])
def test_a_file_that_was_replaced_meanwhile_is_fetched_from_its_start(
    server: FileServer, tmp_path: Path, heeds: bool, modified: str | None
) -> None:
    server.heeds_conditions, server.tagged, server.modified = heeds, modified is None, modified
    _break_off(server, tmp_path)
    server.content = OTHER
    server.modified = modified and "Wed, 21 Oct 2026 07:28:02 GMT"
    assert download(server.url(), folder=tmp_path).read_bytes() == OTHER
    assert server.requested_ranges == [None, "bytes=1000000-", None][: 2 if heeds else 3]
    assert server.requested_conditions[0] is None
    assert server.requested_conditions[1] == (modified or f'"{SHA256[:8]}"')
    assert {path.suffix for path in tmp_path.iterdir()} == {".ckpt", ".lock"}


def test_what_begins_anew_is_continued_by_its_own_mark(server: FileServer, tmp_path: Path) -> None:
    _break_off(server, tmp_path)
    server.content = OTHER
    _break_off(server, tmp_path)
    assert download(server.url(), folder=tmp_path).read_bytes() == OTHER
    assert server.requested_ranges == [None, "bytes=1000000-", "bytes=1000000-"]


def test_a_server_that_sends_another_range_is_asked_for_all(server: FileServer, tmp_path: Path) -> None:
    server.wrong_ranges = True
    _break_off(server, tmp_path)
    assert download(server.url(), folder=tmp_path).read_bytes() == CONTENT
    assert server.requested_ranges == [None, "bytes=1000000-", None]


def test_a_date_is_enough_to_continue(server: FileServer, tmp_path: Path) -> None:
    server.tagged, server.modified = False, "Wed, 21 Oct 2026 07:28:00 GMT"
    _break_off(server, tmp_path)
    assert download(server.url(), folder=tmp_path).read_bytes() == CONTENT
    assert server.requested_ranges == [None, "bytes=1000000-"]


def test_without_a_mark_of_the_file_it_starts_again(server: FileServer, tmp_path: Path) -> None:
    server.tagged = False
    _break_off(server, tmp_path, "run it again, from the start: the server sends neither ETag nor Last-Modified")
    assert download(server.url(), folder=tmp_path).read_bytes() == CONTENT
    assert server.requested_ranges == [None, None]


@pytest.mark.parametrize("mark", [None, b"", b"\xff\x00\n"])
def test_a_part_whose_mark_is_lost_starts_again(server: FileServer, tmp_path: Path, mark: bytes | None) -> None:
    _break_off(server, tmp_path)
    (tag,) = tmp_path.glob("*.tag")
    tag.unlink() if mark is None else tag.write_bytes(mark)
    assert download(server.url(), folder=tmp_path).read_bytes() == CONTENT
    assert server.requested_ranges == [None, None]


def test_server_that_cannot_continue_starts_again(server: FileServer, tmp_path: Path) -> None:
    server.stop_after, server.ranges = 1_000_000, False
    with pytest.raises(CheckpointError, match="ended after 1,000,000"):
        download(server.url(), folder=tmp_path)
    server.stop_after = None
    assert download(server.url(), folder=tmp_path).read_bytes() == CONTENT


def test_part_that_is_longer_than_the_file_is_dropped(server: FileServer, tmp_path: Path) -> None:
    server.stop_after = 1_000_000
    with pytest.raises(CheckpointError):
        download(server.url(), folder=tmp_path)
    server.stop_after, server.content = None, b"shorter now"
    assert download(server.url(), folder=tmp_path).read_bytes() == b"shorter now"


def test_server_that_tells_no_length(server: FileServer, tmp_path: Path) -> None:
    server.with_length = False
    assert download(server.url(), folder=tmp_path).read_bytes() == CONTENT


def test_hash(server: FileServer, tmp_path: Path) -> None:
    path = download(f"{server.url()}#sha256={SHA256.upper()}", folder=tmp_path)
    assert path.read_bytes() == CONTENT


def test_a_copy_that_lost_its_hash_is_fetched_again(
    server: FileServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"{server.url()}#sha256={SHA256}"
    path = download(url, folder=tmp_path)
    path.write_bytes(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    assert download(url, folder=tmp_path).read_bytes() == CONTENT
    assert f"its copy {path} has changed since; downloaded again" in caplog.text


def test_wrong_hash_is_refused_and_leaves_nothing(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"its sha256 is {SHA256}, expected {'0' * 64}"):
        download(f"{server.url()}#sha256={'0' * 64}", folder=tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_hash_covers_what_an_earlier_call_fetched(server: FileServer, tmp_path: Path) -> None:
    server.stop_after = 1_000_000
    url = f"{server.url()}#sha256={SHA256}"
    with pytest.raises(CheckpointError, match="ended after"):
        download(url, folder=tmp_path)
    _part(tmp_path).write_bytes(b"x" * 1_000_000)
    server.stop_after = None
    with pytest.raises(CheckpointError, match="its sha256 is"):
        download(url, folder=tmp_path)
    assert download(url, folder=tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("fragment", ["sha256=abc", "md5=0", "anything"])
def test_fragment_that_cannot_be_verified(server: FileServer, tmp_path: Path, fragment: str) -> None:
    with pytest.raises(CheckpointError, match=f"cannot verify '{fragment}'"):
        download(f"{server.url()}#{fragment}", folder=tmp_path)
    assert not server.requested_ranges


@pytest.mark.parametrize("status", [403, 404, 500])
def test_server_refuses(server: FileServer, tmp_path: Path, status: int) -> None:
    server.status = status
    with pytest.raises(CheckpointError, match=f"the server says {status}") as caught:
        download(server.url(), folder=tmp_path)
    assert server.url() in str(caught.value)


def test_a_loop_of_redirections_is_one_line(server: FileServer, tmp_path: Path) -> None:
    server.loops = True
    with pytest.raises(CheckpointError) as caught:
        download(server.url(), folder=tmp_path)
    assert str(caught.value) == f"cannot download {server.url()}: the server says 302 in a loop of redirections: Found"


@pytest.mark.parametrize("by_store", [True, False])
def test_the_hash_that_a_hub_sends_is_verified(server: FileServer, tmp_path: Path, by_store: bool) -> None:
    server.linked, server.linked_by_store = "0" * 64, by_store
    with pytest.raises(CheckpointError, match=f"its sha256 is {SHA256}, expected {'0' * 64}; the file was deleted"):
        download(server.url(), folder=tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    server.linked = SHA256
    assert download(server.url(), folder=tmp_path).read_bytes() == CONTENT


def test_empty_answer(server: FileServer, tmp_path: Path) -> None:
    server.stop_after, server.with_length = 0, False
    with pytest.raises(CheckpointError, match="the server sent an empty file"):
        download(server.url(), folder=tmp_path)


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(CheckpointError, match=f"cannot download http://127.0.0.1:{port}/w: .*refused"):
            download(f"http://127.0.0.1:{port}/w", folder=tmp_path)


def test_silent_server_times_out(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/w"
        with pytest.raises(CheckpointError, match="timed out"):
            download(url, folder=tmp_path, timeout_s=0.1)


@pytest.mark.parametrize("url", ["http://", "http://[::1", "http://host:port/w"])
def test_malformed_address(tmp_path: Path, url: str) -> None:
    with pytest.raises(CheckpointError, match="cannot download"):
        download(url, folder=tmp_path)


def test_callers_wait_for_each_other(server: FileServer, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: download(server.url(), folder=tmp_path), range(4)))
    assert len(set(paths)) == 1
    assert paths[0].read_bytes() == CONTENT
    assert len(server.requested_ranges) == 1


def test_folder_that_cannot_be_written(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot download"):
        download(server.url(), folder=tmp_path / "file")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("M2_ENCODER_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("M2_ENCODER_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "m2_encoder"


def test_what_is_a_url() -> None:
    assert is_url("https://host/file")
    assert is_url("HTTP://host/file")
    assert not is_url("file:///etc/passwd")
    assert not is_url("weights/http.ckpt")
    assert not is_url(Path("http://host"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<html>Please log in</html>\n" * 50, "not a checkpoint"),
        (b'{"error": "not found"}', "JSON, no weights"),
        (b"PK\x03\x04" + bytes(1000), "damaged"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{" + bytes(100), "damaged"),
    ],
)
def test_a_wrong_page_served_as_weights_is_not_kept(
    server: FileServer, tmp_path: Path, content: bytes, said: str
) -> None:
    server.content = content
    server.with_length = False
    with pytest.raises(CheckpointError, match=rf"cannot use http://.*: what the server sent is {said}.*it was deleted"):
        download(server.url(), folder=tmp_path, check=check_download)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_weights_that_are_whole_are_kept(server: FileServer, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "a.ckpt")
    server.content = (tmp_path / "a.ckpt").read_bytes()
    assert download(server.url(), folder=tmp_path / "cache", check=check_download).read_bytes() == server.content


def test_a_body_without_an_end_is_cut(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.with_length = False
    monkeypatch.setattr("m2_encoder.checkpoints.download._MAX_BYTES", 1 << 20)
    with pytest.raises(CheckpointError, match="sent more than 1,048,576 bytes; it was deleted"):
        download(server.url(), folder=tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
