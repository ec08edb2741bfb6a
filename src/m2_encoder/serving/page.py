"""The page for people: one file, whose script and style a browser runs by their checksums and nothing else.

So not even a picture's name that looks like a script could run, and nothing is loaded from anywhere else.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files
from typing import Final

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

_INLINE: Final = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


class Page:
    """A page of `assets/serving`.

    Args:
        name: of its file.
    """

    def __init__(self, name: str) -> None:
        self._html = (files("m2_encoder") / "assets" / "serving" / name).read_text(encoding="utf-8")
        sums: dict[str, list[str]] = {"script": [], "style": []}
        for kind, text in _INLINE.findall(self._html):
            digest = base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
            sums[kind].append(f"'sha256-{digest}'")
        self._policy = "; ".join(
            (
                "default-src 'none'",
                f"script-src {' '.join(sums['script'])}",
                f"style-src {' '.join(sums['style'])}",
                "img-src 'self' blob: data:",
                "connect-src 'self'",
                "form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
            )
        )

    async def show(self, _request: Request) -> Response:
        """The page."""
        return HTMLResponse(self._html, headers={"Content-Security-Policy": self._policy, "Cache-Control": "no-cache"})


def wants_page(request: Request) -> bool:
    """Whether a browser asks; immich and other programs do not name HTML."""
    return "text/html" in request.headers.get("accept", "")
