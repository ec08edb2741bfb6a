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

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from simplejpeg import decode_jpeg
from torch import Tensor

from m2_encoder.bounds import Aspect, Count, Pixels
from m2_encoder.data.images.jpeg_header import read_jpeg_size
from m2_encoder.data.images.limits import ImageLimits, check_size, load_rgb, open_pixels
from m2_encoder.data.images.rgb import read_orientation, turn
from m2_encoder.data.images.transforms import MAX_PIXELS
from m2_encoder.data.samples.parse import SampleProblem
from m2_encoder.errors import ImageError
from m2_encoder.pictures import STANDARD, PicturePolicy

_FAST_FORMATS = frozenset({"JPEG", "MPO"})  # MPO: a JPEG with more pictures behind it
_DEFAULT_LIMITS = ImageLimits()


class UnusableImageError(SampleProblem, ImageError):
    """The bytes of one image cannot be used; `reason` is one word, as in the metrics `data/skipped/<reason>`."""


def decode_image_uint8(
    data: bytes,
    *,
    max_pixels: Count = _DEFAULT_LIMITS.max_pixels,
    min_side_px: Pixels = _DEFAULT_LIMITS.min_side_px,
    max_aspect: Aspect = _DEFAULT_LIMITS.max_aspect,
    pictures: PicturePolicy = STANDARD,
    honor_exif: bool | None = None,
    on_fallback: Callable[[], None] | None = None,
) -> Tensor:
    """(3, H, W) uint8, with the channels last in memory, of an image file; of an animation, the first frame.

    Args:
        data: content of the file.
        max_pixels: width x height at most.
        min_side_px: the shorter side at least.
        max_aspect: the longer side over the shorter one, at most.
        pictures: what its pixels are; a run passes that of its model.
        honor_exif: obey the orientation of EXIF, or ignore it; None: as `pictures` says.
        on_fallback: called for every image that Pillow decodes.

    Raises:
        UnusableImageError: with the reason empty_member, undecodable_image, too_many_pixels, too_small or absurd_shape.
    """
    limits = ImageLimits(max_pixels, min_side_px, max_aspect)
    policy = pictures.with_orientation(honor_exif)
    size = read_jpeg_size(data)
    try:
        if size is not None and size[0] * size[1] <= MAX_PIXELS:
            check_size(*size, limits)
            pixels = _decode_fast(data)
            if pixels is not None:
                return torch.from_numpy(pixels).permute(2, 0, 1)
        with open_pixels(data, limits) as image:
            if size is None and image.format in _FAST_FORMATS and image.mode != "CMYK":
                pixels = _decode_fast(data)
                if pixels is not None:
                    orientation = read_orientation(image) if policy.orientation == "obeyed" else 1
                    return torch.from_numpy(turn(pixels, orientation)).permute(2, 0, 1)
            pixels = np.array(load_rgb(image, policy))
    except SampleProblem as error:
        raise UnusableImageError(error.reason, error.detail) from error
    if on_fallback is not None:
        on_fallback()
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _decode_fast(data: bytes) -> npt.NDArray[np.uint8] | None:
    """(H, W, 3) by libjpeg-turbo; None where it warns or fails: Pillow decides whether the file is usable."""
    try:
        return decode_jpeg(data)
    except ValueError:
        return None
