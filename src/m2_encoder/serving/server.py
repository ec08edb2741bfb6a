"""Runs the application on a socket, until a signal ends it."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Callable
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from m2_encoder.errors import UserError

_MAX_CONNECTIONS: Final = 512
_BACKLOG: Final = 128
_GRACE_S: Final = 5


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        UserError: if the host is none of this machine, or the port is taken or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise UserError("is no name or address of this machine", key="host", value=host) from error
    opened = socket.socket(family, kind, protocol)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(_BACKLOG)
    except OSError as error:
        opened.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise UserError("is no address of this machine", key="host", value=host) from error
        rule = str(error.strerror)
        if error.errno == errno.EADDRINUSE:
            rule = f"another program listens there; choose another, such as port={port + 1 if port < 65535 else 0}"
        raise UserError(rule, key="port", value=port) from error
    return opened


def url_of(opened: socket.socket, host: str) -> str:
    """Where a browser finds a socket."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{opened.getsockname()[1]}/"


def serve(app: ASGIApp, opened: socket.socket, *, on_start: Callable[[], object]) -> None:
    """Serves until SIGINT or SIGTERM; running requests get a few seconds to end.

    Args:
        app: the application.
        opened: a socket that listens.
        on_start: called when it answers.
    """

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                on_start()

    config = uvicorn.Config(
        app,
        log_level="error",
        access_log=False,
        server_header=False,
        http="h11",
        ws="none",
        lifespan="on",
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_graceful_shutdown=_GRACE_S,
    )
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # damaged forms are the client's to hear of
    Server(config).run(sockets=[opened])
