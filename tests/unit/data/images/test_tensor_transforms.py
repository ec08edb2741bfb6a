"""The training transform on tensors: the Pillow path's pixels, and nothing else's."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m2_encoder.data.images.augmentation import OPERATIONS
from m2_encoder.data.images.decode import decode_image_uint8
from m2_encoder.data.images.tensor_transforms import TensorTrainTransform, crop_and_resize
from m2_encoder.data.images.transforms import TrainTransform
from m2_encoder.errors import ImageError, UserError

PLAIN: dict[str, Any] = {"num_ops": 0}
EVERYTHING: dict[str, Any] = {
    "num_ops": 3,
    "operations": list(OPERATIONS),
    "rotate_degrees": 15,
    "zoom": (0.75, 1.1),
    "translate": 0.1,
    "shear": 0.1,
    "color_jitter": (0.3, 0.3, 0.5, 0.05),
    "grayscale": 0.5,
    "invert": 0.5,
}


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Like a photograph: a spectrum that falls with frequency, as natural images have it."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    spectrum = rng.normal(size=(3, height, width // 2 + 1)) / np.maximum(frequency, 1 / max(height, width))
    field = np.fft.irfft2(spectrum, s=(height, width))
    field = 128 + 50 * field / field.std()
    return Image.fromarray(np.clip(field, 0, 255).astype(np.uint8).transpose(1, 2, 0).copy())


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def both(image: Image.Image, size: int, seed: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensor path and the Pillow path, from the same generator state, which must end alike, too."""
    rngs = [np.random.default_rng(seed) for _ in range(2)]
    ours = TensorTrainTransform(size, **options)(tensor(image), rng=rngs[0])
    pillow = TrainTransform(size, **options)(image, rng=rngs[1])
    assert rngs[0].bit_generator.state == rngs[1].bit_generator.state
    return ours, pillow


@pytest.mark.parametrize("scale", [(0.8, 1.0), (0.05, 0.3)])
def test_photographs_within_two_levels_of_pillow(scale: tuple[float, float]) -> None:
    differences = []
    for seed in range(24):
        height, width = np.random.default_rng(seed).integers(200, 520, 2)
        ours, pillow = both(photo(height, width, seed), 224, seed, scale=scale, **PLAIN)
        differences.append((ours.int() - pillow.int()).abs())
    worst, mean = max(int(d.max()) for d in differences), float(torch.stack(differences).float().mean())
    assert worst <= 2
    assert mean <= 0.02


@settings(max_examples=150)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    size=st.integers(1, 70),
    least=st.floats(0.05, 1),
    flip=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_any_shape_is_a_pure_function_near_pillow(
    width: int, height: int, size: int, least: float, flip: float, seed: int
) -> None:
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
    ours, pillow = both(image, size, seed, scale=(least, 1.0), flip=flip, **PLAIN)
    assert ours.shape == (3, size, size)
    assert ours.dtype == torch.uint8
    assert ours.permute(1, 2, 0).is_contiguous()
    # White noise is the worst case: the two round their weights and the row between the passes in other places.
    assert (ours.int() - pillow.int()).abs().max() <= 3
    again, _ = both(image, size, seed, scale=(least, 1.0), flip=flip, **PLAIN)
    assert torch.equal(ours, again)


@pytest.mark.parametrize("seed", range(12))
def test_augmentations_are_those_of_the_pillow_path(seed: int) -> None:
    # Without a resize there is nothing to round: both paths must agree to the bit, whatever is switched on.
    image = photo(48, 48, seed)
    ours, pillow = both(image, 48, seed, scale=(1.0, 1.0), ratio=(1.0, 1.0), **EVERYTHING)
    assert torch.equal(ours, pillow)


@pytest.mark.parametrize("option", [name for name in EVERYTHING if name not in {"num_ops", "operations"}])
def test_each_option_alone_works(option: str) -> None:
    value = {"grayscale": 1.0, "invert": 1.0}.get(option, EVERYTHING[option])
    ours, pillow = both(photo(32, 32), 32, 1, scale=(1.0, 1.0), ratio=(1.0, 1.0), num_ops=0, **{option: value})
    plain, _ = both(photo(32, 32), 32, 1, scale=(1.0, 1.0), ratio=(1.0, 1.0), num_ops=0)
    assert torch.equal(ours, pillow)
    assert not torch.equal(ours, plain)


def test_an_operation_of_probability_one_is_applied() -> None:
    options: dict[str, Any] = {"num_ops": 1, "op_probability": 1.0, "operations": ["invert"], "flip": 0.0}
    ours, _ = both(photo(20, 20), 20, 0, scale=(1.0, 1.0), ratio=(1.0, 1.0), **options)
    assert torch.equal(ours, 255 - tensor(photo(20, 20)))


def test_the_source_is_not_changed_and_not_shared() -> None:
    source = tensor(photo(24, 24))
    kept = source.clone()
    for options in ({"flip": 0.0}, {"flip": 1.0}, EVERYTHING):
        transform = TensorTrainTransform(24, scale=(1.0, 1.0), ratio=(1.0, 1.0), **{**PLAIN, **options})
        transform(source, rng=np.random.default_rng(0)).fill_(7)
        assert torch.equal(source, kept)


@pytest.mark.parametrize("honor_exif", [False, True])
def test_bytes_are_decoded_and_other_sources_go_the_pillow_way(honor_exif: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = io.BytesIO()
    photo(100, 140).save(content, "JPEG", exif=exif)
    transform = TensorTrainTransform(32, honor_exif=honor_exif)
    from_bytes = transform(content.getvalue(), rng=np.random.default_rng(3))
    decoded = decode_image_uint8(content.getvalue(), honor_exif=honor_exif)
    assert torch.equal(from_bytes, transform(decoded, rng=np.random.default_rng(3)))
    image = Image.open(content)
    expected = TrainTransform(32, honor_exif=honor_exif)(image, rng=np.random.default_rng(3))
    assert torch.equal(transform(image, rng=np.random.default_rng(3)), expected)
    with pytest.raises(ImageError, match="too_many_pixels"):
        TensorTrainTransform(32, max_pixels=100)(content.getvalue(), rng=np.random.default_rng(3))


@pytest.mark.parametrize(
    ("image", "shown"),
    [
        (torch.zeros(3, 8, 8), r"\(3, 8, 8\) torch.float32"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"\(8, 8, 3\)"),
        (torch.zeros(8, 8, dtype=torch.uint8), r"\(8, 8\)"),
        (torch.zeros(3, 0, 8, dtype=torch.uint8), r"\(3, 0, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"\(1, 3, 8, 8\)"),
    ],
)
def test_other_tensors_are_refused(image: torch.Tensor, shown: str) -> None:
    with pytest.raises(ImageError, match=rf"\(3, H, W\) uint8 on the CPU, got {shown}"):
        TensorTrainTransform(8)(image, rng=np.random.default_rng(0))


def test_a_seed_is_no_generator() -> None:
    with pytest.raises(UserError, match="default_rng"):
        TensorTrainTransform(8)(torch.zeros(3, 8, 8, dtype=torch.uint8), rng=3)  # type: ignore[arg-type]


def test_it_travels_to_workers() -> None:
    transform = TensorTrainTransform(16, **EVERYTHING)
    copied = pickle.loads(pickle.dumps(transform))
    image = tensor(photo(30, 40))
    rngs = [np.random.default_rng(5) for _ in range(2)]
    assert torch.equal(transform(image, rng=rngs[0]), copied(image, rng=rngs[1]))
    assert repr(copied) == repr(transform)
    assert repr(copied).startswith("TensorTrainTransform(image_size=16")


def test_cropping_takes_the_box_it_is_given() -> None:
    image = tensor(photo(50, 70))
    part = crop_and_resize(image, (10, 5, 30, 25), 20)
    assert np.array_equal(part, np.asarray(photo(50, 70))[5:25, 10:30])
    part[:] = 0
    assert torch.equal(image, tensor(photo(50, 70)))
    shrunk = crop_and_resize(image, (0, 0, 70, 50), 10)
    expected = photo(50, 70).resize((10, 10), Image.Resampling.BICUBIC)
    assert np.abs(shrunk.astype(int) - np.asarray(expected)).max() <= 2
