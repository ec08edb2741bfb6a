"""Only the formats that are read are opened, no program is started, and no decode may cost without bounds."""

from __future__ import annotations

import ast
import io
import os
import struct
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m2_encoder.curation.images import measure_image
from m2_encoder.data.images.cost import MAX_SCANS, count_scans
from m2_encoder.data.images.decode import decode_image_uint8
from m2_encoder.data.images.limits import ImageLimits, read_image_facts
from m2_encoder.data.images.opening import FORMATS, name_format, open_picture, read_picture_file
from m2_encoder.data.images.suffixes import PICTURE_SUFFIXES
from m2_encoder.data.images.tensor_transforms import TensorTrainTransform
from m2_encoder.data.images.transforms import EvalTransform, open_image
from m2_encoder.data.packing.encoding import ImageOptions, prepare_image
from m2_encoder.errors import UserError

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 20 20
%%EndComments
0 0 20 20 rectfill
%%EOF
"""
WAYS: dict[str, Callable[[bytes], Any]] = {
    "training": decode_image_uint8,
    "transform": lambda content: TensorTrainTransform(8)(content, rng=np.random.default_rng(0)),
    "use and evaluation": EvalTransform(8).to_uint8,
    "check": lambda content: read_image_facts(content, ImageLimits(), decode=True),
    "packing": lambda content: prepare_image(content, ImageOptions()),
    "curation": lambda content: measure_image(content, max_pixels=10**6),
}


def encoded(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    content = io.BytesIO()
    (image or Image.new("RGB", (32, 24), (9, 99, 199))).save(content, kind, **options)
    return content.getvalue()


@pytest.mark.parametrize("way", list(WAYS))
def test_an_eps_named_jpg_starts_no_program(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = tmp_path / "ran"
    for name in ("gs", "gswin32c", "gswin64c"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {trace}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    dos = b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, len(EPS)) + bytes(18) + EPS
    for content in (EPS, dos):
        with pytest.raises(UserError, match=r"not an image that is read here, but an EPS (or PostScript )?file"):
            WAYS[way](content)
    assert not trace.exists()


def test_a_file_is_what_its_bytes_say(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(EPS)
    with pytest.raises(UserError, match=r"photo\.jpg: not an image that is read here, but an EPS"):
        open_image(path)
    path.write_bytes(encoded("PNG"))
    assert open_image(path).size == (32, 24)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_formats_that_are_read(kind: str) -> None:
    assert kind in FORMATS
    content = encoded(kind)
    assert name_format(content) == kind
    assert open_picture(content).format == kind
    assert decode_image_uint8(content).shape == (3, 24, 32)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"%PDF-1.7\n", "a PDF"),
        (b"8BPS\0\1", "a Photoshop file"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an OLE file"),
        (b"\xd7\xcd\xc6\x9a\0\0", "a Windows metafile"),
        (b'<?xml version="1.0"?>\n<svg xmlns="x"/>', "an SVG drawing"),
        (b"\xef\xbb\xbf <!DOCTYPE HTML><title>404</title>", "an HTML page"),
        (b"P6\n1 1\n255\nabc", "a PPM file"),
        (encoded("ICO", sizes=[(16, 16)]), "an icon"),
        (encoded("TGA"), "a TGA file"),
        (encoded("PCX"), "something unknown"),
        (encoded("JPEG2000") if "JPEG2000" in Image.SAVE else b"\0\0\0\x0cjP  ", "a JPEG 2000 file"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "a video"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b'{"error": 404}', "JSON"),
        (bytes(64), "something unknown, 64 bytes"),
    ],
)
def test_everything_else_is_named(content: bytes, named: str) -> None:
    for way in WAYS.values():
        with pytest.raises(UserError, match=named):
            way(content)


def test_heic_is_read_with_its_extra_and_named_without(monkeypatch: pytest.MonkeyPatch) -> None:
    heic = struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic"
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    with pytest.raises(UserError, match=r"is a HEIC picture: pip install 'm2-encoder\[heic\]' reads it"):
        open_image(heic)


def test_heic_with_its_extra() -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    content = encoded("HEIF", Image.new("RGB", (64, 32), (255, 255, 255)))
    assert name_format(content) == "HEIF"
    assert decode_image_uint8(content).min() > 250


def test_avif_is_named_where_pillow_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded("AVIF")
    monkeypatch.delitem(Image.OPEN, "AVIF")
    monkeypatch.setitem(sys.modules, "PIL._avif", None)
    with pytest.raises(UserError, match=r"an AVIF picture: Pillow 11\.3 or newer reads it"):
        open_image(content)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "zero.png"):
        with pytest.raises(UserError, match="is not a regular file"):
            read_picture_file(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}: is not a regular file"):
            EvalTransform(8)(tmp_path / name)


def test_nothing_else_opens_pictures(repo_root: Path) -> None:
    """Of a foreign file; drawings of our own are opened by their format."""
    openers = {"open", "preinit", "init", "register_open", "imread", "open_heif"}
    owners = {"Image", "plt", "cv2", "imageio", "pillow_heif"}
    files = (path for folder in ("src", "scripts", "benchmarks") for path in (repo_root / folder).rglob("*.py"))
    found = []
    for path in sorted(files):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in openers:
                owner = getattr(node.func.value, "id", getattr(node.func.value, "attr", ""))
                if owner in owners and not any(keyword.arg == "formats" for keyword in node.keywords):
                    found.append(f"{path.relative_to(repo_root)}:{node.lineno}")
    assert found == []


def with_scans(count: int, size: int = 64) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    content = encoded("JPEG", Image.new("RGB", (size, size), (10, 200, 30)), progressive=True)
    last = content[content.rfind(b"\xff\xda") : -2]
    return content[:-2] + last * count + content[-2:]


@pytest.mark.parametrize("way", list(WAYS))
def test_a_jpeg_of_hundreds_of_scans_is_refused_before_it_is_decoded(way: str) -> None:
    content = with_scans(2 * MAX_SCANS)
    with pytest.raises(UserError, match="would take too long to decode: more than 100 scans"):
        WAYS[way](content)


def test_scans_count_with_the_pixels_they_cover() -> None:
    with pytest.raises(UserError, match="40 scans of 8000 x 8000 pixels"):
        decode_image_uint8(with_scans(30, size=8000))


def test_markers_in_other_parts_are_no_scans() -> None:
    """Phones append films to photographs, with any bytes in them."""
    for options in ({"progressive": True}, {}):
        content = encoded("JPEG", **options) + b"\xff\xda" * 1000
        assert count_scans(content) < MAX_SCANS
        assert decode_image_uint8(content).shape == (3, 24, 32)
    commented = encoded("JPEG", progressive=True, comment=b"\xff\xda" * 1000)
    assert count_scans(commented) < MAX_SCANS
    assert decode_image_uint8(commented).shape == (3, 24, 32)


def jpeg_with(segment: bytes, count: int) -> bytes:
    content = encoded("JPEG")
    return content[:2] + segment * count + content[2:]


def gif_with(blocks: bytes) -> bytes:
    content = encoded("GIF", Image.new("P", (32, 24)))
    head = 13 + (3 << (content[10] & 7) + 1)
    return content[:head] + blocks + content[head:]


def tiff_with_tags(count: int, number: int) -> bytes:
    """A TIFF whose tags of text all name the same bytes."""
    entries = sorted([(256, 3, 1, 32), (257, 3, 1, 24), *((40_000 + i, 2, number, 0) for i in range(count))])
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4) + bytes(max(0, number))


def png_of_chunks(count: int) -> bytes:
    chunk = struct.pack(">I", 0) + b"abCd" + struct.pack(">I", zlib.crc32(b"abCd"))
    content = encoded("PNG")
    return content[:33] + chunk * count + content[33:]


COSTLY = {
    "jpeg of many segments": lambda: jpeg_with(b"\xff\xfe\x00\x02", 200_000),
    "jpeg of many parts of exif": lambda: jpeg_with(b"\xff\xe1\x00\x0cExif\0\0ab\0\0", 500),
    "gif with a comment in many parts": lambda: gif_with(b"\x21\xfe" + b"\x01a" * 400_000 + b"\0"),
    "gif with garbage": lambda: gif_with(bytes(2_000_000)),
    "png of many chunks": lambda: png_of_chunks(200_000),
    "tiff of many tags": lambda: tiff_with_tags(20_000, 4),
    "tiff whose tags name the same bytes": lambda: tiff_with_tags(2000, 2_000_000),
    "bmp in run-length code": lambda: (b := bytearray(encoded("BMP")), b.__setitem__(30, 1))[0] + bytes(9_000_000),
}


@pytest.mark.parametrize("name", list(COSTLY))
def test_what_readers_take_minutes_for_is_refused_at_once(name: str) -> None:
    content = bytes(COSTLY[name]())
    started = time.process_time()
    with pytest.raises(UserError, match="would take too long to decode"):
        decode_image_uint8(content)
    assert time.process_time() - started < 1


def test_a_large_exif_is_read_for_its_orientation_alone() -> None:
    """Entries that all name the same megabyte; Pillow would read it for each."""
    count, size = 3000, 1_000_000
    entries = [(0x0112, 3, 1, 6), *((0x9000 + i, 7, size, 8) for i in range(count))]
    exif = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(struct.pack("<HHII", *each) for each in entries)
    body = exif + bytes(size)
    content = encoded("PNG")
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    started = time.process_time()
    assert decode_image_uint8(content[:33] + chunk + content[33:]).shape == (3, 32, 24)
    assert time.process_time() - started < 0.5


def test_every_suffix_has_its_place() -> None:
    assert PICTURE_SUFFIXES[0] == ".jpg"
    assert PICTURE_SUFFIXES.index(".jpeg") < PICTURE_SUFFIXES.index(".png") < PICTURE_SUFFIXES.index(".webp")
    assert len(set(PICTURE_SUFFIXES)) == len(PICTURE_SUFFIXES)
