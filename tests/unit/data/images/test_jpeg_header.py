"""Sizes from JPEG headers: never another answer than Pillow's, and an answer for what the web is made of."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m2_encoder.data.images.decode import decode_image_uint8
from m2_encoder.data.images.jpeg_header import read_jpeg_size
from m2_encoder.data.images.transforms import open_image

SOI, EOI = b"\xff\xd8", b"\xff\xd9"


def photo(height: int = 30, width: int = 47) -> Image.Image:
    small = np.random.default_rng(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image | None = None, **options: Any) -> bytes:
    content = io.BytesIO()
    (image or photo()).save(content, "JPEG", **options)
    return content.getvalue()


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body


def after_start(*segments: bytes, rest: bytes | None = None) -> bytes:
    return SOI + b"".join(segments) + (rest or jpeg())[2:]


def with_frame(marker: int, **replaced: int) -> bytes:
    """A JPEG whose frame header says something else."""
    data = bytearray(jpeg())
    at = data.index(b"\xff\xc0")
    data[at + 1] = marker
    for name, value in replaced.items():
        data[at + {"bits": 4, "height": 6, "width": 8, "components": 9}[name]] = value
    return bytes(data)


def exif(orientation: int, *, thumbnail: bytes = b"") -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return segment(0xE1, tags.tobytes() + thumbnail)


PLAIN: dict[str, bytes] = {
    "baseline": jpeg(),
    "best quality": jpeg(quality=100, subsampling=0),
    "progressive": jpeg(progressive=True),
    "grey": jpeg(photo().convert("L")),
    "optimized": jpeg(optimize=True),
    "restart markers": jpeg(restart_marker_blocks=2),
    "a comment": jpeg(comment=b"\xff\xc0 no frame"),
    "a colour profile": jpeg(icc_profile=bytes(90_000)),
    "Adobe's words": after_start(segment(0xEE, b"Adobe\0\x64\0\0\0\0\1")),
    "16-bit tables": jpeg(qtables=[[700] * 64, [900] * 64], subsampling=0),
    "extended": with_frame(0xC1),
    "anything behind": jpeg() + b"more",
    "words of an application": after_start(segment(0xEC, b"Ducky" + bytes(9))),
}
LEFT: dict[str, bytes] = {
    "EXIF": after_start(exif(6)),
    "EXIF with a thumbnail": after_start(exif(1, thumbnail=jpeg(photo(8, 9)))),
    "XMP": after_start(segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>')),
    "Photoshop": after_start(segment(0xED, b"Photoshop 3.0\0" + bytes(20))),
    "several pictures": after_start(segment(0xE2, b"MPF\0" + bytes(20))),
    "CMYK": jpeg(photo().convert("CMYK")),
    "12 bits": with_frame(0xC1, bits=12),
    "no components": with_frame(0xC0, components=0),
    "two components": with_frame(0xC0, components=2),
    "fill bytes": SOI + b"\xff\xff" + jpeg()[3:],
    "junk between segments": SOI + b"\xff\xfe\0\2" + b"junk" + jpeg()[2:],
    "two frames": after_start(segment(0xC0, b"\x08\0\x05\0\x05\1\1\x11\0")),
    "no scan": jpeg()[: jpeg().index(b"\xff\xda")],
    "no frame": SOI + segment(0xDA, bytes(4)),
    "a short JFIF": SOI + segment(0xE0, b"JFIF\0") + jpeg()[2:],
    "a short profile": after_start(segment(0xE2, b"ICC_PROFILE\0\1")),
    "a short table": after_start(segment(0xDB, bytes(64))),
    "an empty segment's length": SOI + b"\xff\xfe\0\0" + jpeg()[2:],
    "nothing": b"",
    "a PNG": b"\x89PNG\r\n\x1a\n" + bytes(40),
    **{
        f"frame {marker:X}": with_frame(marker) for marker in (0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), 0xCD, 0xCF)
    },
    **{f"a frame of height {h}, width {w}": with_frame(0xC0, **size) for h, w, size in ((0, 47, {"height": 0}),)},
}


def pillow_size(data: bytes) -> tuple[int, int] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data)).size
    except Exception:
        return None


@pytest.mark.parametrize("name", list(PLAIN))
def test_plain_files_are_read_here(name: str) -> None:
    data = PLAIN[name]
    assert read_jpeg_size(data) == pillow_size(data) == photo().size


@pytest.mark.parametrize("name", list(LEFT))
def test_everything_else_is_left_to_pillow(name: str) -> None:
    assert read_jpeg_size(LEFT[name]) is None


def test_every_cut_is_either_whole_up_to_the_scan_or_left() -> None:
    for data in (jpeg(), jpeg(icc_profile=bytes(300)), PLAIN["progressive"]):
        at = data.index(b"\xff\xda")
        begin = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        for end in range(len(data)):
            assert read_jpeg_size(data[:end]) == (photo().size if end >= begin else None)


@pytest.mark.parametrize("way", [6, 3])
def test_orientation_in_xmp_turns_the_image_as_pillow_does(way: int) -> None:
    data = after_start(segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="%d"/>' % way))
    expected = np.asarray(open_image(data, honor_exif=True)).transpose(2, 0, 1)
    assert not np.array_equal(expected, np.asarray(open_image(data)).transpose(2, 0, 1))
    assert np.array_equal(decode_image_uint8(data).numpy(), expected)


MARKERS = st.sampled_from([*range(0xC0, 0x100), 0xFF, 0, 1])
SEGMENTS = st.builds(segment, MARKERS, st.binary(max_size=20) | st.sampled_from([bytes(65), b"\x10" + bytes(128)]))


@settings(max_examples=400)
@given(
    name=st.sampled_from(list(PLAIN) + list(LEFT)),
    inserted=st.lists(SEGMENTS, max_size=3),
    flips=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), max_size=4),
    end=st.none() | st.integers(0, 900),
)
def test_whatever_is_read_here_is_what_pillow_reads(
    name: str, inserted: list[bytes], flips: list[tuple[int, int]], end: int | None
) -> None:
    whole = {**PLAIN, **LEFT}[name]
    data = bytearray(whole[:2] + b"".join(inserted) + whole[2:])
    for place, value in flips:
        if place < len(data):
            data[place] = value
    cut = bytes(data[:end])
    size = read_jpeg_size(cut)
    assert size is None or size == pillow_size(cut)


@given(data=st.binary(max_size=60))
def test_random_bytes_are_nothing(data: bytes) -> None:
    for content in (data, b"\xff\xd8\xff" + data):
        size = read_jpeg_size(content)
        assert size is None or size == pillow_size(content)
