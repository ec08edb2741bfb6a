"""A local HTTP server for one file, with the faults that real servers and networks have."""

from __future__ import annotations

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
        with_length: send `Content-Length`.
        requested_ranges: the `Range` header of every request, None where there was none.
        linked: redirect to another path, with this hash, as hubs do.
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
        self.with_length = True
        self.requested_ranges: list[str | None] = []
        self.linked: str | None = None
        self.paths: list[str] = []

    def url(self, path: str = "weights.ckpt") -> str:
        """Address of the file under some name."""
        return f"http://127.0.0.1:{self.server_port}/{path}"


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        if self.server.linked is not None and not self.path.startswith("/stored/"):
            self.send_response(302)
            self.send_header("Location", f"/stored{self.path}")
            self.send_header("X-Linked-Etag", f'"{self.server.linked}"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        wanted = self.headers.get("Range")
        self.server.requested_ranges.append(wanted)
        if self.server.status is not None:
            self.send_error(self.server.status)
            return
        found = (other for end, other in self.server.others.items() if self.path.endswith(end))
        content = next(found, self.server.content)
        start = int(re.sub(r"\D", "", wanted)) if wanted and self.server.ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.server.with_length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: self.server.stop_after])

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
