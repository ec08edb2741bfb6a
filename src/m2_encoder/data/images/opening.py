"""Opens picture files: the only place that does, so that nothing else of a foreign file is ever run or followed.

A file is what its first bytes say, whatever its name. It is opened by that format's reader alone: Pillow would try its
others, too, of which the one for EPS starts Ghostscript. What a decode may cost is bounded before it begins.
"""

from __future__ import annotations

import importlib
import io
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

# Each registers its format; without them, `Image.open` would import the readers of all formats.
from PIL import BmpImagePlugin as BmpImagePlugin
from PIL import GifImagePlugin as GifImagePlugin
from PIL import Image
from PIL import JpegImagePlugin as JpegImagePlugin
from PIL import MpoImagePlugin as MpoImagePlugin
from PIL import PngImagePlugin as PngImagePlugin
from PIL import TiffImagePlugin as TiffImagePlugin
from PIL import WebPImagePlugin as WebPImagePlugin

from m2_encoder.data.images.cost import MAX_FILE_BYTES, find_excess, find_pixel_excess
from m2_encoder.errors import ImageError

FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
"""Pillow's names of all formats that are read; HEIF with the extra `heic`."""

PICTURE_SUFFIXES: Final = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif",
    ".heic", ".heif", ".hif",
)  # fmt: skip
"""Suffixes of files that count as pictures, in lower or upper case. Of files of one name the first of these is used."""

_HEIC_FIX: Final = "pip install 'm2-encoder[heic]' reads it"
_BRANDS: Final[Mapping[bytes, str]] = MappingProxyType(
    {
        **dict.fromkeys((b"avif", b"avis"), "AVIF"),
        **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), "HEIF"),
    }
)
_STARTS: Final = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"BM", "BMP"),
)
_OTHERS: Final = (
    (b"%!PS", "an EPS or PostScript file"),
    (b"\xc5\xd0\xd3\xc6", "an EPS file"),
    (b"%PDF", "a PDF"),
    (b"8BPS", "a Photoshop file"),
    (b"\xd0\xcf\x11\xe0", "an OLE file (FPX, MIC or an Office document)"),
    (b"\xd7\xcd\xc6\x9a", "a Windows metafile"),
    (b"\x01\0\0\0", "a Windows metafile, or none at all"),
    (b"\0\0\x01\0", "an icon (ICO)"),
    (b"\0\0\x02\0", "a cursor (CUR)"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 file"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 file"),
    (b"\xff\x0a", "a JPEG XL file"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL file"),
    (b"qoif", "a QOI file"),
    (b"DDS ", "a DDS file"),
    (b"gimp xcf", "a GIMP file"),
    (b"P1", "a PBM file"), (b"P2", "a PGM file"), (b"P3", "a PPM file"), (b"P4", "a PBM file"), (b"P5", "a PGM file"),
    (b"P6", "a PPM file"), (b"P7", "a PAM file"), (b"Pf", "a PFM file"), (b"PF", "a PFM file"),
    (b"PK\x03\x04", "a ZIP archive"), (b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"), (b"\x93NUMPY", "a NumPy array"), (b"\x89HDF", "an HDF5 file"),
    (b"SIMPLE  =", "a FITS file"), (b"\x1aE\xdf\xa3", "a Matroska or WebM video"), (b"FLV\x01", "a Flash video"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself"),
    (b"{", "JSON or other text"), (b"[", "JSON or other text"),
)  # fmt: skip


def open_picture(content: bytes) -> Image.Image:
    """Open the content of a picture file without decoding it; decode it with `rgb.to_rgb` or `load`.

    Raises:
        ImageError: if it is empty, of no format of `FORMATS`, damaged, or would cost too much; Pillow's own warnings
            and errors about decompression bombs as they are.
    """
    kind = name_format(content)
    if kind not in FORMATS:
        raise ImageError("empty" if not content else f"not an image that is read here, but {kind}")
    if kind in ("AVIF", "HEIF"):
        _import_reader(kind)
    if (excess := find_excess(content, kind)) is not None:
        raise ImageError(f"would take too long to decode: {excess}")
    try:
        image = Image.open(io.BytesIO(content), formats=(kind,))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise
    except Exception as error:
        # Not too broad: on damaged bytes Pillow's readers raise nearly every built-in exception.
        raise ImageError(f"a damaged {kind}, {len(content):,} bytes") from error
    if (excess := find_pixel_excess(content, kind, image.size)) is not None:
        raise ImageError(f"would take too long to decode: {excess}")
    return image


def read_picture_file(path: str | os.PathLike[str]) -> bytes:
    """The content of a regular file, which may be a link to one; of at most `MAX_FILE_BYTES`.

    Raises:
        ImageError: for anything else.
    """
    place, content = Path(path), b""
    try:
        status = place.stat()
        if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_FILE_BYTES:
            content = place.read_bytes()
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # of a name with a NUL
        raise ImageError("no such file") from error
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror}") from error
    if stat.S_ISDIR(status.st_mode):
        raise ImageError("is a folder, not an image file")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("is not a regular file")
    if status.st_size > MAX_FILE_BYTES:
        raise ImageError(f"too large: {status.st_size:,} bytes, at most {MAX_FILE_BYTES:,} are read")
    if not content:
        raise ImageError("the file is empty")
    return content


def name_format(content: bytes) -> str:
    """Pillow's name of a format of `FORMATS`; of other content, what it is in words."""
    for start, kind in _STARTS:
        if content.startswith(start):
            return kind
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    if content[4:8] == b"ftyp":
        brands = [content[at : at + 4] for at in (8, *range(16, min(int.from_bytes(content[:4], "big"), 256), 4))]
        return next((_BRANDS[brand] for brand in brands if brand in _BRANDS), "a video, or another ISO media file")
    for start, kind in _OTHERS:
        if content.startswith(start):
            return kind
    text = content[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page"
    if text.startswith(b"<"):
        return "an SVG drawing" if b"<svg" in text else "XML"
    return f"something unknown, {len(content):,} bytes"


def _import_reader(kind: str) -> None:
    """Import the reader of a format that not every installation has.

    Raises:
        ImageError: with what installs it.
    """
    if kind in Image.OPEN:
        return
    try:
        if kind == "AVIF":
            importlib.import_module("PIL.AvifImagePlugin")
            importlib.import_module("PIL._avif")
        else:
            importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError as error:
        fix = "an AVIF picture: Pillow 11.3 or newer reads it" if kind == "AVIF" else f"a HEIC picture: {_HEIC_FIX}"
        raise ImageError(f"is {fix}") from error
