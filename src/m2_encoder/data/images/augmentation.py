"""Random image operations for training, and the random crop.

An operation maps (RGB image, strength in 0..1, generator, grey level of uncovered pixels) to an RGB image of the same
size. The ranges are those of the official augmentation (strength 0.7 there): shear ±0.3·strength, translation
±10·strength pixels, rotation ±30·strength degrees, enhancement factor 0.1 + 1.8·strength.

Reference: RandAugment (arXiv:1909.13719).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Operation = Callable[[Image.Image, float, np.random.Generator, int], Image.Image]

_MAX_SHEAR = 0.3
_MAX_TRANSLATION_PX = 10.0
_MAX_ROTATION_DEGREES = 30.0
_MAX_LOST_BITS = 4
_CROP_ATTEMPTS = 10

# NTSC colour space (FCC 1953): luma, and a chroma plane in which a rotation is a change of hue
_RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_YIQ_TO_RGB = np.linalg.inv(_RGB_TO_YIQ)


def _signed(value: float, rng: np.random.Generator) -> float:
    """The value or its negative, with equal probability."""
    return value if rng.random() < 0.5 else -value


def _affine(image: Image.Image, matrix: tuple[float, ...], fill: int) -> Image.Image:
    """Bilinear affine map; `matrix` takes output to input coordinates, (a, b, c, d, e, f)."""
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix,
        resample=Image.Resampling.BILINEAR,
        fillcolor=(fill, fill, fill),
    )


def random_affine(
    image: Image.Image,
    *,
    degrees: float,
    zoom: tuple[float, float],
    translate: float,
    shear: float,
    fill: int,
    rng: np.random.Generator,
) -> Image.Image:
    """Rotate, zoom, shift and shear about the centre, in one bilinear resampling.

    Uniform: the angle in ±degrees, the shifts in ±translate of each side, the shear of x in ±shear. Log-uniform: the
    zoom, (least, most). `fill` is the grey level of uncovered pixels, 0..255.
    """
    angle = math.radians(rng.uniform(-degrees, degrees))
    inverse_zoom = math.exp(-rng.uniform(math.log(zoom[0]), math.log(zoom[1])))
    slant = rng.uniform(-shear, shear)
    shift_x, shift_y = (side * rng.uniform(-translate, translate) for side in image.size)
    cos, sin = inverse_zoom * math.cos(angle), inverse_zoom * math.sin(angle)
    a, b, d, e = cos, slant * cos - sin, sin, slant * sin + cos
    centre_x, centre_y = (side / 2 for side in image.size)
    out_x, out_y = centre_x + shift_x, centre_y + shift_y
    matrix = (a, b, centre_x - a * out_x - b * out_y, d, e, centre_y - d * out_x - e * out_y)
    return _affine(image, matrix, fill)


def _enhance(enhancer: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    def enhance(image: Image.Image, strength: float, _rng: np.random.Generator, _fill: int) -> Image.Image:
        return enhancer(image).enhance(0.1 + 1.8 * strength)

    return enhance


def _move(place: int, most: float) -> Operation:
    """Affine op: one coefficient of the identity becomes ±`most`·strength."""

    def move(image: Image.Image, strength: float, rng: np.random.Generator, fill: int) -> Image.Image:
        matrix = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
        matrix[place] = _signed(most * strength, rng)
        return _affine(image, tuple(matrix), fill)

    return move


def _rotate(image: Image.Image, strength: float, rng: np.random.Generator, fill: int) -> Image.Image:
    degrees = _signed(_MAX_ROTATION_DEGREES * strength, rng)
    return image.rotate(degrees, resample=Image.Resampling.BILINEAR, fillcolor=(fill, fill, fill))


def _solarize(image: Image.Image, strength: float, _rng: np.random.Generator, _fill: int) -> Image.Image:
    return ImageOps.solarize(image, round(256 * (1 - strength)))


def _posterize(image: Image.Image, strength: float, _rng: np.random.Generator, _fill: int) -> Image.Image:
    return ImageOps.posterize(image, 8 - round(_MAX_LOST_BITS * strength))


OFFICIAL_OPERATIONS: tuple[str, ...] = (
    "identity",
    "autocontrast",
    "equalize",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
)
"""Operations of the official training transform."""

OPERATIONS: Mapping[str, Operation] = MappingProxyType(
    {
        "identity": lambda image, _strength, _rng, _fill: image,
        "autocontrast": lambda image, _strength, _rng, _fill: ImageOps.autocontrast(image),
        "equalize": lambda image, _strength, _rng, _fill: ImageOps.equalize(image),
        "brightness": _enhance(ImageEnhance.Brightness),
        "sharpness": _enhance(ImageEnhance.Sharpness),
        "shear_x": _move(1, _MAX_SHEAR),
        "shear_y": _move(3, _MAX_SHEAR),
        "translate_x": _move(2, _MAX_TRANSLATION_PX),
        "translate_y": _move(5, _MAX_TRANSLATION_PX),
        "rotate": _rotate,
        # not in the official transform
        "contrast": _enhance(ImageEnhance.Contrast),
        "saturation": _enhance(ImageEnhance.Color),
        "hue": lambda image, strength, rng, _fill: color_jitter(image, (0.0, 0.0, 0.0, 0.5 * strength), rng),
        "grayscale": lambda image, _strength, _rng, _fill: image.convert("L").convert("RGB"),
        "invert": lambda image, _strength, _rng, _fill: ImageOps.invert(image),
        "solarize": _solarize,
        "posterize": _posterize,
    }
)
"""Every op by name; strength 0..1, and 0 leaves the image as it is for all geometric ops."""


def random_operations(
    image: Image.Image,
    *,
    names: tuple[str, ...],
    num_ops: int,
    probability: float,
    strength: float,
    fill: int,
    rng: np.random.Generator,
) -> Image.Image:
    """Draw `num_ops` of `OPERATIONS` with replacement and apply each with a probability."""
    for _ in range(num_ops):
        name = names[int(rng.random() * len(names))]
        if rng.random() < probability:
            image = OPERATIONS[name](image, strength, rng, fill)
    return image


def color_jitter(
    image: Image.Image, ranges: tuple[float, float, float, float], rng: np.random.Generator
) -> Image.Image:
    """Change brightness, contrast, saturation and hue at random, as one linear map of the colours.

    Contrast scales the distance from middle grey. Hue turns and saturation scales the chroma plane of YIQ, which keeps
    the luma of every pixel.

    `ranges` are (brightness, contrast, saturation, hue): the first three scale by a factor from 1 - range..1 + range
    (never below 0), hue turns by -range..range of the colour circle.
    """
    brightness, contrast, saturation = (rng.uniform(max(0.0, 1 - extent), 1 + extent) for extent in ranges[:3])
    angle = 2 * math.pi * rng.uniform(-ranges[3], ranges[3])
    cos, sin = saturation * math.cos(angle), saturation * math.sin(angle)
    chroma = np.array([[1.0, 0.0, 0.0], [0.0, cos, -sin], [0.0, sin, cos]])
    colors = brightness * contrast * (_YIQ_TO_RGB @ chroma @ _RGB_TO_YIQ)
    offset = brightness * (1 - contrast) * 127.5
    return image.convert("RGB", tuple(np.column_stack([colors, np.full(3, offset)]).flatten().tolist()))


def random_crop_box(
    size: tuple[int, int],
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a crop: area uniform, aspect ratio log-uniform, position uniform.

    If ten draws do not fit, the largest centred part with an allowed ratio.

    Args:
        size: (width, height) in pixels.
        scale: least and most share of the area, 0..1.
        ratio: least and most width / height.
        rng: generator.

    Reference: Inception crops (arXiv:1409.4842), as torchvision's RandomResizedCrop draws them.
    """
    width, height = size
    draw = rng.random  # `uniform` makes the same numbers of it, and takes three times as long
    least_scale, scale_extent = scale[0], scale[1] - scale[0]
    least_log, log_extent = math.log(ratio[0]), math.log(ratio[1]) - math.log(ratio[0])
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * (least_scale + scale_extent * draw())
        aspect = math.exp(least_log + log_extent * draw())
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(draw() * (width - crop_width + 1))
            top = int(draw() * (height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    crop_width = min(width, max(1, round(height * ratio[1])))
    crop_height = min(height, max(1, round(width / ratio[0])))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height
