"""Small copies of pictures, for pages."""

from __future__ import annotations

import io
from typing import Final

from PIL import Image

from m2_encoder.data.images.opening import open_picture
from m2_encoder.data.images.rgb import to_rgb
from m2_encoder.data.images.transforms import MAX_PIXELS
from m2_encoder.errors import ImageError
from m2_encoder.pictures import STANDARD

DRAWING_PX: Final = 128
"""What is not larger is enlarged by the page, with all that a JPEG adds."""


def make_thumbnail(content: bytes, size: int) -> bytes:
    """A JPEG, upright and on white, whose longer side has at most `size` pixels; nothing is enlarged.

    Raises:
        ImageError: if the content is no picture, damaged or too large.
    """
    output = io.BytesIO()
    try:
        with open_picture(content) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"{image.width} x {image.height} pixels, at most {MAX_PIXELS:,} are decoded")
            if image.format == "JPEG":
                image.draft("RGB", (size, size))  # decodes at a fraction of its size, still larger than asked for
            small = to_rgb(image, STANDARD)
            small.thumbnail((size, size), Image.Resampling.LANCZOS, reducing_gap=2.0)
            small.save(output, "JPEG", quality=85 if max(small.size) > DRAWING_PX else 95)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"too large: {error}") from error
    return output.getvalue()
