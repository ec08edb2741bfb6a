"""The 0.4B model at full width and depth: fp32 against fp64 of itself."""

from __future__ import annotations

import torch

from m2_encoder import M2Encoder, M2EncoderConfig
from tests.support.closeness import assert_close_in_ulps
from tests.support.models import random_images, random_text


@torch.no_grad()
def test_fp32_agrees_with_fp64() -> None:
    torch.manual_seed(0)
    config = M2EncoderConfig.from_name("m2-encoder-0.4b", vocab_size=1000)  # a row of the table is as any other
    model = M2Encoder(config).eval()
    images, text = random_images(config, 2), random_text(config, [2, 9, 52])
    single = model.encode_image(images), model.encode_text(text)
    model = model.double()
    double = model.encode_image(images.double()), model.encode_text(text)
    for fp32, fp64 in zip(single, double, strict=True):
        assert fp32.dtype == torch.float32
        assert fp64.dtype == torch.float64
        assert_close_in_ulps(fp32, fp64, ulps=1000)  # twelve layers of 768 numbers
    # Nothing has collapsed, so the comparison says something.
    assert (double[0][0] - double[0][1]).abs().max() > 1e-3
    assert (double[1][0] - double[1][1]).abs().max() > 1e-3
