"""The JSON interface: search, similar pictures, features, thumbnails and files.

`openapi.py` describes it; the page uses nothing else.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from typing import Any, Final

from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from m2_encoder.serving.bodies import read_field, read_file, read_form, read_json
from m2_encoder.serving.encoder import Encoder
from m2_encoder.serving.finder import Finder, Found
from m2_encoder.serving.gallery import SIZES, Gallery
from m2_encoder.serving.index_watch import IndexWatch
from m2_encoder.serving.refusals import Refusal, invalid
from m2_encoder.serving.settings import check_keys, read_number, read_text

MAX_COUNT: Final = 500
"""Results of an answer."""

MAX_TEXTS: Final = 64
"""Texts whose features are asked for at once."""

_COUNT: Final = 60
_FAR: Final = 10**9
_RANGE: Final = re.compile(r"bytes=([0-9]{1,18})-([0-9]{0,18})|bytes=-0*[1-9][0-9]{0,17}")


class _Names(Convertor[str]):
    """Whatever a file may be called; Starlette's `path` ends at a line."""

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        """As it is."""
        return value

    def to_string(self, value: str) -> str:
        """As it is."""
        return value


register_url_convertor("picture", _Names())


class Api:
    """The endpoints.

    Args:
        encoder: the model.
        gallery: files of the index; None without one.
        finder: what searches it; None without one.
        watch: knows whether there is a newer one; None without one.
    """

    def __init__(
        self, encoder: Encoder, gallery: Gallery | None, finder: Finder | None, watch: IndexWatch | None
    ) -> None:
        self._encoder = encoder
        self._gallery = gallery
        self._finder = finder
        self._watch = watch

    def routes(self) -> list[Route]:
        """Their addresses."""
        return [
            Route("/api/status", self.status),
            Route("/api/pictures", self.pictures),
            Route("/api/search", self.search, methods=["POST"]),
            Route("/api/similar", self.similar, methods=["POST"]),
            Route("/api/embed", self.embed, methods=["POST"]),
            Route("/api/thumbnails/{name:picture}", self.thumbnail),
            Route("/api/files/{name:picture}", self.file),
        ]

    async def status(self, _request: Request) -> Response:
        """What is served."""
        pictures = None if self._finder is None else (await self._current()).list_names(0, 0)[1]
        encoder = self._encoder
        model = {"model": encoder.name, "runtime": encoder.runtime, "feature_dim": encoder.feature_dim}
        return JSONResponse({**model, "pictures": pictures})

    async def pictures(self, request: Request) -> Response:
        """All pictures, in the order of their names."""
        values = request.query_params
        check_keys(values, ("start", "count"))
        names, total = (await self._current()).list_names(*_read_part(values))
        return JSONResponse({"total": total, "results": [{"name": name} for name in names]})

    async def search(self, request: Request) -> Response:
        """Results for a query, a picture, or both."""
        finder, known = await self._current(), ("query", "start", "count")
        image: bytes | None = None
        if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            async with read_form(request) as form:
                check_keys(form, (*known, "image"))
                image = await read_file(form, "image")
                values: Mapping[str, Any] = {key: read_field(form, key) for key in known if key in form}
        else:
            values = await read_json(request)
            check_keys(values, known)
        query = read_text(values, "query") if "query" in values or image is None else None
        started = time.perf_counter()
        return _answer(await finder.search(query, image, *_read_part(values)), started)

    async def similar(self, request: Request) -> Response:
        """Pictures like one of the index."""
        finder, values = await self._current(), await read_json(request)
        check_keys(values, ("name", "start", "count"))
        started = time.perf_counter()
        return _answer(await finder.similar(read_text(values, "name"), *_read_part(values)), started)

    async def embed(self, request: Request) -> Response:
        """Features of texts, or of a picture."""
        if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            async with read_form(request) as form:
                check_keys(form, ("image",))
                image = await read_file(form, "image")
            if image is None:
                raise invalid("the file image is missing")
            features = (await self._encoder.picture(image)).features[None]
        else:
            values = await read_json(request)
            check_keys(values, ("texts",))
            texts = values.get("texts")
            if not isinstance(texts, list) or not 1 <= len(texts) <= MAX_TEXTS:
                raise invalid(f"texts must be a list of 1 to {MAX_TEXTS} texts")
            if not all(isinstance(text, str) for text in texts):
                raise invalid("texts must be a list of texts")
            features = await self._encoder.texts(texts)
        return JSONResponse({"model": self._encoder.name, "features": features.tolist()})

    async def thumbnail(self, request: Request) -> Response:
        """A small copy of a picture."""
        values = request.query_params
        check_keys(values, ("size",))
        gallery, name = self._need(self._gallery), request.path_params["name"]
        size = read_number(values, "size", SIZES[0], least=1, most=max(SIZES))
        tag, content = await gallery.thumbnail(name, size)
        headers = {"ETag": tag, "Cache-Control": "private, no-cache"}  # asked for again, and answered by 304
        if _has(request, tag):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type="image/jpeg", headers=headers)

    async def file(self, request: Request) -> Response:
        """A picture itself."""
        check_keys(request.query_params, ())
        found = await asyncio.to_thread(self._need(self._gallery).find, request.path_params["name"])
        headers = {"ETag": found.tag, "Cache-Control": "private, no-cache"}
        if _has(request, found.tag):
            return Response(status_code=304, headers=headers)
        _check_range(request, found.size)
        return FileResponse(found.path, media_type=found.media_type, headers=headers)

    async def _current(self) -> Finder:
        """What searches the index as it is now.

        Raises:
            Refusal: 404, if none is served.
        """
        if self._watch is not None:
            await self._watch.look()
        finder: Finder = self._need(self._finder)
        return finder

    @staticmethod
    def _need(part: Any) -> Any:
        if part is None:
            raise Refusal(404, "no_index", "no pictures are served: start m2-serve with index=FOLDER")
        return part


def _read_part(values: Mapping[str, Any]) -> tuple[int, int]:
    """Where a part of a list starts, and how many results it has."""
    start = read_number(values, "start", 0, least=0, most=_FAR)
    return start, read_number(values, "count", _COUNT, least=1, most=MAX_COUNT)


def _has(request: Request, tag: str) -> bool:
    """Whether a client has what a tag stands for, by its If-None-Match."""
    given = request.headers.get("if-none-match", "").split(",")
    return any(each.strip().removeprefix("W/") in (tag, "*") for each in given)


def _check_range(request: Request, size: int) -> None:
    """Takes away a Range that is not one well-formed part: the whole file is the answer then (RFC 9110, 14.2).

    Raises:
        Refusal: 416 for one that begins after the end.
    """
    part = _RANGE.fullmatch(request.headers.get("range", ""))
    if part is None or (part[2] and int(part[1]) > int(part[2])):
        request.scope["headers"] = [each for each in request.scope["headers"] if each[0] != b"range"]
    elif part[1] and int(part[1]) >= size:
        raise Refusal(416, "no_such_part", f"the file has {size:,} bytes", {"Content-Range": f"bytes */{size}"})


def _answer(found: Found, started: float) -> Response:
    results = [{"name": name, "score": round(score, 6)} for name, score in zip(found.names, found.scores, strict=True)]
    took = round((time.perf_counter() - started) * 1000, 1)
    return JSONResponse({"total": found.total, "end": found.end, "took_ms": took, "results": results})
