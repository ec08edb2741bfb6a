"""A local HTTP server for a folder of shards, with the faults that real servers and networks have."""

from __future__ import annotations

import contextlib
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = b"<html><body>Please log in</body></html>\n" * 30


class ShardServer(ThreadingHTTPServer):
    """Serves a folder.

    Attributes:
        folder: what is served.
        faults: by file, what its next downloads do: "hang" after some bytes, send "half", or "wake" with other bytes
            after a while.
        always: by file, what it does from now on: "hang", "half", "missing" (404), "page" (HTML instead), "silent" (no
            answer at all), "endless" (no length, and a body that does not end).
        tells_version: whether answers have an ETag.
        requests: downloads so far by file.
        stop: ends what hangs.
        pause_s: that a "wake" waits.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: dict[str, list[str]] = {}
        self.always: dict[str, str] = {}
        self.requests: Counter[str] = Counter()
        self.stop = threading.Event()
        self.pause_s = 0.6
        self.tells_version = True

    def url(self, name: str) -> str:
        """Address of a file."""
        return f"http://127.0.0.1:{self.server_port}/{name}"


class _Handler(BaseHTTPRequestHandler):
    server: ShardServer

    def do_HEAD(self) -> None:
        self._head()

    def do_GET(self) -> None:
        server = self.server
        name = self.path.strip("/")
        server.requests[name] += 1
        content = self._head()
        fault = server.faults.get(name, [])
        what = fault.pop(0) if fault else server.always.get(name, "")
        if what == "hang":
            self._send(content[:100])
            server.stop.wait(20)
        elif what == "half":
            self._send(content[: len(content) // 2])
        elif what == "endless":
            with contextlib.suppress(OSError):
                while not server.stop.is_set():
                    self.wfile.write(bytes(1 << 16))
        elif what == "wake":
            self._send(content[:100])
            server.stop.wait(server.pause_s)
            self._send(bytes(len(content) - 100))
        else:
            self._send(content)

    def _send(self, content: bytes) -> None:
        try:
            self.wfile.write(content)
            self.wfile.flush()
        except OSError:  # who asked has given up
            self.close_connection = True

    def _head(self) -> bytes:
        name = self.path.strip("/")
        path = self.server.folder / name
        what = self.server.always.get(name, "")
        if what == "silent":
            self.server.stop.wait(20)
        if what == "missing" or not path.is_file():
            self.send_error(404)
            return b""
        content = PAGE if what == "page" else path.read_bytes()
        self.send_response(200)
        if what == "endless":
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(content)))
        if self.server.tells_version:
            self.send_header("ETag", f'"{zlib.crc32(content):08x}"')
        self.end_headers()
        return content

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serve_shards(folder: Path) -> Iterator[ShardServer]:
    """Run a server in a thread."""
    server = ShardServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop.set()
        server.shutdown()
        server.server_close()
