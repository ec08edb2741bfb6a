"""Checks of image files: format, size, and on request that all pixels can be decoded."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from PIL import Image

from m2_encoder.data.images.opening import open_picture
from m2_encoder.data.images.rgb import to_rgb
from m2_encoder.data.images.transforms import MAX_PIXELS
from m2_encoder.data.samples.parse import SampleProblem
from m2_encoder.errors import ImageError
from m2_encoder.pictures import STANDARD, PicturePolicy


class ImageLimits(NamedTuple):
    """Sizes of usable images."""

    max_pixels: int = MAX_PIXELS  # width x height at most; larger ones are not decoded
    min_side_px: int = 4  # the shorter side at least
    max_aspect: float = 20.0  # the longer side over the shorter one, at most


class ImageFacts(NamedTuple):
    """Format and size of a usable image."""

    format: str  # Pillow's name in lower case, such as "jpeg"
    width: int  # pixels, as stored
    height: int  # pixels, as stored
    effects: frozenset[str] = frozenset()  # what a policy does to it, of `rgb.EFFECTS`; known of decoded ones alone


def read_image_facts(
    content: bytes, limits: ImageLimits, *, decode: bool, pictures: PicturePolicy = STANDARD
) -> ImageFacts:
    """Check an image file by its header; `decode` decodes all pixels, too, which finds cut and damaged files.

    Raises:
        SampleProblem: empty_member, undecodable_image, too_many_pixels, too_small or absurd_shape.
    """
    with open_pixels(content, limits) as image:
        facts = ImageFacts(str(image.format).lower(), *image.size)
        effects: set[str] = set()
        if decode:
            load_rgb(image, pictures, effects)
    return facts._replace(effects=frozenset(effects))


def open_pixels(content: bytes, limits: ImageLimits) -> Image.Image:
    """Open an image file and check its size, without decoding it.

    Raises:
        SampleProblem: as `read_image_facts`.
    """
    if not content:
        raise SampleProblem("empty_member", "the image has no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF is no reason to drop an image; sizes are checked below
            image = open_picture(content)
    except Image.DecompressionBombError as error:
        raise SampleProblem("too_many_pixels", str(error)) from error
    except ImageError as error:
        raise SampleProblem("undecodable_image", error.text) from error
    check_size(*image.size, limits)
    return image


def load_rgb(image: Image.Image, pictures: PicturePolicy, effects: set[str] | None = None) -> Image.Image:
    """`rgb.to_rgb` of an opened image.

    Raises:
        SampleProblem: undecodable_image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return to_rgb(image, pictures, effects)
    except ImageError as error:
        raise SampleProblem("undecodable_image", error.text) from error


def load_pixels(image: Image.Image) -> None:
    """Decode an opened image.

    Raises:
        SampleProblem: undecodable_image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
    except Exception as error:
        # Not too broad: as above.
        raise SampleProblem("undecodable_image", _describe(error)) from error


def check_size(width: int, height: int, limits: ImageLimits) -> None:
    """Check a size in pixels.

    Raises:
        SampleProblem: too_many_pixels, too_small or absurd_shape.
    """
    if width * height > limits.max_pixels:
        reason, rule = "too_many_pixels", f"at most {limits.max_pixels:,} are allowed"
    elif max(width, height) > limits.max_aspect * min(width, height):
        reason, rule = "absurd_shape", f"the longer side may be {limits.max_aspect:g} times the shorter"
    elif min(width, height) < limits.min_side_px:
        reason, rule = "too_small", f"each side needs {limits.min_side_px}"
    else:
        return
    raise SampleProblem(reason, f"{width} x {height} pixels, {rule}")


def _describe(error: Exception) -> str:
    return str(error) or type(error).__name__


def limits_of(decode: Callable[[bytes], Any]) -> ImageLimits:
    """Limits among the arguments of `decode`, a partial of `decode_image_uint8`."""
    given = getattr(decode, "keywords", {})
    return ImageLimits(**{name: given[name] for name in ImageLimits._fields if name in given})
