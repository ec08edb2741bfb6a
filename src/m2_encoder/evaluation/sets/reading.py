"""Reads a set of any known layout."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any, Final

from m2_encoder.errors import UserError
from m2_encoder.evaluation.sets.babel_imagenet import read_babel_imagenet
from m2_encoder.evaluation.sets.base import EvaluationSet
from m2_encoder.evaluation.sets.caption_lines import read_caption_lines
from m2_encoder.evaluation.sets.chinese_clip import read_chinese_clip
from m2_encoder.evaluation.sets.clip_benchmark import read_clip_benchmark
from m2_encoder.evaluation.sets.elevater_cn import read_elevater_cn
from m2_encoder.evaluation.sets.image_folder import read_image_folder
from m2_encoder.evaluation.sets.layouts import recognise
from m2_encoder.evaluation.sets.own import read_emoji, read_own
from m2_encoder.evaluation.sets.tuxpaint import read_tuxpaint
from m2_encoder.evaluation.sets.xm3600 import read_xm3600
from m2_encoder.evaluation.sets.xtd import read_xtd

READERS: Final[Mapping[str, Callable[..., EvaluationSet]]] = {
    "clip_benchmark": read_clip_benchmark,
    "elevater_cn": read_elevater_cn,
    "xm3600": read_xm3600,
    "xtd": read_xtd,
    "chinese_clip": read_chinese_clip,
    "caption_lines": read_caption_lines,
    "babel_imagenet": read_babel_imagenet,
    "tuxpaint": read_tuxpaint,
    "emoji": read_emoji,
    "own": read_own,
    "image_folder": read_image_folder,
}
"""Readers by the names of `layouts.LAYOUTS`."""


def read_set(path: str | os.PathLike[str], *, layout: str | None = None, **settings: Any) -> EvaluationSet:
    """Read a set from disk. Nothing is decoded.

    Args:
        path: of the folder or file.
        layout: one of `READERS`; None takes the first one that fits.
        settings: of that reader, such as name, split or labels; one that is None is not given.

    Raises:
        UserError: for an unknown layout or setting, a file that cannot be read, and whatever the reader refuses.
    """
    if layout is not None and layout not in READERS:
        raise UserError(f"one of {', '.join(READERS)}", key="layout", value=layout)
    settings = {key: value for key, value in settings.items() if value is not None}
    try:
        name = layout or recognise(path)
        known = [each for each in inspect.signature(READERS[name]).parameters if each != "path"]
        if unknown := [each for each in settings if each not in known]:
            raise UserError(f"no setting of layout {name}; it has {', '.join(known)}", key=unknown[0])
        return _without_empty_languages(READERS[name](path, **settings))
    except OSError as error:
        raise UserError(f"{error.filename or os.fspath(path)}: cannot be read: {error.strerror}") from error


def _without_empty_languages(found: EvaluationSet) -> EvaluationSet:
    """The set without languages in which there is no text, such as an empty list of captions everywhere."""
    texts = {language: texts for language, texts in found.texts.items() if texts.rows}
    parallel = {both: pairs for both, pairs in found.parallel.items() if texts.keys() >= set(both)}
    return dataclasses.replace(found, texts=texts, parallel=parallel)
