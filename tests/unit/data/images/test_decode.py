"""Decoding to tensors against Pillow, on image files of every kind, whole and damaged."""

from __future__ import annotations

import io
import pickle
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m2_encoder.data.images.decode import UnusableImageError, decode_image_uint8
from m2_encoder.data.images.transforms import open_image
from m2_encoder.data.samples.parse import SampleProblem
from m2_encoder.errors import ImageError
from m2_encoder.pictures import STANDARD


def photo(height: int = 60, width: int = 80, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise, so that lossy formats have something to lose."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    content = io.BytesIO()
    (image or photo()).save(content, kind, **options)
    return content.getvalue()


def oriented(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(kind, exif=exif)


def png_header(width: int, height: int) -> bytes:
    """A PNG of the given size with hardly any pixel data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    packed = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def levels(image: Image.Image) -> npt.NDArray[np.uint8]:
    return np.asarray(image).transpose(2, 0, 1)


def sixteen_bit_grey() -> Image.Image:
    return Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80))


FILES: dict[str, tuple[bytes, bool]] = {
    # name: (file, whether Pillow must decode it)
    "jpeg": (encoded("JPEG"), False),
    "jpeg, no subsampling": (encoded("JPEG", subsampling=0), False),
    "jpeg, progressive": (encoded("JPEG", progressive=True), False),
    "jpeg, grey": (encoded("JPEG", photo().convert("L")), False),
    "jpeg, odd size": (encoded("JPEG", photo(61, 83)), False),
    "jpeg, cmyk": (encoded("JPEG", photo().convert("CMYK")), True),
    "mpo": (encoded("MPO", save_all=True, append_images=[photo(seed=1)]), False),
    "png": (encoded("PNG"), True),
    "png, grey": (encoded("PNG", photo().convert("L")), True),
    "png, one bit": (encoded("PNG", photo().convert("1")), True),
    "png, palette": (encoded("PNG", photo().convert("P")), True),
    "png, palette with a clear colour": (encoded("PNG", photo().convert("P"), transparency=3), True),
    "png, alpha": (encoded("PNG", Image.merge("RGBA", (*photo().split(), photo(seed=1).getchannel(0)))), True),
    "png, 16 bits": (encoded("PNG", sixteen_bit_grey()), True),
    "png, animated": (encoded("PNG", save_all=True, append_images=[photo(seed=1)]), True),
    "webp": (encoded("WEBP"), True),
    "webp, lossless, alpha": (encoded("WEBP", photo().convert("RGBA"), lossless=True), True),
    "webp, animated": (encoded("WEBP", save_all=True, append_images=[photo(seed=1)]), True),
    "gif, animated": (encoded("GIF", save_all=True, append_images=[photo(seed=1)]), True),
    "bmp": (encoded("BMP"), True),
    "tiff": (encoded("TIFF"), True),
}


@pytest.mark.parametrize("name", list(FILES))
def test_pixels_are_pillows_and_detours_are_counted(name: str) -> None:
    data, by_pillow = FILES[name]
    detours: list[None] = []
    image = decode_image_uint8(data, on_fallback=lambda: detours.append(None))
    assert image.dtype == torch.uint8
    assert np.array_equal(image.numpy(), levels(open_image(data, pictures=STANDARD, honor_exif=False)))
    assert len(detours) == by_pillow
    image[:] = 0  # writable, and nobody else's
    assert np.array_equal(
        decode_image_uint8(data).numpy(), levels(open_image(data, pictures=STANDARD, honor_exif=False))
    )


def test_decoders_have_something_to_agree_on() -> None:
    assert len({open_image(data).tobytes() for data, _ in FILES.values()}) > 8


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(9))
def test_exif_orientation_turns_the_image_upright(kind: str, orientation: int) -> None:
    data = oriented(kind, orientation)
    upright = decode_image_uint8(data)
    assert np.array_equal(upright.numpy(), levels(open_image(data, pictures=STANDARD)))
    assert upright.shape == ((3, 80, 60) if orientation >= 5 else (3, 60, 80))
    stored = decode_image_uint8(data, honor_exif=False)
    assert np.array_equal(stored.numpy(), levels(open_image(data, pictures=STANDARD, honor_exif=False)))
    assert np.array_equal(stored.numpy(), upright.numpy()) == (orientation in (0, 1))


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\x00\x00", b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x09\x00\x12\x01", bytes(60)]
)
def test_damaged_exif_leaves_the_image_as_it_is(exif: bytes) -> None:
    data = encoded("JPEG", exif=exif)
    assert np.array_equal(decode_image_uint8(data).numpy(), levels(open_image(encoded("JPEG"))))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty_member"),
        (b"no image at all", "undecodable_image"),
        (bytes(2000), "undecodable_image"),
        (b"\xff\xd8\xff", "undecodable_image"),
        (encoded("JPEG")[:300], "undecodable_image"),
        (encoded("JPEG")[:-400], "undecodable_image"),
        (encoded("PNG")[:-400], "undecodable_image"),
        (encoded("WEBP")[:-400], "undecodable_image"),
        (png_header(9_000, 9_000), "undecodable_image"),  # within the limit, but its pixels are missing
        (png_header(10_000, 10_000), "too_many_pixels"),
        (png_header(60_000, 60_000), "too_many_pixels"),
        (png_header(20_000, 3), "absurd_shape"),
        (encoded("JPEG", photo(3, 20_000)), "absurd_shape"),
        (encoded("JPEG", photo(1, 1)), "too_small"),
        (encoded("WEBP", photo(3, 3)), "too_small"),
    ],
)
def test_unusable_images_say_why_in_one_word(data: bytes, reason: str) -> None:
    # Pillow warns of the larger bombs; a training run, where a warning is no error, must come to the same end.
    for filtering in ("error", "ignore"):
        with warnings.catch_warnings():
            warnings.simplefilter(filtering)  # type: ignore[arg-type]
            with pytest.raises(UnusableImageError) as caught:
                decode_image_uint8(data)
        assert caught.value.reason == reason
    assert isinstance(caught.value, ImageError)
    assert isinstance(caught.value, SampleProblem)
    assert "\n" not in str(caught.value)
    copied = pickle.loads(pickle.dumps(caught.value))
    assert (copied.reason, str(copied)) == (reason, str(caught.value))


def test_limits_are_arguments() -> None:
    thin, dot = encoded("PNG", photo(3, 300)), encoded("PNG", photo(1, 1))
    assert decode_image_uint8(thin, min_side_px=3, max_aspect=100).shape == (3, 3, 300)
    assert decode_image_uint8(dot, min_side_px=1).shape == (3, 1, 1)
    assert decode_image_uint8(encoded("JPEG"), max_pixels=4800).shape == (3, 60, 80)
    with pytest.raises(UnusableImageError, match="80 x 60 pixels, at most 4,799"):
        decode_image_uint8(encoded("JPEG"), max_pixels=4799)


def test_a_bomb_is_refused_by_its_header_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("m2_encoder.data.images.decode.decode_jpeg", refuse)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
    for data in (encoded("JPEG"), encoded("PNG")):
        with pytest.raises(UnusableImageError, match="too_many_pixels"):
            decode_image_uint8(data, max_pixels=100)


@settings(max_examples=300)
@given(
    name=st.sampled_from(list(FILES)),
    keep=st.floats(0, 1),
    cut=st.booleans(),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
)
def test_damaged_files_are_used_exactly_where_pillow_reads_them(
    name: str, keep: float, cut: bool, flips: list[tuple[float, int]]
) -> None:
    content = bytearray(FILES[name][0])
    for place, value in flips:
        content[int(place**2 * len(content))] = value  # the squares favour headers
    data = bytes(content[: int(keep * len(content))] if cut else content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata: here, as the decoder does, and unlike in other tests
            expected = open_image(data, pictures=STANDARD, honor_exif=False, max_pixels=40_000)
    except ImageError:
        expected = None
    try:
        image = decode_image_uint8(data, max_pixels=40_000, min_side_px=1, max_aspect=1e9, honor_exif=False)
    except UnusableImageError:
        assert expected is None
    else:
        assert expected is not None
        assert np.array_equal(image.numpy(), levels(expected))
