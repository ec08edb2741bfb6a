"""A small mixture of two sources with some unusable samples, for runs of the real training code."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from m2_encoder.data.images.decode import decode_image_uint8
from m2_encoder.data.images.tensor_transforms import TensorTrainTransform
from m2_encoder.data.samples.captions import CaptionSampler
from m2_encoder.data.webdataset_module import WebDatasetModule
from tests.support.shards import make_image, make_sample, write_tar
from tests.support.training import IMAGE_SIZE, make_tokenizer


def write_mixture(folder: Path) -> None:
    """Sources a (90 samples in 3 shards) and b (40 in 1), every seventh image of a damaged, one caption missing."""
    if (folder / "b").is_dir():
        return
    for shard in range(3):
        members = []
        for i in range(30 * shard, 30 * shard + 30):
            image, text = make_sample(f"a{i:04d}", i)
            members += [(image[0], b"damaged"), text] if i % 7 == 3 else [image, text]
        write_tar(folder / "a" / f"{shard}.tar", members)
    alone = [("alone.png", make_image(1))]
    write_tar(folder / "b" / "0.tar", [m for i in range(40) for m in make_sample(f"b{i:04d}", 500 + i)] + alone)


def make_mixture(folder: Path, **overrides: Any) -> WebDatasetModule:
    """A data module over `write_mixture`, with crops, flips and both languages, so that every random choice shows."""
    write_mixture(folder)
    sources = {
        "a": {"shards": f"{folder}/a/*.tar", "weight": 2},
        "b": {"shards": f"{folder}/b/*.tar", "weight": 1},
    }
    return make_module_over(**{"sources": sources, **overrides})


def make_module_over(**values: Any) -> WebDatasetModule:
    """A data module over any `sources`, small and with every random choice."""
    defaults: dict[str, Any] = {
        "tokenizer": make_tokenizer(),
        "image_size": IMAGE_SIZE,
        "seed": 5,
        "max_steps": 12,
        "global_batch_size": 16,
        "num_workers": 0,
        "captions": CaptionSampler(language_weights={"zh": 1, "en": 1}, role_weights={"original": 1}),
        "decode": decode_image_uint8,
        "transform": partial(TensorTrainTransform, scale=(0.6, 1.0), flip=0.5, num_ops=1),
        "lanes": 4,
        "window": 16,
        "max_bad_share": 0.5,
    }
    return WebDatasetModule(**{**defaults, **values})
