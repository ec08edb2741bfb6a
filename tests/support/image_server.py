"""A local HTTP server of images, with the faults that servers of images have; by the name of what is asked for."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DRIP_S = 0.05


class ImageServer(ThreadingHTTPServer):
    """Serves files, and under other names faults.

    `/status/<code>` answers with an error; `/once/<code>/<name>` does so the first time, then with the file;
    `/half/<name>` promises all and sends half; `/slow/<name>` sends a byte at a time; `/silent` never answers.

    Attributes:
        files: by name.
        requests: how often each path was asked for.
    """

    daemon_threads = True

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.requests: Counter[str] = Counter()
        self.closing = threading.Event()

    def url(self, path: str) -> str:
        """Address of a file or fault."""
        return f"http://127.0.0.1:{self.server_port}/{path}"


class _Handler(BaseHTTPRequestHandler):
    server: ImageServer

    def do_GET(self) -> None:
        path = self.path.lstrip("/")
        self.server.requests[path] += 1
        fault, _, rest = path.partition("/")
        if fault == "status":
            self.send_error(int(rest))
        elif fault == "silent":
            self.server.closing.wait(30)
        elif fault == "once":
            code, _, name = rest.partition("/")
            if self.server.requests[path] == 1:
                self.send_error(int(code))
            else:
                self._send(name, 1.0)
        elif fault in ("half", "slow"):
            self._send(rest, 0.5 if fault == "half" else 1.0, slowly=fault == "slow")
        else:
            self._send(path, 1.0)

    def _send(self, name: str, share: float, *, slowly: bool = False) -> None:
        content = self.server.files.get(name)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not slowly:
            self.wfile.write(content[: int(share * len(content))])
            return
        try:
            for byte in content:
                self.wfile.write(bytes([byte]))
                time.sleep(DRIP_S)
        except OSError:
            pass  # the client has had enough

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serve_images(files: Mapping[str, bytes]) -> Iterator[ImageServer]:
    """Run a server in a thread."""
    with ImageServer(files) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()
