"""One application with four doors: a page, immich's interface, MT-Photos' and plain JSON."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from m2_encoder.evaluation.models.base import EvaluatedModel
from m2_encoder.picture_search.index import PictureIndex
from m2_encoder.serving import immich, mt_photos
from m2_encoder.serving.api import Api
from m2_encoder.serving.bodies import BodyLimits
from m2_encoder.serving.encoder import Encoder
from m2_encoder.serving.finder import Finder
from m2_encoder.serving.gallery import Gallery
from m2_encoder.serving.guard import Guard
from m2_encoder.serving.index_watch import IndexWatch
from m2_encoder.serving.openapi import describe_api
from m2_encoder.serving.page import Page, wants_page
from m2_encoder.serving.refusals import Refusal


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """What one server takes at a time."""

    batch_size: int = 32  # texts or pictures of a forward pass
    max_body_bytes: int = 32 * 2**20
    max_waiting: int = 64  # requests with a body at a time; texts, and pictures, that wait for the model


def build_app(
    model: EvaluatedModel,
    *,
    index: PictureIndex | None,
    api_key: str | None,
    only_loopback: bool,
    limits: ServerLimits,
) -> Starlette:
    """The application.

    Args:
        model: with a text tower; the one that made the index.
        index: of the pictures to search; None answers immich and MT-Photos alone.
        api_key: of MT-Photos; None refuses it.
        only_loopback: whether it is served on loopback alone.
        limits: what it takes.
    """
    encoder = Encoder(model, batch_size=limits.batch_size, max_waiting=limits.max_waiting)
    gallery, finder, watch = (None, None, None) if index is None else _shelve(index, encoder)

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            for part in (encoder, gallery, finder):
                if part is not None:
                    part.close()

    answers = mt_photos.endpoints(encoder, api_key)
    return Starlette(
        routes=[
            *_pages(limits),
            *Api(encoder, gallery, finder, watch).routes(),
            Route("/ping", immich.ping),
            Route("/predict", immich.predict_with(encoder), methods=["POST"]),
            *(Route(path, answer, methods=["POST"]) for path, answer in answers.items()),
        ],
        middleware=[
            Middleware(Guard, only_loopback=only_loopback),
            Middleware(BodyLimits, max_bytes=limits.max_body_bytes, max_requests=limits.max_waiting),
        ],
        exception_handlers={
            Refusal: _refuse,
            HTTPException: _refuse_route,
            ClientDisconnect: _hang_up,
            Exception: _fail,
        },
        lifespan=lifespan,
    )


def _shelve(index: PictureIndex, encoder: Encoder) -> tuple[Gallery, Finder, IndexWatch]:
    """Files and search of an index, and of newer ones that take its place."""
    gallery, finder = Gallery(index), Finder(index, encoder)

    def use(newer: PictureIndex) -> None:
        gallery.use(newer)
        finder.use(newer)

    return gallery, finder, IndexWatch(index, use)


def _pages(limits: ServerLimits) -> list[Route]:
    """What people look at, and its like for programs."""
    page, reference = Page("search.html"), Page("api.html")

    async def root(request: Request) -> Response:
        return await page.show(request) if wants_page(request) else immich.greet()

    async def openapi(_request: Request) -> Response:
        return JSONResponse(describe_api(limits.max_body_bytes))

    return [Route("/", root), Route("/api", reference.show), Route("/api/openapi.json", openapi)]


async def _refuse(request: Request, error: Any) -> Response:
    return error.response(request.url.path)


async def _refuse_route(request: Request, error: Any) -> Response:
    code = {404: "not_here", 405: "wrong_method"}.get(error.status_code, "invalid")
    detail = {"not_here": "nothing is here; /api lists what is", "wrong_method": "not by this method"}.get(
        code, error.detail
    )
    return Refusal(error.status_code, code, detail, error.headers).response(request.url.path)


async def _hang_up(_request: Request, _error: Any) -> Response:
    return Response(status_code=400)  # nobody reads it


async def _fail(request: Request, _error: Any) -> Response:
    """For what is our fault: the traceback is on stderr."""
    return Refusal(500, "failed", "this is a fault of the server; its terminal says more").response(request.url.path)
