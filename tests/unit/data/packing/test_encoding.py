from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from m2_encoder.data.packing.encoding import ImageOptions, prepare_image
from m2_encoder.data.samples.parse import SampleProblem
from tests.support.shards import make_image


def _open(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def _save(image: Image.Image, kind: str, **values: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **values)
    return buffer.getvalue()


@pytest.mark.parametrize(("kind", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_files_stay_as_they_are(kind: str, extension: str) -> None:
    content = make_image(3, kind=kind)
    assert prepare_image(content, ImageOptions(max_side_px=16)) == (content, extension, 16, 16, False)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_other_kinds_become_png_without_loss(kind: str) -> None:
    original = Image.fromarray(np.arange(300, dtype=np.uint8).reshape(20, 15) % 64 * 4)
    found = prepare_image(_save(original, kind), ImageOptions())
    assert (found.extension, found.width, found.height, found.is_changed) == ("png", 15, 20, True)
    assert np.array_equal(np.asarray(_open(found.content).convert("L")), np.asarray(original))


def test_reduction_keeps_the_shape_and_turns_by_exif() -> None:
    picture = Image.new("RGB", (80, 40), "red")
    picture.paste("blue", (0, 0, 40, 40))  # left half
    exif = Image.Exif()
    exif[0x0112] = 6  # show it turned by a quarter, clockwise
    found = prepare_image(_save(picture, "JPEG", exif=exif), ImageOptions(max_side_px=40))
    assert (found.extension, found.width, found.height) == ("jpg", 20, 40)
    assert "exif" not in _open(found.content).info
    top, bottom = (np.asarray(_open(found.content))[row, 10] for row in (5, 35))
    assert top[2] > 200 > 60 > top[0]
    assert bottom[0] > 200 > 60 > bottom[2]


def test_quality_encodes_every_image_and_alpha_stays() -> None:
    small = prepare_image(make_image(3, side=64), ImageOptions(quality=30))
    large = prepare_image(make_image(3, side=64), ImageOptions(quality=95))
    assert (small.extension, small.is_changed) == ("jpg", True)
    assert len(small.content) < len(large.content)
    reduced = prepare_image(_save(Image.new("RGBA", (64, 64), (1, 2, 3, 0)), "PNG"), ImageOptions(max_side_px=32))
    assert (reduced.extension, _open(reduced.content).mode) == ("png", "RGBA")


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "I;16", "F", "LA"])
def test_modes_can_be_encoded_again(mode: str) -> None:
    kind = "TIFF" if mode in ("CMYK", "F", "I;16") else "PNG"
    found = prepare_image(_save(Image.new(mode, (50, 40)), kind), ImageOptions(max_side_px=25))
    assert (found.width, found.height) == (25, 20)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("options", [ImageOptions(), ImageOptions(quality=95)], ids=["kept", "encoded again"])
def test_grey_levels_of_sixteen_bits_are_not_clipped(kind: str, options: ImageOptions) -> None:
    levels = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    found = prepare_image(_save(Image.fromarray(levels.astype(np.uint16)), kind), options)
    assert found.is_changed
    assert np.abs(np.asarray(_open(found.content).convert("L"), np.float64) - levels / 257).max() < 6


def test_cut_images_fail_if_verified() -> None:
    content = make_image(3, side=64, kind="JPEG")[:-300]
    with pytest.raises(SampleProblem, match="undecodable_image"):
        prepare_image(content, ImageOptions())
    assert prepare_image(content, ImageOptions(verify=False)).content == content
