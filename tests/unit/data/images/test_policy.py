"""What a policy makes of transparency, orientation and deep levels: the same in training, evaluation and use."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m2_encoder.data.images.decode import decode_image_uint8
from m2_encoder.data.images.limits import ImageLimits, read_image_facts
from m2_encoder.data.images.tensor_transforms import TensorTrainTransform
from m2_encoder.data.images.transforms import EvalTransform, TrainTransform, open_image
from m2_encoder.data.packing.encoding import ImageOptions, prepare_image
from m2_encoder.data.samples.parse import SampleProblem
from m2_encoder.errors import ImageError, UserError
from m2_encoder.pictures import OFFICIAL, OLDER, STANDARD, PicturePolicy, read_policy

LIMITS = ImageLimits(min_side_px=1)
Pixel = tuple[int, int, int]
WHITE, BLACK, CLEAR_RED = (255, 255, 255), (0, 0, 0), (255, 0, 0, 0)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def png(bits: int, color: int, row: bytes, transparent: bytes, width: int = 2) -> bytes:
    """A PNG of one row, of a kind that Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, 1, bits, color, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    parts = (struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        part for part, (name, body) in zip(parts, chunks, strict=True) if body or name != b"tRNS"
    )


def first(content: bytes, policy: PicturePolicy) -> Pixel:
    """The first pixel; every way to decode agrees on it."""
    red, green, blue = np.asarray(open_image(content, pictures=policy))[0, 0].tolist()
    decoded = decode_image_uint8(content, pictures=policy, min_side_px=1)
    assert decoded[:, 0, 0].tolist() == [red, green, blue]
    return red, green, blue


def clear(mode: str, **options: Any) -> Image.Image:
    """Two pixels, the first one clear red, the second one opaque blue."""
    image = Image.new("RGBA", (2, 1), CLEAR_RED)
    image.putpixel((1, 0), (0, 0, 255, 255))
    return image.convert(mode, **options)


def palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    return image


TRANSPARENT = {
    # name: file whose first pixel is clear, its hidden colour
    "rgba": (encoded(clear("RGBA")), (255, 0, 0)),
    "grey and alpha": (encoded(clear("LA")), (76, 76, 76)),
    "palette with a clear entry": (encoded(palette(), transparency=0), (255, 0, 0)),
    "palette with alpha by entry": (encoded(palette(), transparency=b"\x00\xff"), (255, 0, 0)),
    "colour key": (encoded(clear("RGB"), transparency=(255, 0, 0)), (255, 0, 0)),
    "1-bit key": (png(1, 0, b"\x80", struct.pack(">H", 1)), (255, 255, 255)),
    "2-bit key": (png(2, 0, b"\x40", struct.pack(">H", 1)), (85, 85, 85)),
    "4-bit key": (png(4, 0, b"\x50", struct.pack(">H", 5)), (85, 85, 85)),
    "8-bit key": (png(8, 0, b"\x50\x00", struct.pack(">H", 0x50)), (80, 80, 80)),
    "16-bit colour key": (png(16, 2, b"\x50\x01" * 3 + bytes(6), b"\x50\x01" * 3), (80, 80, 80)),
    "webp": (encoded(clear("RGBA"), "WEBP", lossless=True, exact=True), (255, 0, 0)),
    "gif": (encoded(palette(), "GIF", transparency=0), (255, 0, 0)),
    "animated gif": (
        encoded(palette(), "GIF", transparency=0, save_all=True, append_images=[palette().rotate(180)], disposal=2),
        (255, 0, 0),
    ),
    "animated png": (encoded(clear("RGBA"), save_all=True, append_images=[clear("RGBA").rotate(180)]), (255, 0, 0)),
    "tiff": (encoded(clear("RGBA"), "TIFF"), (255, 0, 0)),
}


@pytest.mark.parametrize("name", list(TRANSPARENT))
def test_transparent_pixels_are_blended_or_show_their_hidden_colour(name: str) -> None:
    content, hidden = TRANSPARENT[name]
    assert first(content, STANDARD) == WHITE
    assert first(content, PicturePolicy(background="grey")) == (128, 128, 128)
    assert first(content, PicturePolicy(background="black")) == BLACK
    assert first(content, OFFICIAL) == first(content, OLDER) == hidden
    assert "blended" in read_image_facts(content, LIMITS, decode=True).effects
    assert "alpha dropped" in read_image_facts(content, LIMITS, decode=True, pictures=OFFICIAL).effects


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_every_mode_with_alpha_is_blended(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    opened = {"PA": lambda: Image.new("PA", (2, 1)), "La": lambda: image.convert("LA").convert("La")}
    made = opened.get(mode, lambda: image.convert(mode))()
    assert np.asarray(open_image(made, pictures=STANDARD)).min() == 255
    assert np.asarray(open_image(made)).max() == 0


def test_half_transparent_pixels_are_mixed_with_the_ground_once() -> None:
    half = Image.new("RGBA", (2, 1), (0, 100, 200, 51))
    assert first(encoded(half), STANDARD) == (204, 224, 244)
    array = np.asarray(half)
    assert np.asarray(open_image(array, pictures=STANDARD))[0, 0].tolist() == [204, 224, 244]
    assert np.asarray(open_image(array))[0, 0].tolist() == [0, 100, 200]


def test_an_opaque_picture_with_alpha_is_counted_as_unchanged() -> None:
    facts = read_image_facts(encoded(Image.new("RGBA", (2, 2), (1, 2, 3, 255))), LIMITS, decode=True)
    assert facts.effects == {"one flat colour"}


def test_black_shapes_on_hidden_black_are_seen() -> None:
    """As exporters write icons; without their alpha they are black squares."""
    icon = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    icon.paste((0, 0, 0, 255), (2, 2, 6, 6))
    hidden_white = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    hidden_white.paste((0, 0, 0, 255), (2, 2, 6, 6))
    seen = [EvalTransform(8, pictures=STANDARD).to_uint8(encoded(each)) for each in (icon, hidden_white)]
    assert seen[0].equal(seen[1])
    assert (int(seen[0].min()), int(seen[0].max())) == (0, 255)
    assert EvalTransform(8).to_uint8(encoded(icon)).max() == 0
    assert "one flat colour" in read_image_facts(encoded(icon), LIMITS, decode=True, pictures=OFFICIAL).effects


def oriented(kind: str, orientation: int, how: str = "exif") -> bytes:
    image = Image.new("RGB", (16, 8), BLACK)
    image.paste(WHITE, (0, 0, 8, 8))  # the left half
    if how == "xmp":
        xmp = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()
        return encoded(image, kind, xmp=xmp)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


@pytest.mark.parametrize(
    ("kind", "how"), [("JPEG", "exif"), ("PNG", "exif"), ("WEBP", "exif"), ("JPEG", "xmp"), ("WEBP", "xmp")]
)
def test_orientation_is_obeyed_or_ignored_everywhere(kind: str, how: str) -> None:
    content = oriented(kind, 6, how)  # stored on its side: the left is the top
    upright = open_image(content, pictures=STANDARD)
    assert upright.size == (8, 16)
    top, bottom = np.asarray(upright)[1, 4, 0], np.asarray(upright)[14, 4, 0]
    assert (top > 200, bottom < 50) == (True, True)
    assert open_image(content, pictures=OFFICIAL).size == (16, 8)
    assert decode_image_uint8(content).shape == decode_image_uint8(content, pictures=OLDER).shape == (3, 16, 8)
    assert decode_image_uint8(content, pictures=OFFICIAL).shape == (3, 8, 16)
    assert "turned" in read_image_facts(content, LIMITS, decode=True).effects
    assert "orientation ignored" in read_image_facts(content, LIMITS, decode=True, pictures=OFFICIAL).effects


def test_pillow_turns_a_tiff_itself_and_once() -> None:
    content = oriented("TIFF", 6)
    assert open_image(content, pictures=STANDARD).size == (8, 16)
    assert np.asarray(open_image(content, pictures=STANDARD))[1, 4, 0] == 255


@pytest.mark.parametrize("transform", [TrainTransform, TensorTrainTransform])
def test_training_sees_what_evaluation_sees(transform: type[TrainTransform]) -> None:
    plain: dict[str, Any] = {"scale": (1, 1), "ratio": (1, 1), "flip": 0.0, "num_ops": 0}
    rng = np.random.default_rng(0)
    icon = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    for content in (encoded(icon), oriented("PNG", 6), encoded(Image.fromarray(np.full((8, 8), 40_000, np.uint16)))):
        for policy in (STANDARD, OFFICIAL, OLDER):
            shape = (8, *open_image(content, pictures=policy).size)
            trained = transform(max(shape), pictures=policy, **plain)(content, rng=rng)
            seen = EvalTransform(max(shape), pictures=policy).to_uint8(content)
            if shape[1] == shape[2]:
                assert trained.equal(seen)
            else:  # cropped to the square in its middle
                assert trained.shape == seen.shape


DEEP = {
    # name: levels, what they are scaled to
    "16 bits": (np.array([[0, 20_000, 65_535]], np.uint16), [0, 78, 255]),
    "16 bits, big endian": (np.array([[0, 20_000, 65_535]], ">u2"), [0, 78, 255]),
    "32 bits up to 65,535": (np.array([[0, 20_000, 65_535]], np.int32), [0, 78, 255]),
    "32 bits up to 255": (np.array([[0, 100, 255]], np.int32), [0, 100, 255]),
    "floats up to 1": (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
    "floats up to 255": (np.array([[0, 100.4, 255]], np.float32), [0, 100, 255]),
    "floats up to 65,535": (np.array([[0, 20_000, 65_535]], np.float32), [0, 78, 255]),
}


@pytest.mark.parametrize("name", list(DEEP))
def test_deep_levels_are_scaled_by_one_rule_in_use_and_in_packing(name: str) -> None:
    levels, expected = DEEP[name]
    content = encoded(Image.fromarray(levels), "TIFF")
    assert np.asarray(open_image(content, pictures=STANDARD))[0, :, 2].tolist() == expected
    packed = prepare_image(content, ImageOptions(LIMITS)).content
    assert np.asarray(Image.open(io.BytesIO(packed)))[0].tolist() == expected
    clipped = np.asarray(open_image(content, pictures=OFFICIAL))[0, :, 2]
    assert clipped.tolist() == np.clip(levels[0], 0, 255).astype(np.uint8).tolist()
    assert "scaled" in read_image_facts(content, LIMITS, decode=True).effects
    assert "clipped" in read_image_facts(content, LIMITS, decode=True, pictures=OFFICIAL).effects


def test_a_16_bit_png_keeps_its_high_byte_and_its_clear_level() -> None:
    content = encoded(Image.fromarray(np.array([[20_000, 50_000]], np.uint16)))
    assert np.asarray(open_image(content, pictures=STANDARD))[0, :, 0].tolist() == [78, 195]
    keyed = png(16, 0, b"\x50\x01\x50\x02", b"\x50\x01")
    assert np.asarray(open_image(keyed, pictures=STANDARD))[0, :, 0].tolist() == [255, 80]


@pytest.mark.parametrize("levels", [[-1.0, 0.5], [0.0, 70_000.0], [float("nan"), 0.0], [0.0, float("inf")]])
def test_levels_without_a_scale_are_refused_with_their_range(levels: list[float]) -> None:
    content = encoded(Image.fromarray(np.array([levels], np.float32)), "TIFF")
    for decode in (
        lambda: open_image(content, pictures=STANDARD),
        lambda: decode_image_uint8(content, min_side_px=1),
        lambda: prepare_image(content, ImageOptions(LIMITS)),
    ):
        with pytest.raises((ImageError, SampleProblem), match=r"have no known scale.*convert it to 8 bits"):
            decode()


def test_packing_keeps_alpha_and_turns_what_it_encodes_again() -> None:
    tiff = Image.new("RGBA", (16, 8), (10, 20, 30, 40))
    packed = Image.open(io.BytesIO(prepare_image(encoded(tiff, "TIFF"), ImageOptions(LIMITS)).content))
    assert (packed.mode, packed.getpixel((0, 0))) == ("RGBA", (10, 20, 30, 40))
    reduced = prepare_image(oriented("JPEG", 6), ImageOptions(LIMITS, max_side_px=8))
    assert (reduced.width, reduced.height) == (4, 8)


@pytest.mark.parametrize(
    ("setting", "policy"),
    [
        ("standard", STANDARD),
        ("official", PicturePolicy(background="dropped", orientation="ignored", depth="clipped")),
        ("older", PicturePolicy(background="dropped", orientation="obeyed", depth="clipped")),
        ({"background": "grey"}, PicturePolicy(background="grey", orientation="obeyed", depth="scaled")),
        (OLDER.to_dict(), OLDER),
    ],
)
def test_settings(setting: Any, policy: PicturePolicy) -> None:
    assert read_policy(setting) == policy
    assert read_policy(policy.to_setting()) == policy


@pytest.mark.parametrize("setting", ["white", {"background": "red"}, {"colour": "white"}, 3, None, ["standard"]])
def test_other_settings_are_refused(setting: Any) -> None:
    with pytest.raises(UserError, match=r"pictures=.*one of standard, official, older, or a mapping"):
        read_policy(setting)


def test_grey_tiffs_whose_white_is_zero() -> None:
    """Pillow inverts those of 8 bits, and leaves it to its users for 16."""
    content = bytearray(encoded(Image.fromarray(np.full((2, 2), 0x3001, np.uint16)), "TIFF"))
    assert first(bytes(content), STANDARD) == (0x30, 0x30, 0x30)
    entry = content.index(struct.pack("<HHIH", 262, 3, 1, 1))
    content[entry + 8] = 0
    assert first(bytes(content), STANDARD) == (0xCF, 0xCF, 0xCF)


@pytest.mark.parametrize(("kind", "code"), [(8, "h"), (9, "i"), (4, "I"), (1, "B")])
def test_orientation_of_every_kind_of_number(kind: int, code: str) -> None:
    value = struct.pack(f"<{code}", 6).ljust(4, b"\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<IHHHI", 8, 1, 0x112, kind, 1) + value + bytes(4)
    content = encoded(Image.new("RGB", (4, 2)), exif=exif)
    assert open_image(content, pictures=STANDARD).size == (2, 4)
