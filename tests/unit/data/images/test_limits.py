from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from m2_encoder.data.images.limits import ImageLimits, read_image_facts
from m2_encoder.data.loading.faults import SKIP_REASONS
from m2_encoder.data.samples.parse import SampleProblem
from tests.support.shards import make_image


def _image(width: int, height: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 40)).save(buffer, kind)
    return buffer.getvalue()


def _reason(content: bytes, limits: ImageLimits | None = None, *, decode: bool = True) -> str:
    with pytest.raises(SampleProblem) as caught:
        read_image_facts(content, limits or ImageLimits(), decode=decode)
    return caught.value.reason


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_sound_images(kind: str) -> None:
    assert read_image_facts(_image(30, 20, kind), ImageLimits(), decode=True)[:3] == (kind.lower(), 30, 20)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty_member"),
        (b"<html>gone</html>", "undecodable_image"),
        (_image(200, 2), "absurd_shape"),
        (_image(3, 3), "too_small"),
        (_image(300, 300), "too_many_pixels"),
    ],
)
def test_reasons(content: bytes, reason: str) -> None:
    assert _reason(content, ImageLimits(max_pixels=80_000)) == reason


def test_bomb_is_refused_from_its_header() -> None:
    png = bytearray(_image(10, 10))
    png[16:24] = (60_000).to_bytes(4, "big") * 2  # IHDR: 3.6 billion pixels in 80 bytes
    assert _reason(bytes(png), decode=False) in ("too_many_pixels", "undecodable_image")
    monstrous = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(monstrous, "PNG")
    assert _reason(monstrous.getvalue(), decode=False) == "too_many_pixels"


def test_cut_images_are_found_by_decoding_alone() -> None:
    content = make_image(3, side=64, kind="JPEG")[:-400]
    assert read_image_facts(content, ImageLimits(), decode=False).width == 64
    assert _reason(content) == "undecodable_image"


@given(st.integers(0, 2**31), st.integers(1, 8))
def test_damaged_bytes_never_raise_anything_else(seed: int, flips: int) -> None:
    content = bytearray(make_image(1, kind="JPEG"))
    for flip in range(flips):
        content[(seed * (flip + 7919)) % len(content)] ^= 1 + seed % 255
    reason = None
    try:
        read_image_facts(bytes(content), ImageLimits(), decode=True)
    except SampleProblem as problem:
        reason = problem.reason
    assert reason in (None, *SKIP_REASONS)
