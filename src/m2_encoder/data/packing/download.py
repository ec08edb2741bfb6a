"""Images from the web: limited in time and size, tried again where that can help."""

from __future__ import annotations

import contextlib
import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, NamedTuple

from m2_encoder.data.samples.parse import SampleProblem

_PIECE_BYTES = 1 << 16
_LONGEST_WAIT_S = 30.0
_MAY_PASS = (408, 425, 429, 500, 502, 503, 504)  # answers that another try can change
_KEPT = "%/:=&?~#+!$,;'@()*[]"  # the rest, such as Chinese file names and spaces, becomes %XX
_AGENT = "m2-encoder (image-text pairs for training)"


class DownloadOptions(NamedTuple):
    """How images are fetched.

    Attributes:
        threads: downloads at a time in each process.
        timeout_s: of one try, from connecting to the last byte.
        retries: further tries after one that may pass.
        wait_s: before the second try; doubles with each.
        max_bytes: larger files are not images.
    """

    threads: int = 16
    timeout_s: float = 10.0
    retries: int = 2
    wait_s: float = 0.5
    max_bytes: int = 64 * 2**20


class _Retry(Exception):
    """A try that failed in a way that may pass."""

    def __init__(self, problem: SampleProblem) -> None:
        self.problem = problem


def fetch(url: str, options: DownloadOptions) -> bytes:
    """Download one file.

    Raises:
        SampleProblem: remote_timeout (too slow, or nobody answers), remote_incomplete (broke off, or the server has
            a fault), missing_image (it is not there), wrong_type (no web address, or too large).
    """
    for attempt in range(options.retries):
        with contextlib.suppress(_Retry):
            return _fetch_once(url, options)
        time.sleep(min(options.wait_s * 2**attempt, _LONGEST_WAIT_S))
    try:
        return _fetch_once(url, options)
    except _Retry as retry:
        raise retry.problem from retry


def _fetch_once(url: str, options: DownloadOptions) -> bytes:
    deadline = time.monotonic() + options.timeout_s
    try:
        address = urllib.parse.quote(url, safe=_KEPT)
        request = urllib.request.Request(address, headers={"User-Agent": _AGENT, "Accept": "image/*,*/*;q=0.1"})
        with urllib.request.urlopen(request, timeout=options.timeout_s) as response:
            return _read(response, deadline, options)
    except SampleProblem:
        raise
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in _MAY_PASS:
            raise _Retry(SampleProblem("remote_incomplete", f"HTTP {error.code} {error.reason}")) from error
        raise SampleProblem("missing_image", f"HTTP {error.code} {error.reason}") from error
    except TimeoutError as error:
        raise _Retry(SampleProblem("remote_timeout", f"nothing after {options.timeout_s:g} s")) from error
    except urllib.error.URLError as error:
        raise _Retry(SampleProblem("remote_timeout", f"no answer: {error.reason}")) from error
    except http.client.InvalidURL as error:
        raise SampleProblem("wrong_type", f"not a web address: {error}") from error
    except (http.client.HTTPException, OSError) as error:
        raise _Retry(SampleProblem("remote_incomplete", str(error) or type(error).__name__)) from error
    except ValueError as error:  # what urllib says of text that is no address
        raise SampleProblem("wrong_type", f"not a web address: {error}") from error


def _read(response: Any, deadline: float, options: DownloadOptions) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while piece := response.read1(_PIECE_BYTES):
        pieces.append(piece)
        size += len(piece)
        if size > options.max_bytes:
            raise SampleProblem("wrong_type", f"more than {options.max_bytes:,} bytes")
        if time.monotonic() > deadline:
            raise _Retry(SampleProblem("remote_timeout", f"{size:,} bytes after {options.timeout_s:g} s"))
    promised = response.headers.get("Content-Length")
    if promised is not None and promised.isdigit() and size != int(promised):
        raise _Retry(SampleProblem("remote_incomplete", f"{size:,} of {int(promised):,} bytes"))
    return b"".join(pieces)
