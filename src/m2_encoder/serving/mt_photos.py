"""The interface by which MT-Photos asks its AI server, for searching by text.

All requests are POST and have the header `api-key`. Vectors are lists of strings with 16 decimals, of a width that its
user chooses there, 512 or 768; zeros fill up shorter ones, which leaves cosines as they are.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Final

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from m2_encoder.serving.batches import Features
from m2_encoder.serving.bodies import read_file, read_form, read_json
from m2_encoder.serving.encoder import Encoder
from m2_encoder.serving.refusals import Refusal, invalid

PATHS: Final = ("/check", "/clip/img", "/clip/txt")

WIDTHS: Final = (512, 768)
"""Of its columns."""

Endpoint = Callable[[Request], Awaitable[Response]]


def endpoints(encoder: Encoder, api_key: str | None) -> dict[str, Endpoint]:
    """What answers each of `PATHS`.

    Args:
        encoder: the model.
        api_key: what the header `api-key` must say; None refuses all.
    """

    def check_key(request: Request) -> None:
        if api_key is None:
            raise Refusal(401, "no_key", "MT-Photos is answered when m2-serve is started with api_key=KEY")
        given = request.headers.get("api-key", "").encode("utf-8", "replace")
        if not secrets.compare_digest(given, api_key.encode("utf-8")):
            raise Refusal(401, "wrong_key", "the header api-key is not the api_key that m2-serve was started with")

    async def check(request: Request) -> Response:
        check_key(request)
        return JSONResponse({"result": "pass"})

    async def image(request: Request) -> Response:
        check_key(request)
        async with read_form(request) as form:
            content = await read_file(form, "file")
        if content is None:
            raise invalid("the file `file` is missing")
        return _answer((await encoder.picture(content)).features)

    async def text(request: Request) -> Response:
        check_key(request)
        given: Any = (await read_json(request)).get("text")
        if not isinstance(given, str):
            raise invalid("text must be a text")
        return _answer((await encoder.texts([given]))[0])

    return dict(zip(PATHS, (check, image, text), strict=True))


def _answer(features: Features) -> Response:
    width = next((each for each in WIDTHS if each >= len(features)), len(features))
    padded = np.pad(features, (0, width - len(features)))
    return JSONResponse({"result": [f"{value:.16f}" for value in padded.tolist()]})
