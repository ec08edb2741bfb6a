"""What the server answers to a request that it does not fulfil."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

from m2_encoder.errors import abridge

_MT_PHOTOS = ("/check", "/clip/")


class Refusal(Exception):
    """A request that is not fulfilled.

    Args:
        status: of HTTP, 4xx or 503.
        code: one word for programs, such as `too_large`; the page has a sentence for each in both languages.
        detail: what was wrong, and what would be right, in English.
        headers: of the answer.
    """

    def __init__(self, status: int, code: str, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = abridge(detail)
        self.headers = dict(headers or {})

    def response(self, path: str) -> Response:
        """The answer to a request for a path, in the form that its clients show; immich and the page read `detail`."""
        body: dict[str, Any] = {"code": self.code, "detail": self.detail}
        if path.startswith(_MT_PHOTOS):
            body |= {"result": [], "msg": self.detail}
        return JSONResponse(body, self.status, headers=self.headers)


def busy(what: str) -> Refusal:
    """503 for a queue that is full: nothing is wrong with the request, and a later one may be answered."""
    return Refusal(503, "busy", f"{what}; try again in a second", {"Retry-After": "1"})


def invalid(detail: str) -> Refusal:
    """422 for a request that can be read and makes no sense."""
    return Refusal(422, "invalid", detail)
