"""What holds for every request: who may ask, and what browsers may do with an answer."""

from __future__ import annotations

import ipaddress
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from m2_encoder.serving.refusals import Refusal

_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",  # pages of others may not show the pictures
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; sandbox",
}


def is_loopback(host: str) -> bool:
    """Whether a host, by name or address, is this machine alone."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware that adds headers, and refuses names of hosts that are not this machine's.

    A page of somebody else can let its own name point to 127.0.0.1 and would then be of our origin; only the name that
    the browser says gives it away.

    Args:
        app: what is behind it.
        only_loopback: whether the server listens on loopback, so that nobody has a reason to call it otherwise.
    """

    def __init__(self, app: ASGIApp, *, only_loopback: bool) -> None:
        self._app = app
        self._only_loopback = only_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers 403."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        if self._only_loopback and not is_loopback(_host_name(Headers(scope=scope).get("host", ""))):
            answer = Refusal(403, "wrong_host", _WRONG_HOST).response(scope["path"])
            await answer(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)


_WRONG_HOST: Final = "this server answers to localhost and 127.0.0.1 alone; m2-serve host=ADDRESS listens to others"


def _host_name(header: str) -> str:
    """`[::1]:80` to `::1`, `localhost:80` to `localhost`."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]
