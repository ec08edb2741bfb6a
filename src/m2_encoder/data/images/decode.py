"""Decodes image files to uint8 tensors, for training.

libjpeg-turbo decodes JPEGs in less than two thirds of Pillow's time; Pillow decodes everything else, and what
libjpeg-turbo warns of. Pixels and usable files are those of `transforms.open_image`. Sizes are checked from the header,
before anything is decoded.

torchvision's decoders are as fast, but its PNG decoder crashes the process on some damaged files (version 0.29), and
its JPEG decoder writes every defect to the terminal. Decoding large JPEGs at half their size (a DCT of fewer terms)
moves the resized pixels by up to 5 of 255 levels, 0.6 on average.

Letters: H, W height and width in pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import Ge
from PIL import ExifTags, Image
from simplejpeg import decode_jpeg
from torch import Tensor

from m2_encoder.bounds import Count
from m2_encoder.data.images.jpeg_header import read_jpeg_size
from m2_encoder.data.images.limits import ImageLimits, check_size, open_pixels
from m2_encoder.data.images.transforms import MAX_PIXELS, open_image
from m2_encoder.data.samples.parse import SampleProblem
from m2_encoder.errors import ImageError

_FAST_FORMATS = frozenset({"JPEG", "MPO"})  # MPO: a JPEG with more pictures behind it
_DEFAULT_LIMITS = ImageLimits()

_TURNED_BY = frozenset({"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"})  # Pillow's names in `info`

# EXIF orientation -> swap rows and columns, then mirror vertically, then horizontally.
_ORIENTATIONS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


class UnusableImageError(SampleProblem, ImageError):
    """The bytes of one image cannot be used; `reason` is one word, as in the metrics `data/skipped/<reason>`."""


def decode_image_uint8(
    data: bytes,
    *,
    max_pixels: Count = _DEFAULT_LIMITS.max_pixels,
    min_side_px: Count = _DEFAULT_LIMITS.min_side_px,
    max_aspect: Annotated[float, Ge(1)] = _DEFAULT_LIMITS.max_aspect,
    honor_exif: bool = True,
    on_fallback: Callable[[], None] | None = None,
) -> Tensor:
    """(3, H, W) uint8, with the channels last in memory, of an image file; of an animation, the first frame.

    Args:
        data: content of the file.
        max_pixels: width x height at most.
        min_side_px: the shorter side at least.
        max_aspect: the longer side over the shorter one, at most.
        honor_exif: apply the EXIF orientation, as browsers do. Evaluation ignores it by default, as the official code.
        on_fallback: called for every image that Pillow decodes.

    Raises:
        UnusableImageError: with the reason empty_member, undecodable_image, too_many_pixels, too_small or absurd_shape.
    """
    limits = ImageLimits(max_pixels, min_side_px, max_aspect)
    size = read_jpeg_size(data)
    is_fast, orientation = True, 1
    try:
        if size is not None and size[0] * size[1] <= MAX_PIXELS:
            check_size(*size, limits)
        else:
            with open_pixels(data, limits) as header:
                is_fast = header.format in _FAST_FORMATS and header.mode != "CMYK"
                orientation = _orientation(header) if honor_exif else 1
    except SampleProblem as error:
        raise UnusableImageError(error.reason, error.detail) from error
    pixels = _decode_fast(data) if is_fast else None
    if pixels is None:
        pixels = _decode_by_pillow(data, max_pixels)
        if on_fallback is not None:
            on_fallback()
    return torch.from_numpy(_turn(pixels, orientation)).permute(2, 0, 1)


def _orientation(header: Image.Image) -> int:
    """Orientation by EXIF or XMP, 1..8; 1 without a readable one."""
    if _TURNED_BY.isdisjoint(header.info):
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return int(header.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        # Not too broad: on damaged EXIF Pillow raises many kinds, and the pixels are none the worse for it.
        return 1


def _decode_fast(data: bytes) -> npt.NDArray[np.uint8] | None:
    """(H, W, 3) by libjpeg-turbo; None where it warns or fails: Pillow decides whether the file is usable."""
    try:
        return decode_jpeg(data)
    except ValueError:
        return None


def _decode_by_pillow(data: bytes, max_pixels: int) -> npt.NDArray[np.uint8]:
    """(H, W, 3), writable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; what makes an image unusable is an error
            return np.array(open_image(data, max_pixels=max_pixels))
    except ImageError as error:
        raise UnusableImageError("undecodable_image", str(error).removeprefix("image bytes: ")) from error


def _turn(pixels: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """Upright, (H, W, 3), contiguous."""
    if orientation not in _ORIENTATIONS:
        return pixels
    swap, vertically, horizontally = _ORIENTATIONS[orientation]
    pixels = pixels.transpose(1, 0, 2) if swap else pixels
    return pixels[:: -1 if vertically else 1, :: -1 if horizontally else 1].copy()
