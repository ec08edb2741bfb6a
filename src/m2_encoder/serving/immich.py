"""The interface by which immich asks its machine learning server, for the jobs of smart search.

`POST /predict` is a form with `entries`, a JSON object {task: {type: {"modelName": …, "options": …}}}, and the field
`text` or the file `image`. immich names a model because its column of vectors has the width of that; any status but 2xx
makes it ask its next server.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from m2_encoder.errors import abridge
from m2_encoder.serving.batches import Features
from m2_encoder.serving.bodies import parse_json, read_field, read_file, read_form
from m2_encoder.serving.encoder import Encoder
from m2_encoder.serving.refusals import Refusal, invalid

WIDTHS: Final = MappingProxyType(
    {"ViT-B-32__openai": 512, "ViT-L-14__openai": 768, "ViT-H-14__laion2b-s32b-b79k": 1024}
)
"""Names of models that immich lists, one of each width: what a user may choose there to be answered by ours."""

_TASK: Final = "clip"
_TYPES: Final = ("textual", "visual")


def choose_name(feature_dim: int) -> str | None:
    """The model to choose in immich for features of a width; None if none of its columns is wide enough."""
    return next((name for name, width in WIDTHS.items() if width >= feature_dim), None)


def greet() -> Response:
    """What immich's own server says at `/`."""
    return JSONResponse({"message": "Immich ML"})


async def ping(_request: Request) -> Response:
    """`GET /ping`: immich asks it every half minute."""
    return PlainTextResponse("pong")


def predict_with(encoder: Encoder) -> Callable[[Request], Any]:
    """The endpoint of `POST /predict`."""

    async def predict(request: Request) -> Response:
        async with read_form(request) as form:
            kind, width = _read_entries(read_field(form, "entries"), encoder.feature_dim)
            text, image = read_field(form, "text"), await read_file(form, "image")
        if kind == "textual":
            if text is None:
                raise Refusal(400, "no_input", "clip.textual needs the field text")
            return JSONResponse({_TASK: _write(await _encode_text(encoder, text), width)})
        if image is None:
            raise Refusal(400, "no_input", "clip.visual needs the file image")
        picture = await encoder.picture(image)
        size = {"imageHeight": picture.height, "imageWidth": picture.width}
        return JSONResponse({_TASK: _write(picture.features, width), **size})

    return predict


def _read_entries(entries: str | None, feature_dim: int) -> tuple[str, int]:
    """Which of `_TYPES` is asked for, and the width of the vectors.

    Raises:
        Refusal: 422 for what is no such request; 501 for jobs of other kinds of models.
    """
    if entries is None:
        raise invalid("the field entries is missing")
    tasks = parse_json(entries, "entries")
    if others := [task for task in tasks if task != _TASK]:
        name = abridge(str(others[0]), 60)
        raise Refusal(501, "other_job", f"{name} is not answered here, only {_TASK}: list immich's own server, too")
    types = tasks.get(_TASK)
    if not isinstance(types, dict) or len(types) != 1 or (kind := next(iter(types))) not in _TYPES:
        raise invalid(f"entries must be one job, {_TASK}.textual or {_TASK}.visual")
    entry = types[kind]
    model = entry.get("modelName") if isinstance(entry, dict) else None
    if not isinstance(model, str):
        raise invalid(f"{_TASK}.{kind} must have a modelName")
    width = WIDTHS.get(model)
    if width is None or width < feature_dim:
        usable = ", ".join(name for name, wide in WIDTHS.items() if wide >= feature_dim)
        advice = f"choose one of: {usable}" if usable else "its columns are too narrow for this model"
        said = f"{abridge(model, 80)} does not fit features of {feature_dim} numbers; in immich {advice}"
        raise Refusal(422, "other_model", said)
    return kind, width


async def _encode_text(encoder: Encoder, text: str) -> Features:
    return (await encoder.texts([text]))[0]


def _write(features: Features, width: int) -> str:
    """A vector as immich stores it: a JSON list in a string; zeros fill it up, which leaves cosines as they are."""
    padded = np.zeros(width, dtype=np.float32)
    padded[: len(features)] = features
    return json.dumps([float(str(value)) for value in padded])
