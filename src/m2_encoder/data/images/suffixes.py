"""Which files are pictures by their names, and which of several pictures of one name is the picture."""

from __future__ import annotations

from typing import Final

PICTURE_SUFFIXES: Final = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".heic", ".heif", ".hif", ".tif", ".tiff",
    ".bmp", ".dib", ".gif",
)  # fmt: skip
"""Suffixes of pictures, in lower or upper case: of files, and of members of a tar.

Of several pictures of one name the first by this order is used: a photograph before a mask, which is a PNG. open_clip
prefers JPEG to PNG, too.
"""

RANKS: Final = {suffix: rank for rank, suffix in enumerate(PICTURE_SUFFIXES)}
"""Places in that order."""
