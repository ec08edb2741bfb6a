"""Measurements of an image for curation: size, hash of its bytes, perceptual hash of 64 bits, mean colour.

Pixels are those of the policy `standard`: upright, alpha on white, 16 bits scaled, as viewers show a picture.

The perceptual hash is the sign of the lowest spatial frequencies (8 x 8 of a DCT of 32 x 32 grey pixels) against their
median, as in pHash. It survives scaling, recompression and small changes of colour, so the mean colour is kept beside
it: a red and a blue heart are no duplicates. Every hash has the same number of bits set, so distances are even (but for
ties).
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from m2_encoder.data.images.limits import ImageLimits, load_rgb, open_pixels
from m2_encoder.data.samples.parse import SampleProblem
from m2_encoder.pictures import STANDARD

_SIDE: Final = 32
_KEPT: Final = 8
_MEDIAN: Final = (_KEPT * _KEPT - 1) // 2  # place of the median among all frequencies but the mean
_MIN_CONTRAST: Final = 16.0  # of the strongest frequency, grey levels times pixels: below it there is only noise
_GREY: Final = np.array([0.299, 0.587, 0.114])

FloatArray = npt.NDArray[np.float64]


class ImageMeasure(NamedTuple):
    """One image."""

    image_hash: bytes  # SHA-256 of its bytes, 32 bytes
    width: int  # pixels
    height: int  # pixels
    perceptual_hash: int | None  # 64 bits; None for a plain area, which looks like every other one
    mean_color: int  # red, green and blue as 0xRRGGBB


def measure_image(content: bytes, *, max_pixels: int) -> ImageMeasure:
    """Decode an image and measure it; JPEGs are decoded at a fraction of their size where that is enough.

    Raises:
        SampleProblem: empty_member, undecodable_image or too_many_pixels.
    """
    limits = ImageLimits(max_pixels=max_pixels, min_side_px=1, max_aspect=float("inf"))
    with open_pixels(content, limits) as image:
        width, height = image.size
        thumbnail = _thumbnail(image)
    red, green, blue = (round(int(value) / _SIDE**2) for value in thumbnail.reshape(-1, 3).sum(axis=0, dtype=np.int64))
    return ImageMeasure(
        image_hash=hashlib.sha256(content).digest(),
        width=width,
        height=height,
        perceptual_hash=_hash(thumbnail),
        mean_color=red << 16 | green << 8 | blue,
    )


def _thumbnail(image: Image.Image) -> npt.NDArray[np.uint8]:
    """(32, 32, 3) mean colours."""
    image.draft("RGB", (2 * _SIDE, 2 * _SIDE))  # JPEG only; never smaller than that
    pixels = load_rgb(image, STANDARD)
    try:
        small = pixels.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    except Exception as error:
        # Not too broad: odd modes fail in many ways.
        raise SampleProblem("undecodable_image", str(error) or type(error).__name__) from error
    return np.asarray(small)


def _hash(thumbnail: npt.NDArray[np.uint8]) -> int | None:
    transform = _cosines()
    grey = thumbnail @ _GREY
    # Rounded, so that bits do not hang on the order in which a library sums.
    low = np.round(transform @ grey @ transform.T, 3).reshape(-1)
    if np.abs(low[1:]).max() < _MIN_CONTRAST:
        return None
    bits = low > np.sort(low[1:])[_MEDIAN]
    bits[0] = False  # the mean brightness says nothing about shapes
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@lru_cache(maxsize=1)
def _cosines() -> FloatArray:
    """The 8 lowest rows of the orthonormal DCT-II of 32 points."""
    frequency, place = np.arange(_KEPT)[:, None], np.arange(_SIDE)[None, :]
    scale: FloatArray = np.sqrt(np.where(frequency == 0, 1, 2) / _SIDE)
    return scale * np.cos(np.pi * (2 * place + 1) * frequency / (2 * _SIDE))
