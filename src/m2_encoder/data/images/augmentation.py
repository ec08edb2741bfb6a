"""Image operations for training: one table of named ops, and the random crop.

An op takes an RGB image, a strength in 0..1, a random generator and the grey level of uncovered pixels, and
returns an RGB image of the same size; it never changes its input. The ranges are those of the augmentation
that the official configuration names (strength 0.7 there): shear ±0.3·strength, translation ±10·strength
pixels, rotation ±30·strength degrees, enhancement factor 0.1 + 1.8·strength.

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
    """Turn, zoom, shift and shear at random about the centre, in one bilinear resampling.

    Args:
        image: RGB.
        degrees: the angle is uniform in -degrees..degrees.
        zoom: least and most size of the content over its old size, log-uniform.
        translate: the shift in x and in y is uniform in -translate..translate of the side.
        shear: the shear in x is uniform in -shear..shear.
        fill: grey level of pixels that the image no longer covers, 0..255.
        rng: the only source of randomness.

    Returns:
        A new RGB image of the same size.
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
    """Op from one of Pillow's enhancers."""

    def enhance(image: Image.Image, strength: float, _rng: np.random.Generator, _fill: int) -> Image.Image:
        return enhancer(image).enhance(0.1 + 1.8 * strength)

    return enhance


def _shear_x(image: Image.Image, strength: float, rng: np.random.Generator, fill: int) -> Image.Image:
    return _affine(image, (1, _signed(_MAX_SHEAR * strength, rng), 0, 0, 1, 0), fill)


def _shear_y(image: Image.Image, strength: float, rng: np.random.Generator, fill: int) -> Image.Image:
    return _affine(image, (1, 0, 0, _signed(_MAX_SHEAR * strength, rng), 1, 0), fill)


def _translate_x(image: Image.Image, strength: float, rng: np.random.Generator, fill: int) -> Image.Image:
    return _affine(image, (1, 0, _signed(_MAX_TRANSLATION_PX * strength, rng), 0, 1, 0), fill)


def _translate_y(image: Image.Image, strength: float, rng: np.random.Generator, fill: int) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, _signed(_MAX_TRANSLATION_PX * strength, rng)), fill)


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
"""What the training variant of the official transform samples from."""

OPERATIONS: Mapping[str, Operation] = MappingProxyType(
    {
        "identity": lambda image, _strength, _rng, _fill: image,
        "autocontrast": lambda image, _strength, _rng, _fill: ImageOps.autocontrast(image),
        "equalize": lambda image, _strength, _rng, _fill: ImageOps.equalize(image),
        "brightness": _enhance(ImageEnhance.Brightness),
        "sharpness": _enhance(ImageEnhance.Sharpness),
        "shear_x": _shear_x,
        "shear_y": _shear_y,
        "translate_x": _translate_x,
        "translate_y": _translate_y,
        "rotate": _rotate,
        # Beyond the official ten, for those who name them.
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
    """Draw ops with replacement and apply each with a probability.

    Args:
        image: RGB.
        names: keys of `OPERATIONS` to draw from.
        num_ops: how many are drawn.
        probability: of applying a drawn op, 0..1.
        strength: of every op, 0..1.
        fill: grey level of uncovered pixels, 0..255.
        rng: the only source of randomness.

    Returns:
        An RGB image of the same size; the input itself if nothing was applied.
    """
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

    Args:
        image: RGB.
        ranges: (brightness, contrast, saturation, hue). The first three scale by a factor from 1 - range..1 + range
            (never below 0), hue turns by -range..range of the colour circle.
        rng: the only source of randomness.

    Returns:
        A new RGB image of the same size.
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
    """A random part of an image: area uniform, aspect ratio log-uniform, position uniform.

    Args:
        size: (width, height) of the image in pixels.
        scale: least and most of the image's area, 0..1.
        ratio: least and most width / height.
        rng: the only source of randomness.

    Returns:
        (left, top, right, bottom) inside the image. Where ten draws do not fit, the largest centred part with
        an allowed ratio.

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
