"""Opening images, the evaluation transform and the training transform, on images made here."""

from __future__ import annotations

import io
import pickle
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from m2_encoder.data.images.transforms import EvalTransform, TrainTransform, open_image
from m2_encoder.errors import ImageError, UserError
from m2_encoder.pictures import OLDER, PicturePolicy

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16", "I;16B")


def noise(height: int = 30, width: int = 40, channels: int = 3, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Random pixels, (H, W, C)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    """Content of an image file."""
    content = io.BytesIO()
    (image or Image.fromarray(noise())).save(content, kind, **options)
    return content.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG file of the given size with hardly any pixel data: cheap to write, dear to decode."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(100))),
        (b"IEND", b""),
    ]
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        content += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return content


@pytest.mark.parametrize("honor_exif", [False, True])
def test_sources_of_the_same_pixels_agree(tmp_path: Path, honor_exif: bool) -> None:
    pixels = noise()
    image = Image.fromarray(pixels)
    path = tmp_path / "图 1.png"
    image.save(path)
    read_only = pixels.copy()
    read_only.flags.writeable = False
    strided = np.repeat(pixels, 2, axis=1)[:, ::2]
    for source in (path, str(path), path.read_bytes(), image, pixels, read_only, strided):
        opened = open_image(source, honor_exif=honor_exif)
        assert opened.mode == "RGB"
        assert np.array_equal(np.asarray(opened), pixels)


def test_arrays_of_every_shape() -> None:
    grey, rgba = noise(channels=1), noise(channels=4)
    copied = np.repeat(grey, 3, axis=2)
    assert np.array_equal(np.asarray(open_image(grey)), copied)
    assert np.array_equal(np.asarray(open_image(grey[:, :, 0])), copied)
    # Alpha is dropped, not blended.
    assert np.array_equal(np.asarray(open_image(rgba)), rgba[:, :, :3])
    assert open_image(noise(height=3, width=3)).size == (3, 3)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((4, 4, 3), np.float32), r"got float32; multiply values of 0\.\.1 by 255"),
        (np.zeros((4, 4, 3), np.int64), "got int64"),
        (np.zeros((4, 4), bool), "got bool"),
        (np.zeros((3, 8, 8), np.uint8), r"got \(3, 8, 8\); channels come last"),
        (np.zeros((8, 8, 2), np.uint8), r"got \(8, 8, 2\)$"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"got \(2, 8, 8, 3\)"),
        (np.zeros(8, np.uint8), r"got \(8,\)"),
        (np.zeros((), np.uint8), r"got \(\)"),
        (np.zeros((0, 8, 3), np.uint8), r"got \(0, 8, 3\)"),
    ],
)
def test_other_arrays_say_how_to_convert(array: npt.NDArray[Any], reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        open_image(array)


@pytest.mark.parametrize("source", [None, 3, 1.5, ["a.png"], torch.zeros(3, 4, 4), io.BytesIO(b"")])
def test_what_is_no_source_is_named(source: Any) -> None:
    with pytest.raises(ImageError, match=f"cannot be {type(source).__name__}; give a file name"):
        open_image(source)


def test_conversions_to_rgb() -> None:
    wide = Image.fromarray(np.array([[0, 100, 255, 256, 1000, 65535]], np.uint16))
    assert np.asarray(open_image(wide))[0, :, 0].tolist() == [0, 100, 255, 255, 255, 255]
    half_clear = Image.new("RGBA", (1, 1), (200, 100, 50, 0))
    assert np.asarray(open_image(half_clear)).ravel().tolist() == [200, 100, 50]
    bilevel = Image.new("1", (1, 1), 1)
    assert np.asarray(open_image(bilevel)).ravel().tolist() == [255, 255, 255]
    cmyk = Image.new("CMYK", (1, 1), (255, 0, 0, 0))
    assert np.asarray(open_image(cmyk)).ravel().tolist() == [0, 255, 255]


def test_palette_with_alpha_per_entry_is_expanded_without_a_warning(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    path = tmp_path / "palette.png"
    image.save(path, transparency=bytes([0, 128]))
    for source in (path, Image.open(path)):
        assert np.asarray(open_image(source)).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    with Image.open(path) as mine:
        open_image(mine)
        assert mine.info["transparency"] == bytes([0, 128])  # the caller's image is not changed


@given(mode=st.sampled_from(MODES), width=st.integers(1, 70), height=st.integers(1, 70))
def test_every_mode_and_size_gives_a_square(mode: str, width: int, height: int) -> None:
    image = Image.new(mode, (width, height))
    evaluated = EvalTransform(17).to_uint8(image)
    trained = TrainTransform(17)(image, rng=np.random.default_rng(0))
    assert evaluated.shape == trained.shape == (3, 17, 17)
    assert evaluated.dtype == trained.dtype == torch.uint8
    assert image.mode == mode


# Files that are no images


def bad_files() -> dict[str, tuple[bytes, str]]:
    """Name, content and the expected reason."""
    png, jpeg = encoded("PNG"), encoded("JPEG")
    return {
        "empty.png": (b"", "empty"),
        "text.jpg": (b"this is no image", "not an image that is read here"),
        "page.webp": (b"<!doctype html><html></html>", "an HTML page"),
        "signature.png": (png[:8], "a damaged PNG"),
        "truncated.png": (png[: len(png) // 2], "cannot be decoded.*truncated"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "cannot be decoded.*truncated"),
        "no_pixels.png": (png_header(0, 5), "a damaged PNG"),
        "bomb.png": (png_header(10_000, 10_000), "too large"),
        "larger_bomb.png": (png_header(60_000, 60_000), "too large"),
    }


@pytest.mark.parametrize("name", list(bad_files()))
def test_bad_files_are_named_with_the_reason(tmp_path: Path, name: str) -> None:
    content, reason = bad_files()[name]
    path = tmp_path / name
    path.write_bytes(content)
    for source, shown in ((path, name), (str(path), name), (content, "image bytes")):
        with pytest.raises(ImageError, match=f"{re.escape(shown)}: .*({reason})") as caught:
            open_image(source)
        assert "\n" not in str(caught.value)
    rng = np.random.default_rng(0)
    for transform in (EvalTransform(8), lambda source: TrainTransform(8)(source, rng=rng)):
        with pytest.raises(ImageError, match=re.escape(name)):
            transform(path)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"absent\.png: no such file"):
        open_image(tmp_path / "absent.png")
    with pytest.raises(ImageError, match=f"{re.escape(str(tmp_path))}: is a folder"):
        open_image(tmp_path)
    with pytest.raises(ImageError, match="no such file"):
        open_image("nul\0.png")


def test_pil_images_opened_by_the_caller_name_their_file(tmp_path: Path) -> None:
    path = tmp_path / "late.png"
    content = encoded("PNG")
    path.write_bytes(content[: len(content) // 2])
    with Image.open(path) as lazy, pytest.raises(ImageError, match=r"late\.png: cannot be decoded"):
        open_image(lazy)
    with pytest.raises(ImageError, match="PIL image: has no pixels"):
        open_image(Image.new("RGB", (0, 4)))


def test_bombs_are_refused_by_the_header_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(10_000, 10_000))

    def refuse(self: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", refuse)
    with warnings.catch_warnings():
        # Where Pillow's warning is no error, the limit is ours.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(ImageError, match=r"10000 x 10000 pixels, at most 89,478,485"):
            open_image(path)


def test_pixel_limit_is_an_argument(tmp_path: Path) -> None:
    path = tmp_path / "small.png"
    path.write_bytes(encoded("PNG"))
    assert open_image(path, max_pixels=1200).size == (40, 30)
    for attempt in (
        lambda: open_image(path, max_pixels=1199),
        lambda: EvalTransform(8, max_pixels=1199)(path),
        lambda: TrainTransform(8, max_pixels=1199)(path, rng=np.random.default_rng(0)),
    ):
        with pytest.raises(ImageError, match=r"40 x 30 pixels, at most 1,199"):
            attempt()


@given(
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "ICO"]),
    cut=st.integers(0, 4000),
    flips=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=8),
)
def test_damaged_files_give_an_image_or_the_one_error(kind: str, cut: int, flips: list[tuple[int, int]]) -> None:
    content = bytearray(encoded(kind))
    for position, value in flips:
        content[position % len(content)] = value
    try:
        image = open_image(bytes(content[: len(content) - cut % len(content)]), max_pixels=10_000)
    except ImageError:
        return  # any other exception fails the test
    assert image.mode == "RGB"


def test_evaluation_is_bicubic_over_the_whole_image() -> None:
    pixels = noise(50, 80)
    expected = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC))
    levels = EvalTransform(32).to_uint8(pixels)
    assert np.array_equal(levels.permute(1, 2, 0).numpy(), expected)
    values = EvalTransform(32)(pixels)
    assert values.dtype == torch.float32
    assert values.is_contiguous()
    assert torch.equal(values, levels.float() / 255)
    # Antialias: shrinking a fine checkerboard gives grey, not one of its two colours.
    board = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
    assert EvalTransform(8).to_uint8(board.astype(np.uint8)).float().sub(127.5).abs().max() < 10


def test_exact_size_keeps_every_pixel() -> None:
    pixels = noise(16, 16)
    assert np.array_equal(EvalTransform(16).to_uint8(pixels).permute(1, 2, 0).numpy(), pixels)
    one = EvalTransform(1).to_uint8(pixels[:1, :1])
    one += 1  # memory of its own, writable
    assert np.array_equal(pixels, noise(16, 16))


@pytest.mark.parametrize("make", [EvalTransform, TrainTransform])
@pytest.mark.parametrize("image_size", [0, -1, 64.0, "64", None, True, (64, 64)])
def test_image_size_is_validated(make: Callable[..., Any], image_size: Any) -> None:
    with pytest.raises(UserError, match=f"image_size={re.escape(str(image_size))}: must be a whole number, 1 or more"):
        make(image_size)


def test_transforms_pickle_and_describe_themselves() -> None:
    evaluate = pickle.loads(pickle.dumps(EvalTransform(24, honor_exif=True)))
    assert evaluate.image_size == 24
    assert repr(evaluate) == f"EvalTransform(image_size=24, pictures={OLDER!r}, max_pixels=89478485)"
    train = TrainTransform(np.int64(24), flip=0.25, color_jitter=[0.1, 0, 0, 0.5])
    twin = pickle.loads(pickle.dumps(train))
    names = {"TrainTransform": TrainTransform, "PicturePolicy": PicturePolicy}
    assert repr(twin) == repr(train) == repr(eval(repr(train), names))
    pixels = noise()
    for seed in range(5):
        expected = train(pixels, rng=np.random.default_rng(seed))
        assert torch.equal(twin(pixels, rng=np.random.default_rng(seed)), expected)


# Training

EVERYTHING = {
    "rotate_degrees": 20,
    "zoom": (0.7, 1.2),
    "translate": 0.1,
    "shear": 0.1,
    "color_jitter": (0.4, 0.4, 0.4, 0.1),
    "grayscale": 0.5,
    "invert": 0.5,
    "operations": ["identity", "hue", "solarize", "posterize", "shear_x"],
}


@pytest.mark.parametrize("options", [{}, EVERYTHING])
@given(seed=st.integers(0, 2**32), width=st.integers(1, 60), height=st.integers(1, 60))
def test_the_generator_decides_everything(options: dict[str, Any], seed: int, width: int, height: int) -> None:
    transform = TrainTransform(12, **options)
    pixels = noise(height, width)
    first = transform(pixels, rng=np.random.default_rng(seed))
    torch.rand(1)
    assert torch.equal(first, transform(Image.fromarray(pixels), rng=np.random.default_rng(seed)))
    assert first.shape == (3, 12, 12)
    assert first.dtype == torch.uint8
    assert first.is_contiguous()
    assert np.array_equal(pixels, noise(height, width))


def test_one_generator_gives_different_views() -> None:
    rng = np.random.default_rng(0)
    transform = TrainTransform(16)
    views = [transform(noise(), rng=rng) for _ in range(20)]
    assert len({view.numpy().tobytes() for view in views}) == 20


@pytest.mark.parametrize("rng", [None, 0, np.random, np.random.RandomState(0)])
def test_randomness_must_be_explicit(rng: Any) -> None:
    with pytest.raises(UserError, match=r"rng must be a numpy\.random\.Generator"):
        TrainTransform(8)(noise(), rng=rng)
    with pytest.raises(TypeError, match="rng"):
        TrainTransform(8)(noise())  # type: ignore[call-arg]


def test_everything_off_is_the_evaluation_transform() -> None:
    square = noise(40, 40)
    plain = TrainTransform(16, scale=(1, 1), ratio=(1, 1), flip=0, num_ops=0)
    expected = EvalTransform(16).to_uint8(square)
    assert torch.equal(plain(square, rng=np.random.default_rng(0)), expected)
    mirrored = TrainTransform(16, scale=(1, 1), ratio=(1, 1), flip=1, num_ops=0)
    assert torch.equal(mirrored(square, rng=np.random.default_rng(0)), expected.flip(2))
    unlucky = TrainTransform(16, scale=(1, 1), ratio=(1, 1), flip=0, op_probability=0, operations=["invert"])
    assert torch.equal(unlucky(square, rng=np.random.default_rng(0)), expected)
    negative = TrainTransform(16, scale=(1, 1), ratio=(1, 1), flip=0, num_ops=0, invert=1)
    assert torch.equal(negative(square, rng=np.random.default_rng(0)), 255 - expected)
    grey = TrainTransform(16, scale=(1, 1), ratio=(1, 1), flip=0, num_ops=0, grayscale=1)
    levels = grey(square, rng=np.random.default_rng(0))
    assert torch.equal(levels[0], levels[1])
    luma = (expected.float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    assert (levels[0].float() - luma).abs().max() <= 1


def test_probabilities_are_kept() -> None:
    square = noise(4, 4)
    rng = np.random.default_rng(0)
    off = {"scale": (1, 1), "ratio": (1, 1)}
    flipped = TrainTransform(4, flip=0.3, num_ops=0, **off)
    plain = EvalTransform(4).to_uint8(square)
    share = np.mean([not torch.equal(flipped(square, rng=rng), plain) for _ in range(2000)])
    assert abs(share - 0.3) < 0.04
    # Two draws of "invert" at 0.25 each leave a negative where exactly one applies: 2 · 0.25 · 0.75.
    inverted = TrainTransform(4, flip=0, op_probability=0.25, operations=["invert"], **off)
    share = np.mean([torch.equal(inverted(square, rng=rng), 255 - plain) for _ in range(2000)])
    assert abs(share - 0.375) < 0.04


def test_rotation_covers_both_directions_and_fills_the_corners() -> None:
    white = np.full((32, 32, 3), 255, np.uint8)
    options = {"scale": (1, 1), "ratio": (1, 1), "flip": 0, "num_ops": 0, "fill": 7}
    transform = TrainTransform(32, rotate_degrees=45, **options)
    corners = [transform(white, rng=np.random.default_rng(seed))[:, 0, 0].tolist() for seed in range(20)]
    assert corners.count([7, 7, 7]) > 10


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"scale": (0, 1)}, "scale"),
        ({"scale": (0.9, 0.8)}, "scale"),
        ({"scale": (0.5, 1.5)}, "scale"),
        ({"scale": 0.8}, "scale"),
        ({"ratio": (0, 1)}, "ratio"),
        ({"ratio": (1, float("inf"))}, "ratio"),
        ({"flip": 1.5}, "flip"),
        ({"flip": float("nan")}, "flip"),
        ({"flip": "0.5"}, "flip"),
        ({"num_ops": -1}, "num_ops"),
        ({"op_probability": -0.1}, "op_probability"),
        ({"magnitude": 11}, "magnitude"),
        ({"operations": []}, "operations"),
        ({"operations": "identity"}, "operations"),
        ({"operations": ["identity", "blur"]}, r"operations=.*blur.*identity, autocontrast"),
        ({"fill": 256}, "fill=256: must be a whole number, in 0..255"),
        ({"rotate_degrees": 181}, "rotate_degrees"),
        ({"zoom": (0, 1)}, "zoom"),
        ({"zoom": (1.2, 0.8)}, "zoom"),
        ({"translate": 1.5}, "translate"),
        ({"shear": -0.1}, "shear"),
        ({"color_jitter": (0.1, 0.1, 0.1)}, "color_jitter"),
        ({"color_jitter": (0, 0, 0, 0.6)}, "hue"),
        ({"grayscale": 2}, "grayscale"),
        ({"invert": -1}, "invert"),
        ({"max_pixels": 0}, "max_pixels"),
    ],
)
def test_options_are_validated(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        TrainTransform(8, **options)
