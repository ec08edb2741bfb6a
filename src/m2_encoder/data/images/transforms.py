"""Transforms of image files, arrays and PIL images to tensors, for evaluation and training; the model normalises.

Letters: S image side in pixels · H, W height and width of a source.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import Ge, Gt, Le, Len
from PIL import Image, ImageOps
from torch import Tensor

from m2_encoder.bounds import Count, Fraction, Index, NotNegative, Pixels, Positive, Rule, check_bounds
from m2_encoder.data.images.augmentation import (
    OFFICIAL_OPERATIONS,
    OPERATIONS,
    color_jitter,
    random_affine,
    random_crop_box,
    random_operations,
)
from m2_encoder.data.images.opening import open_picture, read_picture_file
from m2_encoder.data.images.rgb import to_rgb
from m2_encoder.errors import ImageError, UserError
from m2_encoder.pictures import OFFICIAL, PicturePolicy

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[Any]
"""A file name, the content of an image file, a PIL image, or a uint8 array (H, W), (H, W, 1 or 3 or 4)."""

MAX_PIXELS = 89_478_485
"""Largest image that is decoded: Pillow's own limit against decompression bombs, 1/4 GiB as RGB."""

_MAX_MAGNITUDE = 10
_SOURCES = "give a file name, the bytes of an image file, a PIL image, or a uint8 array (H, W, 3)"


def open_image(
    source: ImageSource,
    *,
    pictures: PicturePolicy = OFFICIAL,
    honor_exif: bool | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Open an image as RGB; an RGB image is returned itself.

    Grey is copied to three channels; palettes are expanded; CMYK is converted. Of an animation, the first frame is
    taken.

    Args:
        source: of any kind.
        pictures: what its pixels are, by default as in the official code: alpha is dropped, the EXIF orientation
            ignored, 16-bit grey clipped at 255.
        honor_exif: obey the orientation of EXIF, or ignore it; None: as `pictures` says.
        max_pixels: larger images are refused before they are decoded; Pillow refuses files above twice its own limit.

    Raises:
        ImageError: for what is missing, empty, no image, damaged, too large, or an array of another kind.
    """
    name = _name_of(source)
    policy = pictures.with_orientation(honor_exif)
    try:
        if isinstance(source, np.ndarray):
            return to_rgb(_from_array(source), policy)
        if isinstance(source, Image.Image):
            _check_size(source, max_pixels)
            return to_rgb(source, policy)
        with open_picture(source if isinstance(source, bytes) else read_picture_file(source)) as image:
            _check_size(image, max_pixels)
            return to_rgb(image, policy)
    except ImageError as error:
        raise ImageError(f"{name}: {error.text}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: too large: {error}") from error


class EvalTransform:
    """The official transform of evaluation: RGB, then bicubic resize with antialias to exactly S x S.

    The aspect ratio is not kept and nothing is cropped. The arguments are those of `open_image`; `load` passes the
    policy that the model was trained with.
    """

    @check_bounds
    def __init__(
        self,
        image_size: Pixels,
        *,
        pictures: PicturePolicy = OFFICIAL,
        honor_exif: bool | None = None,
        max_pixels: Count = MAX_PIXELS,
    ) -> None:
        self.image_size = int(image_size)
        self.pictures = pictures.with_orientation(honor_exif)
        self.max_pixels = int(max_pixels)

    def __call__(self, source: ImageSource) -> Tensor:
        """(3, S, S) float32 in 0..1 of one image, not normalised.

        Raises:
            ImageError: if the source cannot be opened.
        """
        levels = self.to_uint8(source).numpy()
        # By NumPy, on this thread: torch would wake its pool, whose spinning threads double the CPU time.
        return torch.from_numpy(np.divide(levels, np.float32(255), dtype=np.float32))

    def to_uint8(self, source: ImageSource) -> Tensor:
        """(3, S, S) uint8 of one image; `__call__` is this divided by 255.

        Raises:
            ImageError: if the source cannot be opened.
        """
        image = open_image(source, pictures=self.pictures, max_pixels=self.max_pixels)
        return _to_tensor(_resize(image, self.image_size))

    def __repr__(self) -> str:
        return _describe(self)


_ASCENDING = Rule(lambda pair: pair[0] <= pair[1], "two positive numbers, the smaller one first", "[0.8, 1.0]")
_JITTER = Rule(
    lambda ranges: len(ranges) == 4 and max(ranges[:3]) <= 10 and ranges[3] <= 0.5,
    "ranges of brightness, contrast and saturation, 0..10, and of hue, 0..0.5",
    "[0.4, 0.4, 0.4, 0.1]",
)
_OPERATIONS = Rule(
    lambda names: bool(names) and set(names) <= set(OPERATIONS),
    f"a list of names among {', '.join(OPERATIONS)}",
    "[Rotate]",
)


class TrainTransform:
    """The official training transform, with more augmentation for small data, off by default.

    Random resized crop (bicubic) → horizontal flip → `num_ops` random operations, each applied with
    `op_probability`. Then, where switched on: an affine map (rotation, zoom, shift, shear), colour jitter, greyscale,
    inversion. Options that are off draw nothing.

    Args:
        image_size: S.
        scale: least and most of the area that a crop keeps, 0..1.
        ratio: least and most width / height of a crop, before it is resized to a square.
        flip: probability of mirroring left and right.
        num_ops: operations drawn per image, with replacement.
        op_probability: probability of applying a drawn operation.
        magnitude: strength of the operations, 0..10.
        operations: names in `augmentation.OPERATIONS` to draw from.
        fill: grey level of pixels that shear, translation or rotation leave uncovered, 0..255.
        rotate_degrees: the image is turned by a uniform angle up to this, in both directions.
        zoom: least and most size of the content over its size in the crop; below 1 a margin of `fill` appears.
        translate: largest shift in each direction, as a part of the side.
        shear: largest shear in x.
        color_jitter: ranges of (brightness, contrast, saturation, hue); see `augmentation.color_jitter`.
        grayscale: probability of losing all colour.
        invert: probability of becoming a negative.
        pictures: what the pixels of sources are; a run passes that of its model.
        honor_exif: obey the orientation of EXIF, or ignore it; None: as `pictures` says.
        max_pixels: larger images are refused before they are decoded.
    """

    @check_bounds
    def __init__(
        self,
        image_size: Pixels,
        *,
        scale: Annotated[Sequence[Annotated[float, Gt(0), Le(1)]], Len(2, 2), _ASCENDING] = (0.8, 1.0),
        ratio: Annotated[Sequence[Positive], Len(2, 2), _ASCENDING] = (3 / 4, 4 / 3),
        flip: Fraction = 0.5,
        num_ops: Annotated[Index, Le(100)] = 2,
        op_probability: Fraction = 0.5,
        magnitude: Annotated[float, Ge(0), Le(_MAX_MAGNITUDE)] = 7,
        operations: Annotated[Sequence[str], _OPERATIONS] = OFFICIAL_OPERATIONS,
        fill: Annotated[int, Ge(0), Le(255)] = 128,
        rotate_degrees: Annotated[float, Ge(0), Le(180)] = 0.0,
        zoom: Annotated[Sequence[Annotated[float, Gt(0), Le(10)]], Len(2, 2), _ASCENDING] = (1.0, 1.0),
        translate: Fraction = 0.0,
        shear: Fraction = 0.0,
        color_jitter: Annotated[Sequence[NotNegative], _JITTER] = (0.0, 0.0, 0.0, 0.0),
        grayscale: Fraction = 0.0,
        invert: Fraction = 0.0,
        pictures: PicturePolicy = OFFICIAL,
        honor_exif: bool | None = None,
        max_pixels: Count = MAX_PIXELS,
    ) -> None:
        self.image_size = int(image_size)
        self.scale = _pair(scale)
        self.ratio = _pair(ratio)
        self.flip = float(flip)
        self.num_ops = int(num_ops)
        self.op_probability = float(op_probability)
        self.magnitude = float(magnitude)
        self.operations = tuple(operations)
        self.fill = int(fill)
        self.rotate_degrees = float(rotate_degrees)
        self.zoom = _pair(zoom)
        self.translate = float(translate)
        self.shear = float(shear)
        brightness, contrast, saturation, hue = map(float, color_jitter)
        self.color_jitter = (brightness, contrast, saturation, hue)
        self.grayscale = float(grayscale)
        self.invert = float(invert)
        self.pictures = pictures.with_orientation(honor_exif)
        self.max_pixels = int(max_pixels)

    def __call__(self, source: ImageSource, *, rng: np.random.Generator) -> Tensor:
        """(3, S, S) uint8 of one image; all randomness comes from `rng`.

        Raises:
            ImageError: if the source cannot be opened.
            UserError: if `rng` is no NumPy generator.
        """
        check_generator(rng)
        image = open_image(source, pictures=self.pictures, max_pixels=self.max_pixels)
        image = image.crop(random_crop_box(image.size, scale=self.scale, ratio=self.ratio, rng=rng))
        image = _resize(image, self.image_size)
        if rng.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return _to_tensor(self._augment(image, rng))

    def _augment(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Augmentation after the flip."""
        image = random_operations(
            image,
            names=self.operations,
            num_ops=self.num_ops,
            probability=self.op_probability,
            strength=self.magnitude / _MAX_MAGNITUDE,
            fill=self.fill,
            rng=rng,
        )
        if self.rotate_degrees or self.translate or self.shear or self.zoom != (1.0, 1.0):
            image = random_affine(
                image,
                degrees=self.rotate_degrees,
                zoom=self.zoom,
                translate=self.translate,
                shear=self.shear,
                fill=self.fill,
                rng=rng,
            )
        if any(self.color_jitter):
            image = color_jitter(image, self.color_jitter, rng)
        if self.grayscale > 0 and rng.random() < self.grayscale:
            image = image.convert("L").convert("RGB")
        if self.invert > 0 and rng.random() < self.invert:
            image = ImageOps.invert(image)
        return image

    def __repr__(self) -> str:
        return _describe(self)


def check_generator(rng: object) -> None:
    """Refuse anything but a NumPy generator."""
    if not isinstance(rng, np.random.Generator):
        raise UserError(f"rng must be a numpy.random.Generator, as default_rng(seed) makes, got {type(rng).__name__}")


def _name_of(source: ImageSource) -> str:
    """How messages call a source."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "")) or "PIL image"
    if isinstance(source, bytes):
        return "image bytes"
    if isinstance(source, np.ndarray):
        return "array"
    raise ImageError(f"an image cannot be {type(source).__name__}; {_SOURCES}")


def _check_size(image: Image.Image, max_pixels: int) -> None:
    """Check the size in the header."""
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"too large: {width} x {height} pixels, at most {max_pixels:,} are allowed")
    if width * height == 0:
        raise ImageError(f"has no pixels: {width} x {height}")


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    if array.dtype != np.uint8:
        scaling = "multiply values of 0..1 by 255" if array.dtype.kind == "f" else "bring values to 0..255"
        raise ImageError(f"dtype must be uint8, got {array.dtype}; {scaling}, then .astype(numpy.uint8)")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        planar = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        fix = "; channels come last, use .transpose(1, 2, 0)" if planar else ""
        raise ImageError(f"shape must be (H, W) or (H, W, 1 or 3 or 4), got {array.shape}{fix}")
    return Image.fromarray(np.ascontiguousarray(array))


def _resize(image: Image.Image, image_size: int) -> Image.Image:
    """To a square, bicubic with antialias."""
    return image.resize((image_size, image_size), Image.Resampling.BICUBIC)


def _to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) uint8 of an RGB image, in memory of its own."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def _describe(transform: EvalTransform | TrainTransform) -> str:
    """Constructor call that makes an equal transform."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in vars(transform).items())
    return f"{type(transform).__name__}({arguments})"


def _pair(values: Sequence[float]) -> tuple[float, float]:
    least, most = values
    return float(least), float(most)
