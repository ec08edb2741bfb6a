"""Image files for shards: the source's bytes, or encoded again where size or format must change."""

from __future__ import annotations

import io
from typing import Final, NamedTuple

from PIL import Image

from m2_encoder.data.images.limits import ImageLimits, load_pixels, open_pixels
from m2_encoder.data.images.rgb import (
    has_alpha,
    is_deep,
    read_orientation,
    scale_levels,
    transparency_stretch,
    turn_image,
    with_alpha,
)
from m2_encoder.data.samples.parse import SampleProblem
from m2_encoder.errors import ImageError

_EXTENSIONS: Final = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_DEFAULT_QUALITY: Final = 90


class ImageOptions(NamedTuple):
    """What is done to images.

    Attributes:
        limits: images outside are failures.
        verify: decode every image, so that cut ones fail now and not in training.
        max_side_px: larger images are reduced to this longer side; None keeps them.
        quality: of JPEG; None keeps files as they are where they keep their size.
    """

    limits: ImageLimits = ImageLimits()
    verify: bool = True
    max_side_px: int | None = None
    quality: int | None = None


class PreparedImage(NamedTuple):
    """An image as it goes into a shard."""

    content: bytes
    extension: str
    width: int
    height: int
    is_changed: bool  # whether it is other than in the source


def prepare_image(content: bytes, options: ImageOptions) -> PreparedImage:
    """Check an image and, where asked for, reduce or encode it again.

    The first frame of other formats (GIF, BMP, TIFF, AVIF, …) becomes PNG without loss. Grey levels of
    16 and 32 bits become 8, by the rule of `rgb.scale_levels`. Encoding again applies the EXIF orientation, because the
    result has no EXIF. Images with alpha are encoded as PNG.

    Raises:
        SampleProblem: as `read_image_facts`.
    """
    with open_pixels(content, options.limits) as image:
        extension = _EXTENSIONS.get(image.format or "")
        reduced = options.max_side_px is not None and max(image.size) > options.max_side_px
        is_lossy = reduced or options.quality is not None
        if extension is not None and not is_lossy and not is_deep(image):
            if options.verify:
                load_pixels(image)
            return PreparedImage(content, extension, *image.size, False)
        try:
            return _encode(image, options if is_lossy else None)
        except SampleProblem:
            raise
        except ImageError as error:
            raise SampleProblem("undecodable_image", error.text) from error
        except (OSError, ValueError) as error:  # what Pillow raises for modes that it reads but cannot write
            raise SampleProblem("undecodable_image", f"{image.format} cannot be encoded again: {error}") from error


def _encode(image: Image.Image, options: ImageOptions | None) -> PreparedImage:
    picture = _to_eight_bits(image)
    if options is not None and options.max_side_px is not None and max(picture.size) > options.max_side_px:
        scale = options.max_side_px / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if options is None or picture.mode == "RGBA":
        picture.save(buffer, "PNG")
        return PreparedImage(buffer.getvalue(), "png", *picture.size, True)
    picture.save(buffer, "JPEG", quality=_DEFAULT_QUALITY if options.quality is None else options.quality)
    return PreparedImage(buffer.getvalue(), "jpg", *picture.size, True)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """The image, decoded and upright, as L, RGB or RGBA, without the metadata of its source."""
    orientation, stretch = read_orientation(image), transparency_stretch(image)
    load_pixels(image)
    if has_alpha(image):
        picture = with_alpha(image, stretch=stretch)
    elif is_deep(image):
        picture = scale_levels(image)
    else:
        mode = "L" if image.mode in ("1", "L") else "RGB"
        picture = image.convert(mode) if image.mode != mode else image.copy()
    picture = turn_image(picture, orientation, of=image)
    picture.info.clear()
    return picture
