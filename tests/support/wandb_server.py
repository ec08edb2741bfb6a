"""A W&B server for tests: it answers what a run asks at its start, and nothing more once it hangs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_PROJECT = {"id": "p", "name": "m2-encoder", "entity": {"id": "e", "name": "me"}}
_BUCKET = {
    "id": "b",
    "name": "x",
    "displayName": "x",
    "description": "",
    "config": "{}",
    "sweepName": None,
    "project": _PROJECT,
    "historyLineCount": 0,
}


class WandbServer(ThreadingHTTPServer):
    """Of one test."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hangs = threading.Event()
        self.asked = 0

    @property
    def url(self) -> str:
        """For `WANDB_BASE_URL`."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer

    def do_POST(self) -> None:
        self.server.asked += 1
        if self.server.hangs.is_set():
            threading.Event().wait(600)
        request = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode(errors="replace")
        if "upsertBucket" in request:
            answer: object = {"data": {"upsertBucket": {"bucket": _BUCKET, "inserted": True}}}
        elif "RunResumeStatus" in request:
            answer = {"data": {"model": {**_PROJECT, "bucket": None}}}
        else:
            answer = {"data": {}}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextmanager
def serve_wandb(*, hangs: bool = False) -> Iterator[WandbServer]:
    """A server on this machine, which hangs from the start or once `hangs` is set."""
    server = WandbServer()
    if hangs:
        server.hangs.set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
