"""Weights behind a URL: fetched once into a cache folder, resumable, verified.

The only module behind `load` that touches the network: for a URL that somebody gives, or released weights by name that
are not on this machine (`checkpoints.released`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http
import http.client
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urldefrag, urlsplit

from m2_encoder.errors import CheckpointError, DamagedError
from m2_encoder.files import file_sha256

CACHE_VARIABLE = "M2_ENCODER_CACHE"
"""Environment variable that names the cache folder; `~/.cache/m2_encoder` otherwise."""

_CHUNK_BYTES = 1 << 20
_MAX_BYTES = 1 << 38  # where the server tells no length; the largest published model has 41 GB
_LOGGER = logging.getLogger(__name__)


def is_url(source: str | os.PathLike[str]) -> bool:
    """True for http(s) addresses; everything else is a path."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def cache_folder() -> Path:
    """Where downloads live; it need not exist yet."""
    configured = os.environ.get(CACHE_VARIABLE)
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "m2_encoder"


def download(
    url: str,
    *,
    folder: str | os.PathLike[str] | None = None,
    timeout_s: float = 30.0,
    check: Callable[[Path], object] | None = None,
) -> Path:
    """Fetch a file, or find it in the cache.

    An interrupted download leaves a `.part` file, and beside it a `.tag` with the server's ETag or Last-Modified. The
    next call continues there if the server can, and still has that file. The final name appears only once the length,
    and the hash if one is known, are right. Two processes that want the same file wait for each other. A fragment
    `#sha256=<64 hex digits>` of the url is verified, of a copy in the cache, too; so is, of what was fetched, the hash
    that a hub sends (`X-Linked-Etag`): Hugging Face with its redirection, ModelScope with the file.
    `timeout_s` is the longest silence of the server. `check` raises a `CheckpointError` for a file that is no such
    file, as a page of an error served in its place; that file is not kept.

    Raises:
        CheckpointError: if the download fails, the hash is another one, or the disk refuses.
    """
    try:
        address, fragment = urldefrag(url)
        target = _target(url, folder)
    except ValueError as error:
        raise CheckpointError(f"cannot download {url}: {error}") from error
    sha256 = _expected_sha256(fragment, url)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(_lock_of(target)):
            if sha256 is not None and target.is_file() and file_sha256(target) != sha256:
                _LOGGER.warning("%s: its copy %s has changed since; downloaded again", address, target)
                target.unlink()  # whoever reads it keeps what was opened
            if not target.is_file():
                _LOGGER.warning("downloading %s to %s", address, target)  # commands show nothing below a warning
                _fetch(address, target, sha256=sha256, timeout_s=timeout_s, check=check)
    except urllib.error.HTTPError as error:
        error.close()
        raise CheckpointError(
            f"cannot download {address}: the server says {error.code} {_line(error.reason)}"
        ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = getattr(error, "reason", None) or error
        raise CheckpointError(f"cannot download {address}: {_line(reason)}") from error
    return target


def find_downloaded(url: str) -> Path | None:
    """The file of a url in the cache, if an earlier download was finished; the network is not used.

    A url that ends in a hash has none where the copy has another one.
    """
    target, sha256 = _target(url), _expected_sha256(urldefrag(url)[1], url)
    if not target.is_file() or (sha256 is not None and file_sha256(target) != sha256):
        return None
    return target


def drop_part(url: str) -> None:
    """Remove what a download that broke off left in the cache, unless it goes on in another process."""
    target = _target(url)
    if _part_of(target).is_file():
        with contextlib.suppress(OSError), _exclusive(_lock_of(target), fcntl.LOCK_NB):
            _drop(_part_of(target))


@contextlib.contextmanager
def removing_damaged(path: Path) -> Iterator[None]:
    """Remove a file that turns out damaged inside, if `download` put it into the cache: it would be found there again.

    Raises:
        CheckpointError: that of the inside, which then says so.
    """
    try:
        yield
    except DamagedError as error:
        if path.parent != cache_folder() or not _lock_of(path).is_file():
            raise
        path.unlink(missing_ok=True)
        said = "it was removed from the cache of downloads, run it again to fetch it"
        raise CheckpointError(f"{error.text}; {said}") from error


def _target(url: str, folder: str | os.PathLike[str] | None = None) -> Path:
    """The hash of the whole url is in the name, so different files never collide."""
    name = Path(unquote(urlsplit(urldefrag(url)[0]).path)).name or "weights"
    return Path(folder or cache_folder()) / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"


def _part_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def _tag_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.tag")


def _lock_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.lock")


def _drop(part: Path) -> None:
    part.unlink(missing_ok=True)
    _tag_of(part).unlink(missing_ok=True)


def _line(text: object) -> str:
    return " ".join(str(text).split())


@contextlib.contextmanager
def _exclusive(path: Path, flags: int = 0) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | flags)
        yield


def _expected_sha256(fragment: str, url: str) -> str | None:
    if not fragment:
        return None
    match = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    if not match:
        raise CheckpointError(f"{url}: cannot verify {fragment!r}; append #sha256=<64 hex digits> or nothing")
    return match.group(1).lower()


def _fetch(
    address: str, target: Path, *, sha256: str | None, timeout_s: float, check: Callable[[Path], object] | None
) -> None:
    """Download into `.part`, continuing an earlier one, check it and rename it."""
    part = _part_of(target)
    response, offset, linked = _continue(address, part, timeout_s)
    with response:
        total = _total_bytes(response, offset)
        if not offset:
            _drop(part)
            _tag_of(part).write_text(_identity(response), "utf-8")  # before the part: none lies beside another's tag
        with part.open("r+b" if offset else "wb") as file:
            file.seek(offset)
            while chunk := response.read(_CHUNK_BYTES):
                file.write(chunk)
                if file.tell() > (total or _MAX_BYTES):  # a body without an end
                    break
            received = file.tell()
    if received > (total or _MAX_BYTES):
        _drop(part)
        raise CheckpointError(
            f"cannot use {address}: the server sent more than {total or _MAX_BYTES:,} bytes; it was deleted"
        )
    if total is not None and received != total:
        no_mark = ", from the start: the server sends neither ETag nor Last-Modified"
        raise CheckpointError(
            f"cannot download {address}: the connection ended after {received:,} of {total:,} bytes; "
            f"run it again{' to continue' if _identity(response) else no_mark}"
        )
    if received == 0:
        _drop(part)
        raise CheckpointError(f"cannot download {address}: the server sent an empty file")
    _verify(part, sha256 or linked, address)
    if check is not None:
        try:
            check(part)
        except CheckpointError as error:
            _drop(part)
            reason = str(error).removeprefix(f"{part}: ")
            raise CheckpointError(f"cannot use {address}: what the server sent is {reason}; it was deleted") from error
    os.replace(part, target)
    _tag_of(part).unlink()


class _Redirections(urllib.request.HTTPRedirectHandler):
    """Follows them, and keeps the hash that a hub sends with the first one."""

    inf_msg = "in a loop of redirections: "
    sha256: str | None = None

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        self.sha256 = self.sha256 or _linked_sha256(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Answer(NamedTuple):
    response: Any
    offset: int  # in the file, of its first byte
    sha256: str | None  # of the whole file, as a hub says


def _continue(address: str, part: Path, timeout_s: float) -> _Answer:
    """The rest of the file that a part is of, if the server still has it, or else what it has now."""
    tag = _tag_of(part)
    known = _printable(tag.read_text("utf-8", "replace")) if tag.is_file() else ""
    offset = part.stat().st_size if known and part.is_file() else 0
    if not offset:
        return _open(address, 0, {}, timeout_s)
    try:
        answer = _open(address, offset, {"Range": f"bytes={offset}-", "If-Range": known}, timeout_s)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        return _open(address, 0, {}, timeout_s)
    if answer.response.status != http.HTTPStatus.PARTIAL_CONTENT:
        return answer._replace(offset=0)
    begins_there = answer.response.headers.get("Content-Range", "").startswith(f"bytes {offset}-")
    if begins_there and _identity(answer.response) == known:
        return answer
    answer.response.close()  # a server that heeds neither If-Range nor where the range begins
    return _open(address, 0, {}, timeout_s)


def _open(address: str, offset: int, more_headers: dict[str, str], timeout_s: float) -> _Answer:
    headers = {"User-Agent": "m2-encoder", "Accept-Encoding": "identity", **more_headers}
    redirections = _Redirections()
    opener = urllib.request.build_opener(redirections)  # with the proxies of the environment
    response = opener.open(urllib.request.Request(address, headers=headers), timeout=timeout_s)
    return _Answer(response, offset, redirections.sha256 or _linked_sha256(response.headers))


def _linked_sha256(headers: Any) -> str | None:
    found = re.fullmatch(r'"?([0-9a-fA-F]{64})"?', headers.get("X-Linked-Etag") or "")
    return found and found[1].lower()


def _identity(response: Any) -> str:
    """What tells this file from another one at the same address (RFC 9110, 13.1.5); empty if nothing does."""
    tag = response.headers.get("ETag") or ""
    is_strong = tag.startswith('"')
    return _printable(tag if is_strong else response.headers.get("Last-Modified") or "")


def _printable(text: str) -> str:
    return text if re.fullmatch(r"[ -~]*", text) else ""


def _total_bytes(response: Any, offset: int) -> int | None:
    """Length of the whole file, if the server tells; refuses a range that starts elsewhere."""
    if response.status == http.HTTPStatus.PARTIAL_CONTENT:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if not match or int(match.group(1)) != offset:
            raise CheckpointError(f"cannot download {response.url}: the server sent another range than asked for")
        if match.group(2) != "*":
            return int(match.group(2))
    length = response.headers.get("Content-Length")
    return None if length is None else offset + int(length)


def _verify(part: Path, sha256: str | None, address: str) -> None:
    if sha256 is not None and (found := file_sha256(part)) != sha256:
        _drop(part)
        raise CheckpointError(f"cannot use {address}: its sha256 is {found}, expected {sha256}; the file was deleted")
