"""Reads bodies of requests within bounds: of bytes, of parts, of time, and of requests at a time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from m2_encoder.serving.refusals import Refusal, busy, invalid

MAX_JSON_BYTES: Final = 2**20
"""Of a JSON body, and of a field of a form that is no file."""

MAX_PARTS: Final = 16
"""Files of a form, and fields."""

TIMEOUT_S: Final = 60.0
"""A body must have arrived by then."""

IDLE_S: Final = 10.0
"""No longer than that may nothing of a body arrive."""

_DRAINED_S: Final = 5.0


class BodyLimits:
    """ASGI middleware that refuses large bodies, and bodies when too many are being read or worked on.

    Args:
        app: what is behind it.
        max_bytes: of a body.
        max_requests: with a body at a time.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, max_requests: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_requests = max_requests
        self._requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers 413 or 503; `receive` raises 413 for a large body, 408 for an idle one."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        length = _content_length(scope)
        if length is not None and length > self._max_bytes:
            await _drain(receive, 4 * self._max_bytes)
            await self._too_large(f"{length:,} bytes").response(scope["path"])(scope, receive, send)
            return
        if self._requests >= self._max_requests:
            await _drain(receive, self._max_bytes)
            full = busy(f"{self._requests} requests are being answered, {self._max_requests} may")
            await full.response(scope["path"])(scope, receive, send)
            return
        received, is_whole = 0, False

        async def counted() -> Message:
            nonlocal received, is_whole
            try:
                message = await (receive() if is_whole else asyncio.wait_for(receive(), IDLE_S))
            except asyncio.TimeoutError:
                raise Refusal(408, "slow", f"nothing of the body arrived for {IDLE_S:g} seconds") from None
            is_whole = not message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                await _drain(receive, 4 * self._max_bytes)
                raise self._too_large(f"more than {self._max_bytes:,} bytes")
            return message

        self._requests += 1
        try:
            await self._app(scope, counted, send)
        finally:
            self._requests -= 1

    def _too_large(self, given: str) -> Refusal:
        return Refusal(413, "too_large", f"a body of {given}; at most {self._max_bytes:,} are read")


async def read_json(request: Request) -> dict[str, Any]:
    """The JSON object in the body of a request.

    Raises:
        Refusal: if it is none.
    """
    content = bytearray()
    async with _in_time():
        async for chunk in request.stream():
            content += chunk
            if len(content) > MAX_JSON_BYTES:
                raise Refusal(413, "too_large", f"JSON of more than {MAX_JSON_BYTES:,} bytes")
    return parse_json(bytes(content), "the body")


def parse_json(content: bytes | str, what: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        Refusal: if it is none.
    """
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "no_json", f"{what} is no JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise invalid(f"{what} must be a JSON object, such as {{}}, not {type(parsed).__name__}")
    return parsed


@asynccontextmanager
async def read_form(request: Request) -> AsyncIterator[FormData]:
    """The multipart form of a request; its files are gone afterwards.

    Raises:
        Refusal: if it is none.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise Refusal(415, "no_form", f"the body must be multipart/form-data, not {kind or 'without a content-type'}")
    bounds: dict[str, Any] = {"max_files": MAX_PARTS, "max_fields": MAX_PARTS, "max_part_size": MAX_JSON_BYTES}
    parser = MultiPartParser(request.headers, request.stream(), **bounds)
    try:
        async with _in_time():
            form = await parser.parse()
        whole = sum(isinstance(part, UploadFile) for _, part in form.multi_items())
        if whole < len(parser._files_to_close_on_error):
            raise ValueError("it ends within a file")
    except BaseException as error:
        for file in parser._files_to_close_on_error:  # older versions close them for some errors alone
            file.close()
        if isinstance(error, Refusal | ClientDisconnect) or not isinstance(error, Exception):
            raise
        # Not too broad: what damaged forms raise is not documented, and says the same whatever its type.
        raise Refusal(400, "no_form", f"the form cannot be read: {getattr(error, 'message', error)}") from error
    try:
        yield form
    finally:
        await form.close()


async def read_file(form: FormData, name: str) -> bytes | None:
    """The content of a file of a form; None if there is none of this name.

    Raises:
        Refusal: if it is a field and no file.
    """
    part = form.get(name)
    if part is None:
        return None
    if not isinstance(part, UploadFile):
        raise invalid(f"{name} must be sent as a file: add a filename to its part of the form")
    return await part.read()


def read_field(form: FormData, name: str) -> str | None:
    """A field of a form; None if there is none of this name.

    Raises:
        Refusal: if it is a file.
    """
    part = form.get(name)
    if isinstance(part, UploadFile):
        raise invalid(f"{name} must be sent as a field, not as a file")
    return part


@asynccontextmanager
async def _in_time() -> AsyncIterator[None]:
    """Refuses a body that takes longer than `TIMEOUT_S`; `asyncio.timeout` came with Python 3.11."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    is_late = False

    def end() -> None:
        nonlocal is_late
        is_late = True
        task.cancel()

    timer = loop.call_later(TIMEOUT_S, end)
    try:
        yield
    except asyncio.CancelledError:
        if is_late:
            raise Refusal(408, "slow", f"the body did not arrive within {TIMEOUT_S:g} seconds") from None
        raise
    finally:
        timer.cancel()


def _content_length(scope: Scope) -> int | None:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return None


async def _drain(receive: Receive, most: int) -> None:
    """Takes what a client still sends, for a while: one that is cut off while it sends never sees the answer."""

    async def take() -> None:
        taken, more = 0, True
        while more and taken <= most:
            message = await receive()
            taken += len(message.get("body", b""))
            more = message.get("more_body", False)

    try:
        await asyncio.wait_for(take(), _DRAINED_S)
    except asyncio.TimeoutError:
        return
