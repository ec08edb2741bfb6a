"""Weights behind a URL: fetched once into a cache folder, resumable, verified.

The only module behind `load` that touches the network: for a URL that somebody gives, or released weights by name that
are not on this machine (`checkpoints.released`).
"""

from __future__ import annotations

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
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

from m2_encoder.errors import CheckpointError
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

    An interrupted download leaves a `.part` file, and the next call continues there if the server can. The final name
    appears only once the length, and the hash if one is given, are right. Two processes that want the same file wait
    for each other. A fragment `#sha256=<64 hex digits>` of the url is verified, of a copy in the cache, too; so is, of
    what was fetched, the hash that hubs send with a redirection (`X-Linked-Etag`).
    `timeout_s` is the longest silence of the server. `check` raises a `CheckpointError` for a file that is no such
    file, as a page of an error served in its place; that file is not kept.

    Raises:
        CheckpointError: if the download fails, the hash is another one, or the disk refuses.
    """
    try:
        address, fragment = urldefrag(url)
        name = Path(unquote(urlsplit(address).path)).name or "weights"
    except ValueError as error:
        raise CheckpointError(f"cannot download {url}: {error}") from error
    sha256 = _expected_sha256(fragment, url)
    target = _target(url, name, folder)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(target.with_name(f"{target.name}.lock")):
            if sha256 is not None and target.is_file() and file_sha256(target) != sha256:
                _LOGGER.warning("%s: its copy %s has changed since; downloaded again", address, target)
                target.unlink()  # whoever reads it keeps what was opened
            if not target.is_file():
                _LOGGER.warning("downloading %s to %s", address, target)  # commands show nothing below a warning
                _fetch(address, target, sha256=sha256, timeout_s=timeout_s, check=check)
    except urllib.error.HTTPError as error:
        error.close()
        raise CheckpointError(f"cannot download {address}: the server says {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = getattr(error, "reason", None) or error
        raise CheckpointError(f"cannot download {address}: {reason}") from error
    return target


def find_downloaded(url: str) -> Path | None:
    """The file of a url in the cache, if an earlier download was finished; the network is not used."""
    address = urldefrag(url)[0]
    target = _target(url, Path(unquote(urlsplit(address).path)).name or "weights", None)
    return target if target.is_file() else None


def has_part(url: str, *, folder: str | os.PathLike[str] | None = None) -> bool:
    """Whether an earlier download of a url broke off, and would be continued."""
    name = Path(unquote(urlsplit(urldefrag(url)[0]).path)).name or "weights"
    part = _part_of(_target(url, name, folder))
    return part.is_file() and part.stat().st_size > 0


def _target(url: str, name: str, folder: str | os.PathLike[str] | None) -> Path:
    """The hash of the whole url is in the name, so different files never collide."""
    return Path(folder or cache_folder()) / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"


def _part_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
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
    part, redirections = _part_of(target), _Redirections()
    offset = part.stat().st_size if part.is_file() else 0
    try:
        response = _open(address, offset, timeout_s, redirections)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        # The earlier part is not a beginning of what the server has now.
        error.close()
        part.unlink()
        offset, response = 0, _open(address, 0, timeout_s, redirections)
    with response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            offset = 0
        total = _total_bytes(response, offset)
        with part.open("r+b" if offset else "wb") as file:
            file.seek(offset)
            while chunk := response.read(_CHUNK_BYTES):
                file.write(chunk)
                if file.tell() > (total or _MAX_BYTES):  # a body without an end
                    break
            received = file.tell()
    if received > (total or _MAX_BYTES):
        part.unlink()
        raise CheckpointError(
            f"cannot use {address}: the server sent more than {total or _MAX_BYTES:,} bytes; it was deleted"
        )
    if total is not None and received != total:
        raise CheckpointError(
            f"cannot download {address}: the connection ended after {received:,} of {total:,} bytes; "
            "run it again to continue"
        )
    if received == 0:
        raise CheckpointError(f"cannot download {address}: the server sent an empty file")
    _verify(part, sha256 or redirections.sha256, address)
    if check is not None:
        try:
            check(part)
        except CheckpointError as error:
            part.unlink(missing_ok=True)
            reason = str(error).removeprefix(f"{part}: ")
            raise CheckpointError(f"cannot use {address}: what the server sent is {reason}; it was deleted") from error
    os.replace(part, target)


class _Redirections(urllib.request.HTTPRedirectHandler):
    """Follows them, and keeps the hash that a hub sends with the first one."""

    sha256: str | None = None

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        found = re.fullmatch(r'"?([0-9a-f]{64})"?', headers.get("X-Linked-Etag") or "")
        self.sha256 = self.sha256 or (found and found[1])
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(address: str, offset: int, timeout_s: float, redirections: _Redirections) -> Any:
    headers = {"User-Agent": "m2-encoder", "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    opener = urllib.request.build_opener(redirections)  # with the proxies of the environment
    return opener.open(urllib.request.Request(address, headers=headers), timeout=timeout_s)


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
        part.unlink()
        raise CheckpointError(f"cannot use {address}: its sha256 is {found}, expected {sha256}; the file was deleted")
