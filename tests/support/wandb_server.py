"""A W&B server for tests: the part of the protocol that a run needs for its numbers.

It keeps what runs send, and tells a run that goes on what it has. It hangs, loses what it is sent, or refuses ids.
"""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_PROJECT = {"id": "p", "name": "m2-encoder", "entity": {"id": "e", "name": "me"}}
_HISTORY, _SUMMARY = "wandb-history.jsonl", "wandb-summary.json"


class WandbServer(ThreadingHTTPServer):
    """Of one test."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hangs = threading.Event()
        self.breaks = threading.Event()
        self.asked = 0
        self.deleted: set[str] = set()
        self.files: dict[str, dict[str, list[str]]] = {}

    @property
    def url(self) -> str:
        """For `WANDB_BASE_URL`."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def rows(self, run_id: str) -> dict[int, dict[str, Any]]:
        """What it has of a run, by W&B's own step, without what W&B adds."""
        found = [json.loads(line) for line in self.files.get(run_id, {}).get(_HISTORY, [])]
        steps = [row["_step"] for row in found]
        assert steps == sorted(set(steps)), "every step once, in order"
        return {row["_step"]: {k: v for k, v in row.items() if not k.startswith("_")} for row in found}

    def bucket(self, run_id: str) -> dict[str, Any] | None:
        """What it tells a run that asks whether it goes on."""
        if (files := self.files.get(run_id)) is None:
            return None
        history = files.get(_HISTORY, [])
        lines = {"historyLineCount": len(history), "eventsLineCount": 0, "logLineCount": 0}
        tails = {"historyTail": json.dumps(history[-1:]), "eventsTail": "[]", "config": "{}", "wandbConfig": '{"t": 1}'}
        summary = files.get(_SUMMARY, ["{}"])[-1]
        return {"id": "b", "name": run_id, "displayName": run_id, "tags": [], "notes": None, **lines, **tails} | {
            "summaryMetrics": summary
        }

    def take(self, run_id: str, files: dict[str, Any]) -> None:
        """Writes lines from an offset on, over what is there."""
        kept = self.files.setdefault(run_id, {})
        for name, sent in files.items():
            kept[name] = [*kept.get(name, [])[: sent["offset"]], *sent["content"]]


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer

    def do_POST(self) -> None:
        self.server.asked += 1
        if self.server.hangs.is_set():
            threading.Event().wait(600)
        if self.server.breaks.is_set():
            self.close_connection = True
            return
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            content = gzip.decompress(content)
        status, answer = self._answer(content.decode(errors="replace"))
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST

    def _answer(self, request: str) -> tuple[int, object]:
        if self.path.endswith("/file_stream"):
            self.server.take(self.path.split("/")[-2], json.loads(request).get("files") or {})
            return 200, {}
        if not self.path.endswith("/graphql"):
            return 200, {}
        asked = json.loads(request)
        given, query = asked.get("variables") or {}, asked.get("query", "")
        name = str(given.get("name"))
        if "upsertBucket" in query and name in self.server.deleted:
            message = f"run me/m2-encoder/{name} was previously created and deleted; try a new run name"
            return 409, {"errors": [{"message": message}]}
        if "upsertBucket" in query:
            bucket = {"id": "b", "name": name, "displayName": name, "description": "", "config": "{}"}
            bucket |= {"sweepName": None, "project": _PROJECT, "historyLineCount": 0}
            return 200, {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "RunResumeStatus" in query:
            return 200, {"data": {"model": {**_PROJECT, "bucket": self.server.bucket(name)}}}
        if "query Viewer" in query:
            viewer = {"id": "v", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
            return 200, {"data": {"viewer": viewer}}
        if "createRunFiles" in query:
            files = [{"name": each, "uploadUrl": f"{self.server.url}/file/{each}"} for each in given["files"]]
            return 200, {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
        return 200, {"data": {}}

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
