"""Pictures of every mode as RGB of 8 bits, as a policy says.

Levels of 16 bits keep their high byte. Levels of 32 bits say no full scale: it is the smallest of 1 (floats only), 255
and 65,535 that holds them all; others, and numbers that are none, make a picture undecodable.
"""

from __future__ import annotations

import re
import struct
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin

from m2_encoder.errors import ImageError
from m2_encoder.pictures import PicturePolicy

TURNED, BLENDED, SCALED = "turned", "blended", "scaled"
NOT_TURNED, NOT_BLENDED, NOT_SCALED = "orientation ignored", "alpha dropped", "clipped"
FLAT = "one flat colour"
EFFECTS: Final = (TURNED, BLENDED, SCALED, NOT_TURNED, NOT_BLENDED, NOT_SCALED, FLAT)
"""What a policy does to a picture, or leaves undone, and what may come of it."""

_LEVELS: Final = {"white": 255, "grey": 128, "black": 0}
_ALPHA_MODES: Final = ("RGBA", "LA", "PA", "La", "RGBa")
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_IFD_KINDS: Final = {1: "B", 3: "H", 4: "I", 8: "h", 9: "i"}
_WHITE_IS_ZERO: Final = 262  # the TIFF tag that says what 0 is
_XMP_ORIENTATION: Final = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


def to_rgb(image: Image.Image, policy: PicturePolicy, effects: set[str] | None = None) -> Image.Image:
    """RGB of an opened picture, which is decoded here and may be returned itself.

    Args:
        image: of any mode; of an animation the current frame.
        policy: what its pixels are.
        effects: gets what the policy did, of `EFFECTS`; None does not ask, which is faster.

    Raises:
        ImageError: if it cannot be decoded, or has levels without a scale.
    """
    try:
        orientation = read_orientation(image)
        stretch = transparency_stretch(image)
        image.load()
        rgb = _flatten(image, policy, stretch, effects)
    except ImageError:
        raise
    except Exception as error:
        # Not too broad: on damaged bytes Pillow's many decoders raise nearly every built-in exception.
        raise ImageError(f"cannot be decoded: {str(error) or type(error).__name__}") from error
    obeys = _turns_itself(image) or policy.orientation == "obeyed"
    if effects is not None:
        effects |= {TURNED if obeys else NOT_TURNED} if orientation in _TURNS else set()
        effects |= {FLAT} if _is_flat(rgb) else set()
    return turn_image(rgb, orientation, of=image) if obeys else rgb


def turn_image(picture: Image.Image, orientation: int, *, of: Image.Image) -> Image.Image:
    """What was made of the decoded file `of`, upright."""
    return picture if orientation not in _TURNS or _turns_itself(of) else picture.transpose(_TURNS[orientation])


def read_orientation(image: Image.Image) -> int:
    """Orientation by EXIF or XMP, 1..8; 1 without a readable one.

    Of files it is read here, because Pillow reads all of EXIF, for which a hostile one can take any time.
    """
    if not isinstance(image, ImageFile.ImageFile):
        try:
            found = image.getexif().get(ExifTags.Base.Orientation)
        except Exception:  # not too broad: on damaged EXIF Pillow raises many kinds
            found = None
    elif isinstance(image, TiffImagePlugin.TiffImageFile):
        found = image.tag_v2.get(ExifTags.Base.Orientation)
    else:
        info = image.info
        exif, text = info.get("exif"), info.get("Raw profile type exif")
        if exif is None and isinstance(text, str):  # as ImageMagick writes it into a PNG: hexadecimal below three lines
            try:
                exif = bytes.fromhex("".join(text.split("\n")[3:]))
            except ValueError:
                exif = None
        found = _find_orientation(exif) if isinstance(exif, bytes) else None
        for key in ("XML:com.adobe.xmp", "xmp"):
            xmp = info.get(key)
            xmp = xmp.encode("utf-8", "replace") if isinstance(xmp, str) else xmp
            if found is None and isinstance(xmp, bytes) and (match := _XMP_ORIENTATION.search(xmp)):
                found = int(match[1])
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def scale_levels(image: Image.Image) -> Image.Image:
    """Grey levels of 16 or 32 bits as L, by the rule above.

    Raises:
        ImageError: for levels without a scale.
    """
    levels = np.asarray(image)
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.mode.startswith("I;16"):
        is_inverted = image.tag_v2.get(_WHITE_IS_ZERO) == 0  # Pillow obeys it for 8 bits alone
        levels = 65_535 - levels if is_inverted else levels
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):  # where Pillow stretches 16 bits to 32
        return Image.fromarray((levels >> 8).astype(np.uint8))
    low, high = float(levels.min()), float(levels.max())
    if not (low >= 0 and high <= 65_535):  # which is so for NaN, too
        raise ImageError(
            f"its levels, {low:g} to {high:g}, have no known scale: 0 to 1 (floats), to 255 or to 65,535 would; "
            "convert it to 8 bits"
        )
    if high > 255:
        return Image.fromarray((levels.astype(np.int64) >> 8).astype(np.uint8))
    factor = 255 if high <= 1 and image.mode == "F" else 1
    return Image.fromarray(np.rint(levels * factor).astype(np.uint8))


def is_deep(image: Image.Image) -> bool:
    """Whether a picture has grey levels of more than 8 bits."""
    return image.mode.startswith("I;16") or image.mode in ("I", "F")


def has_alpha(image: Image.Image) -> bool:
    """Whether a picture can have transparent pixels."""
    return image.mode in _ALPHA_MODES or "transparency" in image.info


def with_alpha(image: Image.Image, *, stretch: int = 1, clip: bool = False) -> Image.Image:
    """A picture that `has_alpha` as RGBA.

    Args:
        image: decoded.
        stretch: of its levels against the one that its file calls transparent.
        clip: levels above 255 instead of scaling 16 bits.
    """
    clear = image.info.get("transparency")
    if image.mode == "La":
        image = image.convert("LA")  # Pillow has no other way from there
    elif isinstance(clear, int) and image.mode.startswith("I;16"):
        mask = Image.fromarray(np.where(np.asarray(image) == clear, 0, 255).astype(np.uint8))
        grey = image.convert("L") if clip else scale_levels(image)
        return Image.merge("RGBA", (grey, grey, grey, mask))
    elif isinstance(clear, int) and image.mode == "L" and stretch > 1:
        image = image.copy()
        image.info["transparency"] = clear * stretch
    elif isinstance(clear, tuple) and max(clear) > 255:
        image = image.copy()
        image.info["transparency"] = tuple(level >> 8 for level in clear)
    return image.convert("RGBA")


def turn(pixels: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """Pixels, (H, W, 3), upright and contiguous."""
    if orientation not in _TURNS:
        return pixels
    pixels = pixels.transpose(1, 0, 2) if orientation >= 5 else pixels
    vertically, horizontally = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return pixels[:: -1 if vertically else 1, :: -1 if horizontally else 1].copy()


def _flatten(image: Image.Image, policy: PicturePolicy, stretch: int, effects: set[str] | None) -> Image.Image:
    """RGB of a decoded picture, not turned."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    deep = is_deep(image)
    if deep and effects is not None:
        effects.add(SCALED if policy.depth == "scaled" else NOT_SCALED)
    if has_alpha(image) and (policy.background != "dropped" or effects is not None):
        rgba = with_alpha(image, stretch=stretch, clip=policy.depth == "clipped")
        alpha = rgba.getchannel("A")
        is_clear = bool(np.asarray(alpha).min() < 255)
        if is_clear and effects is not None:
            effects.add(BLENDED if policy.background != "dropped" else NOT_BLENDED)
        if is_clear and policy.background != "dropped":
            level = _LEVELS[policy.background]
            ground = Image.new("RGB", image.size, (level, level, level))
            ground.paste(rgba.convert("RGB"), mask=alpha)
            return ground
    if deep and policy.depth == "scaled":
        return scale_levels(image).convert("RGB")
    if "transparency" in image.info:  # Pillow would warn that the conversion drops alpha; here it is meant to
        image = image.copy()
        del image.info["transparency"]
    return (image.convert("LA") if image.mode == "La" else image).convert("RGB")


def transparency_stretch(image: Image.Image) -> int:
    """`stretch` of `with_alpha` for a picture that is not decoded yet.

    Pillow stretches grey levels of 2 and 4 bits to 8, but not the level that a PNG calls transparent.
    """
    tiles = getattr(image, "tile", None)
    kind = tiles[0].args if tiles and image.format == "PNG" else None
    return {"L;2": 85, "L;4": 17}.get(kind if isinstance(kind, str) else "", 1)


def _is_flat(rgb: Image.Image) -> bool:
    extrema: Any = rgb.getextrema()  # of each channel
    return all(low == high for low, high in extrema)


def _turns_itself(image: Image.Image) -> bool:
    """Whether Pillow turns a file's pixels when it decodes them."""
    return isinstance(image, TiffImagePlugin.TiffImageFile)


def _find_orientation(exif: bytes) -> int | None:
    """The orientation in the first directory of EXIF; None without one."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None or len(exif) < 10:
        return None
    (start,) = struct.unpack_from(f"{order}I", exif, 4)
    if start + 2 > len(exif):
        return None
    (count,) = struct.unpack_from(f"{order}H", exif, start)
    for at in range(start + 2, min(start + 2 + 12 * count, len(exif) - 11), 12):
        tag, kind, number = struct.unpack_from(f"{order}HHI", exif, at)
        if tag == ExifTags.Base.Orientation:
            code = _IFD_KINDS.get(kind) if number == 1 else None
            return None if code is None else int(struct.unpack_from(f"{order}{code}", exif, at + 8)[0])
    return None
