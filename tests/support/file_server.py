"""A local HTTP server for one file, with the faults that real servers and networks have."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer(ThreadingHTTPServer):
    """Serves `content` under any path.

    Attributes:
        content: what is served.
        others: what is served in its place, by the ends of paths.
        status: answer with this error instead, if set.
        stop_after: end the connection after so many bytes of an answer.
        ranges: honour `Range` headers.
        wrong_ranges: say of a range that it begins one byte later.
        with_length: send `Content-Length`.
        requested_ranges: the `Range` header of every request, None where there was none.
        tagged: send an `ETag` that follows the content.
        modified: send this as `Last-Modified`, if set.
        heeds_conditions: honour `If-Range`; otherwise a range is sent of whatever is there.
        requested_conditions: the `If-Range` header of every request.
        linked: redirect to another path, with this hash, as hubs do.
        linked_by_store: send that hash with the file, not with the redirection, as ModelScope does.
        loops: redirect every path to itself.
        paths: of every request.
    """

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content = content
        self.others: dict[str, bytes] = {}
        self.status: int | None = None
        self.stop_after: int | None = None
        self.ranges = True
        self.wrong_ranges = False
        self.with_length = True
        self.requested_ranges: list[str | None] = []
        self.tagged = True
        self.modified: str | None = None
        self.heeds_conditions = True
        self.requested_conditions: list[str | None] = []
        self.linked: str | None = None
        self.linked_by_store = False
        self.loops = False
        self.paths: list[str] = []

    def url(self, path: str = "weights.ckpt") -> str:
        """Address of the file under some name."""
        return f"http://127.0.0.1:{self.server_port}/{path}"


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        if self.server.loops or (self.server.linked is not None and not self.path.startswith("/stored/")):
            self._redirect()
            return
        wanted, condition = self.headers.get("Range"), self.headers.get("If-Range")
        self.server.requested_ranges.append(wanted)
        self.server.requested_conditions.append(condition)
        if self.server.status is not None:
            self.send_error(self.server.status)
            return
        found = (other for end, other in self.server.others.items() if self.path.endswith(end))
        content = next(found, self.server.content)
        tag = f'"{hashlib.sha256(content).hexdigest()[:8]}"' if self.server.tagged else None
        if self.server.heeds_conditions and condition is not None and condition not in (tag, self.server.modified):
            wanted = None
        start = int(re.sub(r"\D", "", wanted)) if wanted and self.server.ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            said = start + self.server.wrong_ranges
            self.send_header("Content-Range", f"bytes {said}-{len(content) - 1}/{len(content)}")
        if self.server.with_length:
            self.send_header("Content-Length", str(len(content) - start))
        for name, value in (("ETag", tag), ("Last-Modified", self.server.modified)):
            if value is not None:
                self.send_header(name, value)
        if self.server.linked_by_store:
            self.send_header("X-Linked-Etag", f'"{self.server.linked}"')
        self.end_headers()
        self.wfile.write(content[start:][: self.server.stop_after])

    def _redirect(self) -> None:
        self.send_response(302)
        self.send_header("Location", self.path if self.server.loops else f"/stored{self.path}")
        if self.server.linked is not None and not self.server.linked_by_store:
            self.send_header("X-Linked-Etag", f'"{self.server.linked}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serve(content: bytes) -> Iterator[FileServer]:
    """Run a server in a thread."""
    with FileServer(content) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
