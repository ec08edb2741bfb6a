"""The JSON interface as an OpenAPI document; `/api` shows it as a page."""

from __future__ import annotations

from typing import Any, Final

from m2_encoder.serving.api import MAX_COUNT, MAX_TEXTS
from m2_encoder.serving.encoder import MAX_TEXT
from m2_encoder.serving.gallery import SIZES

_PART: Final = {
    "start": {"type": "integer", "minimum": 0, "default": 0, "description": "results to leave out at the beginning"},
    "count": {"type": "integer", "minimum": 1, "maximum": MAX_COUNT, "default": 60},
}
_FILE: Final = {
    "type": "string",
    "format": "binary",
    "description": "a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC file",
}
_NAME: Final = {
    "name": "name",
    "in": "path",
    "required": True,
    "schema": {"type": "string"},
    "description": "a name from a list of results; its slashes stay, other characters are escaped",
}
_ERRORS: Final = {
    "400": "the body cannot be read",
    "403": "the server listens on loopback alone, and was called by another name",
    "404": "no such picture, or no index is served",
    "408": "the body did not arrive in time",
    "413": "too large",
    "415": "no picture that can be used",
    "422": "a value that makes no sense; the detail names it",
    "500": "a fault of the server",
    "503": "too much waits; try again",
}
_UNCHANGED: Final = {"304": {"description": "the client has it, by If-None-Match"}}
_ERROR: Final = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}


def describe_api(max_body_bytes: int) -> dict[str, Any]:
    """The document, version 3.1.

    Args:
        max_body_bytes: of a body.
    """
    total = {"type": "integer", "description": "results of the whole list"}
    name = {"type": "string", "description": "below the indexed folder"}
    score = {"type": "number", "minimum": -1, "maximum": 1, "description": "cosine"}
    schemas = {
        "Results": _answer(
            {
                "total": total,
                "end": {"type": "integer", "description": "how many of the first ones probably belong to the query"},
                "took_ms": {"type": "number"},
                "results": {"type": "array", "items": _answer({"name": name, "score": score})},
            }
        ),
        "Pictures": _answer({"total": total, "results": {"type": "array", "items": _answer({"name": name})}}),
        "Error": _answer({"code": {"type": "string"}, "detail": {"type": "string"}}),
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "M2-Encoder search",
            "version": "1",
            "description": "Finds pictures by words in Chinese or English, and by pictures. Other answers than 200 are "
            f"a JSON object with code and detail. A body has at most {max_body_bytes:,} bytes, a text {MAX_TEXT:,} "
            "characters.",
        },
        "paths": {**_searching(), **_encoding(), **_files()},
        "components": {"schemas": schemas},
    }


def _searching() -> dict[str, Any]:
    query = {
        "type": "string",
        "description": 'words, the name of a picture, or a sum such as 2*"狗" + pool.jpg - "水果"',
        "examples": ["红色的水果"],
    }
    json_body = _object({"query": query, **_PART}, required=["query"])
    form = _object({"image": _FILE, "query": query, **_PART}, required=["image"])
    name = {"type": "string", "examples": ["2024/dog.jpg"]}
    return {
        "/api/search": {
            "post": {
                "operationId": "search",
                "summary": "Pictures for words, for a picture, or for both, without those that the query names",
                "requestBody": _body(json_body, form),
                "responses": _responses("Results"),
            }
        },
        "/api/similar": {
            "post": {
                "operationId": "findSimilar",
                "summary": "Pictures like one of the index, without itself",
                "requestBody": _body(_object({"name": name, **_PART}, required=["name"])),
                "responses": _responses("Results"),
            }
        },
        "/api/pictures": {
            "get": {
                "operationId": "listPictures",
                "summary": "All pictures by name",
                "parameters": [{"name": key, "in": "query", "schema": schema} for key, schema in _PART.items()],
                "responses": _responses("Pictures"),
            }
        },
    }


def _encoding() -> dict[str, Any]:
    texts = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_TEXTS}
    features = {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}
    return {
        "/api/embed": {
            "post": {
                "operationId": "embed",
                "summary": "Features of texts, or of a picture: lists of numbers of length 1 together",
                "requestBody": _body(
                    _object({"texts": texts}, required=["texts"]), _object({"image": _FILE}, required=["image"])
                ),
                "responses": _responses(_answer({"model": {"type": "string"}, "features": features})),
            }
        },
        "/api/status": {
            "get": {
                "operationId": "getStatus",
                "summary": "What is served",
                "responses": _responses(
                    _answer(
                        {
                            "model": {"type": "string"},
                            "runtime": {"type": "string", "enum": ["torch", "onnx"]},
                            "feature_dim": {"type": "integer"},
                            "pictures": {"type": ["integer", "null"]},
                        }
                    )
                ),
            }
        },
    }


def _files() -> dict[str, Any]:
    size = {"name": "size", "in": "query", "schema": {"type": "integer", "enum": list(SIZES), "default": SIZES[0]}}
    return {
        "/api/thumbnails/{name}": {
            "get": {
                "operationId": "getThumbnail",
                "summary": "A JPEG of a picture, upright, whose longer side has at most `size` pixels",
                "parameters": [_NAME, size],
                "responses": {**_responses("", media_type="image/jpeg"), **_UNCHANGED},
            }
        },
        "/api/files/{name}": {
            "get": {
                "operationId": "getFile",
                "summary": "The file of a picture",
                "parameters": [_NAME],
                "responses": {
                    **_responses("", media_type="image/*"),
                    **_UNCHANGED,
                    "206": {"description": "the part that Range asks for", "content": {"image/*": {"schema": {}}}},
                    "416": {"description": "the part that Range asks for begins after the end", "content": _ERROR},
                },
            }
        },
    }


def _object(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    return {"type": "object", "properties": properties, **({"required": required} if required else {})}


def _answer(properties: dict[str, Any]) -> dict[str, Any]:
    """An object that has all of its properties."""
    return _object(properties, required=list(properties))


def _body(json_schema: dict[str, Any], form: dict[str, Any] | None = None) -> dict[str, Any]:
    content = {"application/json": {"schema": json_schema}}
    if form is not None:
        content["multipart/form-data"] = {"schema": form}
    return {"required": True, "content": content}


def _responses(schema: str | dict[str, Any], media_type: str = "application/json") -> dict[str, Any]:
    """200 with a schema, by its name or itself, and what else may be answered."""
    shown = {"$ref": f"#/components/schemas/{schema}"} if isinstance(schema, str) and schema else schema or {}
    return {
        "200": {"description": "done", "content": {media_type: {"schema": shown}}},
        **{status: {"description": text, "content": _ERROR} for status, text in _ERRORS.items()},
    }
