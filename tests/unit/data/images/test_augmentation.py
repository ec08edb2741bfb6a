"""Every named op against its definition, and the random crop."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from m2_encoder.data.images.augmentation import (
    OFFICIAL_OPERATIONS,
    OPERATIONS,
    color_jitter,
    random_affine,
    random_crop_box,
    random_operations,
)

FILL = 128
STRENGTH = 0.7


def apply(name: str, pixels: npt.NDArray[np.uint8], strength: float = STRENGTH, seed: int = 0) -> npt.NDArray[np.int_]:
    """One op on an array, as integers."""
    image = OPERATIONS[name](Image.fromarray(pixels), strength, np.random.default_rng(seed), FILL)
    return np.asarray(image).astype(int)


def noise(height: int = 24, width: int = 24, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_the_official_ten() -> None:
    assert len(OFFICIAL_OPERATIONS) == 10
    assert set(OFFICIAL_OPERATIONS) < set(OPERATIONS)


@pytest.mark.parametrize("name", list(OPERATIONS))
@given(
    width=st.integers(1, 20),
    height=st.integers(1, 20),
    strength=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_ops_keep_size_and_mode_and_their_input(name: str, width: int, height: int, strength: float, seed: int) -> None:
    pixels = noise(height, width)
    image = Image.fromarray(pixels)
    changed = OPERATIONS[name](image, strength, np.random.default_rng(seed), FILL)
    assert changed.mode == "RGB"
    assert changed.size == (width, height)
    assert np.array_equal(np.asarray(image), pixels)
    again = OPERATIONS[name](image, strength, np.random.default_rng(seed), FILL)
    assert np.array_equal(np.asarray(changed), np.asarray(again))


@pytest.mark.parametrize(
    "name",
    [
        "identity",
        "shear_x",
        "shear_y",
        "translate_x",
        "translate_y",
        "rotate",
        "hue",
        "solarize",
        "posterize",
    ],
)
def test_strength_zero_changes_nothing(name: str) -> None:
    # A colour that survives the way to HSV and back.
    pixels = np.tile(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8), (6, 3, 1))
    assert np.array_equal(apply(name, pixels, strength=0), pixels)


@pytest.mark.parametrize("axis", [1, 0])
def test_translation_is_seven_pixels_at_the_official_strength(axis: int) -> None:
    pixels = noise()
    shifted = []
    for amount in (7, -7):
        moved = np.roll(pixels, amount, axis=axis).astype(int)
        uncovered = slice(0, 7) if amount > 0 else slice(-7, None)
        moved[(slice(None), uncovered) if axis == 1 else uncovered] = FILL
        shifted.append(moved)
    results = [apply("translate_x" if axis == 1 else "translate_y", pixels, seed=seed) for seed in range(20)]
    for result in results:
        assert any(np.array_equal(result, expected) for expected in shifted)
    assert len({result.tobytes() for result in results}) == 2  # both directions occur


@pytest.mark.parametrize("name", ["shear_x", "shear_y"])
def test_shear_slopes_are_bounded(name: str) -> None:
    # A one pixel wide line, which a shear tilts by 0.3 · 0.7 pixels per row.
    pixels = np.zeros((61, 61, 3), np.uint8)
    pixels[:, 30] = 255
    slopes = set()
    for seed in range(20):
        tilted = apply(name, pixels if name == "shear_x" else pixels.transpose(1, 0, 2), seed=seed)[:, :, 0]
        tilted = tilted if name == "shear_x" else tilted.T
        rows = range(5, 56)
        # The line's centre of mass per row, where uncovered pixels (the fill) do not count.
        lit = np.where(tilted == FILL, 0, tilted).astype(float)
        centres = [np.average(np.arange(61), weights=lit[row] + 1e-9) for row in rows]
        slopes.add(round(float(np.polyfit(rows, centres, 1)[0]), 2))
    assert slopes == {-0.21, 0.21}


def test_rotation_is_21_degrees_either_way() -> None:
    pixels = np.zeros((101, 101, 3), np.uint8)
    pixels[48:53, 80:85] = 255  # a spot right of the centre
    angles = set()
    for seed in range(20):
        spot = apply("rotate", pixels, seed=seed)[:, :, 0]
        y, x = np.nonzero(spot > 200)
        angles.add(round(float(np.degrees(np.arctan2(50 - y.mean(), x.mean() - 50)))))
    assert angles == {-21, 21}


def test_brightness_scales_by_1_36() -> None:
    pixels = noise()
    expected = np.clip(pixels * 1.36, 0, 255)
    assert np.abs(apply("brightness", pixels) - expected).max() <= 1


def test_sharpness_steps_away_from_the_smoothed_image() -> None:
    pixels = noise().astype(float)
    smooth = pixels.copy()
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    smooth[1:-1, 1:-1] = sum(kernel[dy, dx] * pixels[dy : dy + 22, dx : dx + 22] for dy in range(3) for dx in range(3))
    expected = np.clip(smooth + 1.36 * (pixels - smooth), 0, 255)
    assert np.abs(apply("sharpness", noise()) - expected).max() <= 2


def test_contrast_and_saturation_scale_by_1_36() -> None:
    pixels = noise()
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    around_mean = luma.mean() + 1.36 * (pixels - luma.mean())
    assert np.abs(apply("contrast", pixels) - np.clip(around_mean, 0, 255)).max() <= 2
    around_grey = luma[..., None] + 1.36 * (pixels - luma[..., None])
    assert np.abs(apply("saturation", pixels) - np.clip(around_grey, 0, 255)).max() <= 2


def test_autocontrast_spans_every_channel() -> None:
    pixels = (noise() // 4 + 50).astype(np.uint8)
    low, high = pixels.min((0, 1)).astype(int), pixels.max((0, 1)).astype(int)
    expected = (pixels - low) * 255.0 / (high - low)
    assert np.abs(apply("autocontrast", pixels) - expected).max() <= 1
    flat = np.full((4, 4, 3), 90, np.uint8)
    assert np.array_equal(apply("autocontrast", flat), flat)


def test_equalize_flattens_the_histogram() -> None:
    rng = np.random.default_rng(0)
    pixels = np.clip(rng.normal(100, 10, (64, 64, 3)), 0, 255).astype(np.uint8)
    levels = apply("equalize", pixels)
    for channel in range(3):
        quartiles = np.quantile(levels[..., channel], [0.25, 0.5, 0.75])
        assert np.abs(quartiles - [64, 128, 191]).max() < 12
    flat = np.full((4, 4, 3), 90, np.uint8)
    assert np.array_equal(apply("equalize", flat), flat)


def test_pointwise_ops_beyond_the_official_ones() -> None:
    pixels = noise()
    assert np.array_equal(apply("invert", pixels), 255 - pixels)
    threshold = round(256 * 0.3)
    assert np.array_equal(apply("solarize", pixels), np.where(pixels < threshold, pixels, 255 - pixels))
    assert np.array_equal(apply("posterize", pixels), pixels & 0b1111_1000)
    grey = apply("grayscale", pixels)
    assert np.abs(grey[..., 0] - pixels @ np.array([0.299, 0.587, 0.114])).max() <= 1
    assert np.array_equal(grey[..., 0], grey[..., 2])


def luma(color: tuple[int, ...]) -> float:
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]


@given(seed=st.integers(0, 10_000), red=st.integers(90, 160), green=st.integers(90, 160), blue=st.integers(90, 160))
def test_hue_and_saturation_keep_the_luma(seed: int, red: int, green: int, blue: int) -> None:
    pixel = Image.new("RGB", (1, 1), (red, green, blue))
    turned = color_jitter(pixel, (0, 0, 0.3, 0.5), np.random.default_rng(seed)).getpixel((0, 0))
    # Colours near grey stay inside the cube, so only rounding moves the luma.
    assert abs(luma(turned) - luma((red, green, blue))) <= 1.5


def test_half_a_turn_of_hue_and_no_saturation_are_what_they_say() -> None:
    class Extremes:
        """Draws the upper end of every range but the saturation, of which it draws the lower end."""

        def uniform(self, low: float, high: float) -> float:
            return low if low == 0 and high == 2 else high

    color = Image.new("RGB", (1, 1), (150, 110, 120))
    grey = color_jitter(color, (0, 0, 1, 0.5), Extremes()).getpixel((0, 0))
    assert max(grey) - min(grey) <= 1
    opposite = color_jitter(color, (0, 0, 0, 0.5), Extremes()).getpixel((0, 0))
    mirrored = [2 * luma((150, 110, 120)) - level for level in (150, 110, 120)]
    assert np.abs(np.array(opposite) - mirrored).max() <= 2


def test_contrast_keeps_middle_grey_and_brightness_keeps_black() -> None:
    middle, black = (Image.new("RGB", (2, 2), (level,) * 3) for level in (127, 0))
    for seed in range(20):
        kept = color_jitter(middle, (0, 0.9, 0, 0), np.random.default_rng(seed)).getpixel((0, 0))
        assert all(abs(level - 127) <= 1 for level in kept)
        assert color_jitter(black, (0.9, 0, 0, 0), np.random.default_rng(seed)).getpixel((0, 0)) == (0, 0, 0)


AFFINE_OFF = {"degrees": 0.0, "zoom": (1.0, 1.0), "translate": 0.0, "shear": 0.0, "fill": 9}


def test_an_affine_map_without_a_change_is_the_identity() -> None:
    image = Image.fromarray(noise())
    same = random_affine(image, **AFFINE_OFF, rng=np.random.default_rng(0))
    assert np.abs(np.asarray(same).astype(int) - noise()).max() <= 1


@pytest.mark.parametrize("zoom", [0.5, 2.0])
def test_zoom_scales_the_content_about_the_centre(zoom: float) -> None:
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[24:40, 24:40] = 0  # a black square of 16 pixels
    options = {**AFFINE_OFF, "zoom": (zoom, zoom)}
    zoomed = np.asarray(random_affine(Image.fromarray(pixels), **options, rng=np.random.default_rng(0)))
    inside = zoomed[:, :, 0] < 128
    if zoom < 1:
        assert (zoomed[0, 0] == 9).all()
        inside[:16] = inside[-16:] = inside[:, :16] = inside[:, -16:] = False
    rows = np.flatnonzero(inside.any(axis=1))
    assert abs(len(rows) - 16 * zoom) <= 1
    assert abs(rows.mean() - 31.5) <= 0.5


def test_translation_and_rotation_reach_both_ends() -> None:
    pixels = np.full((33, 33, 3), 255, np.uint8)
    pixels[14:19, 14:19] = 0
    places = []
    for seed in range(60):
        options = {**AFFINE_OFF, "translate": 0.3, "fill": 255}
        moved = np.asarray(random_affine(Image.fromarray(pixels), **options, rng=np.random.default_rng(seed)))
        places.append(np.argwhere(moved[:, :, 0] < 128).mean(axis=0))
    offsets = (np.array(places) - 16) / 33
    assert np.abs(offsets).max() <= 0.32
    assert (offsets.min(axis=0) < -0.2).all()
    assert (offsets.max(axis=0) > 0.2).all()


def test_ops_are_drawn_from_the_names_alone() -> None:
    image = Image.fromarray(noise())
    rng = np.random.default_rng(0)
    options = {"probability": 1.0, "strength": STRENGTH, "fill": FILL, "rng": rng}
    inverted = random_operations(image, names=("invert",), num_ops=3, **options)
    assert np.array_equal(np.asarray(inverted), 255 - noise())
    seen = {
        np.asarray(random_operations(image, names=("identity", "invert"), num_ops=1, **options)).tobytes()
        for _ in range(50)
    }
    assert seen == {noise().tobytes(), (255 - noise()).tobytes()}
    assert random_operations(image, names=OFFICIAL_OPERATIONS, num_ops=0, **options) is image


def test_color_jitter_changes_only_what_it_is_given() -> None:
    pixels = noise()
    image = Image.fromarray(pixels)
    untouched = color_jitter(image, (0, 0, 0, 0), np.random.default_rng(0))
    assert np.array_equal(np.asarray(untouched), pixels)
    grey = np.repeat(noise()[:, :, :1], 3, axis=2)
    # Neither saturation nor hue can change a grey image.
    kept = color_jitter(Image.fromarray(grey), (0, 0, 1, 0.5), np.random.default_rng(0))
    assert np.abs(np.asarray(kept).astype(int) - grey).max() <= 1
    means = [np.asarray(color_jitter(image, (0.5, 0, 0, 0), np.random.default_rng(seed))).mean() for seed in range(40)]
    assert 0.45 * pixels.mean() < min(means) < 0.8 * pixels.mean()
    assert 1.1 * pixels.mean() < max(means) < 1.5 * pixels.mean()


@given(
    width=st.integers(1, 500),
    height=st.integers(1, 500),
    least=st.floats(0.05, 1),
    seed=st.integers(0, 2**32),
)
def test_crops_lie_inside_with_the_asked_area_and_ratio(width: int, height: int, least: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    left, top, right, bottom = random_crop_box((width, height), scale=(least, 1.0), ratio=(3 / 4, 4 / 3), rng=rng)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    crop_width, crop_height = right - left, bottom - top
    # Sides are rounded to pixels: the exact ones lie within half a pixel.
    assert (crop_width - 0.5) / (crop_height + 0.5) <= 4 / 3 + 1e-9
    assert (crop_width + 0.5) / (crop_height - 0.5) >= 3 / 4 - 1e-9
    if 3 / 4 <= width / height <= 4 / 3:
        assert (crop_width + 0.5) * (crop_height + 0.5) >= least * width * height - 1e-6


def test_crops_of_a_long_image_fall_back_to_the_centre() -> None:
    rng = np.random.default_rng(0)
    box = random_crop_box((1000, 30), scale=(0.8, 1.0), ratio=(3 / 4, 4 / 3), rng=rng)
    assert box == (480, 0, 520, 30)
    box = random_crop_box((30, 1000), scale=(0.8, 1.0), ratio=(3 / 4, 4 / 3), rng=rng)
    assert box == (0, 480, 30, 520)


def test_crop_positions_and_areas_are_uniform() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([random_crop_box((200, 200), scale=(0.25, 0.5), ratio=(1, 1), rng=rng) for _ in range(3000)])
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 200**2
    assert abs(areas.mean() - 0.375) < 0.01
    for low, high in ((0, 2), (1, 3)):
        position = boxes[:, low] / (200 - (boxes[:, high] - boxes[:, low]))
        assert abs(position.mean() - 0.5) < 0.02
        assert position.min() == 0
        assert position.max() == 1
