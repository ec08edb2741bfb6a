from __future__ import annotations

import hashlib

import numpy as np
import pytest
from PIL import Image

from m2_encoder.curation.images import measure_image
from m2_encoder.data.samples.parse import SampleProblem
from tests.support.curation import draw, encode

MAX_PIXELS = 10**6


def hash_of(content: bytes) -> int:
    value = measure_image(content, max_pixels=MAX_PIXELS).perceptual_hash
    assert value is not None
    return value


def distance(a: bytes, b: bytes) -> int:
    return (hash_of(a) ^ hash_of(b)).bit_count()


def test_size_hash_and_color() -> None:
    content = encode(draw(3, width=50, height=30))
    measure = measure_image(content, max_pixels=MAX_PIXELS)
    assert (measure.width, measure.height) == (50, 30)
    assert measure.image_hash == hashlib.sha256(content).digest()
    red = encode(Image.new("RGB", (20, 20), (200, 10, 30)))
    assert measure_image(red, max_pixels=MAX_PIXELS).mean_color == 0xC80A1E


def cosine_transform(signal: np.ndarray) -> np.ndarray:
    """Orthonormal DCT-II along the last axis, by the FFT of the mirrored signal."""
    size = signal.shape[-1]
    mirrored = np.fft.fft(np.concatenate([signal, signal[..., ::-1]], axis=-1))[..., :size]
    values = (mirrored * np.exp(-0.5j * np.pi * np.arange(size) / size)).real / np.sqrt(2 * size)
    values[..., 0] /= np.sqrt(2)
    return values


def test_bits_are_signs_of_low_frequencies() -> None:
    image = draw(7, width=32, height=32)
    grey = np.asarray(image, dtype=np.float64) @ [0.299, 0.587, 0.114]
    low = cosine_transform(cosine_transform(grey).T).T[:8, :8].reshape(-1)
    expected = (low > np.median(low[1:])).astype(int)
    expected[0] = 0
    assert [int(bit) for bit in f"{hash_of(encode(image)):064b}"] == expected.tolist()


@pytest.mark.parametrize("number", range(12))
def test_looks_survive_what_the_web_does(number: int) -> None:
    image = draw(number, width=200, height=160)
    original = encode(image)
    for copy in (
        encode(image.resize((100, 80), Image.Resampling.BICUBIC)),
        encode(image, "JPEG", quality=60),
        encode(image.resize((1000, 800)), "JPEG", quality=85),
        encode(image, "WEBP", quality=70),
    ):
        assert distance(original, copy) <= 2


def test_different_pictures_are_far_apart() -> None:
    hashes = [hash_of(encode(draw(number))) for number in range(60)]
    gaps = [(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(gaps) > 3
    assert 26 < np.mean(gaps) < 36


def test_plain_pictures_have_no_look() -> None:
    for color in ((0, 0, 0), (255, 255, 255), (9, 99, 200)):
        measure = measure_image(encode(Image.new("RGB", (40, 40), color)), max_pixels=MAX_PIXELS)
        assert measure.perceptual_hash is None


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "F"])
def test_every_mode_is_measured(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "TIFF" if mode == "F" else "PNG"
    image = Image.effect_mandelbrot((64, 48), (-2, -1.5, 1, 1.5), 50).convert("L")
    image = image.convert("I" if mode in ("I;16", "F") else "RGB").convert(mode)
    assert measure_image(encode(image, kind), max_pixels=MAX_PIXELS).width == 64


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty_member"),
        (b"GIF89a, or so they say", "undecodable_image"),
        (encode(draw(1))[:-200], "undecodable_image"),
        (encode(draw(1, width=300, height=300), "JPEG")[:2000], "undecodable_image"),
        (encode(Image.new("L", (1001, 1000))), "too_many_pixels"),
    ],
)
def test_faults(content: bytes, reason: str) -> None:
    with pytest.raises(SampleProblem) as caught:
        measure_image(content, max_pixels=MAX_PIXELS)
    assert caught.value.reason == reason


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (1, 1)])
def test_absurd_shapes_are_measured(shape: tuple[int, int]) -> None:
    assert measure_image(encode(Image.new("RGB", shape)), max_pixels=MAX_PIXELS).width == shape[0]
