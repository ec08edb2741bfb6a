"""One side of the data benchmark, as a process of its own: `python _data_loaders.py SIDE FOLDER COUNT`.

It reads commands from its standard input, one a line, the name of a measurement, and answers each with one line of
JSON: {"samples", "wall_s", "cpu_s"} of a pass over all images; "quit" ends it. The peer's environment has none of our
packages, so that nothing but the standard library is imported before the side is known.
"""

from __future__ import annotations

import gc
import io
import json
import os
import resource
import sys
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

IMAGE_SIZE = 224
BATCH = 128
SCALE = (0.9, 1.0)  # open_clip's default; it neither mirrors nor recolours

Measurement = Callable[[], int]


def build_ours(folder: Path, count: int) -> dict[str, Measurement]:
    """Our engine with 0 and 2 workers, and decoding alone."""
    from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
    from m2_encoder.data.images.decode import decode_image_uint8
    from m2_encoder.data.images.tensor_transforms import TensorTrainTransform
    from m2_encoder.data.samples.captions import CaptionSampler
    from m2_encoder.data.webdataset_module import WebDatasetModule
    from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

    def load(workers: int) -> int:
        module = WebDatasetModule(
            tokenizer=SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=52),
            image_size=IMAGE_SIZE,
            seed=0,
            max_steps=count // BATCH,
            sources={"photos": {"shards": str(folder), "languages": ["en"]}},
            global_batch_size=BATCH,
            num_workers=workers,
            captions=CaptionSampler(language_weights={"en": 1.0}, role_weights={"original": 1.0}),
            decode=decode_image_uint8,
            transform=partial(TensorTrainTransform, scale=SCALE, flip=0.0, num_ops=0),
        )
        module.prepare_data()
        return sum(len(batch.images) for batch in module.train_dataloader())

    images = _read_images(folder)

    def decode() -> int:
        return sum(decode_image_uint8(content).shape[0] // 3 for content in images)

    return {"0 workers": partial(load, 0), "2 workers": partial(load, 2), "decoding alone": decode}


def build_open_clip(folder: Path, count: int) -> dict[str, Measurement]:
    """open_clip's own training pipeline, as `open_clip_train.main` builds it."""
    import open_clip
    from open_clip_train.data import get_wds_dataset

    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    transform = open_clip.image_transform(IMAGE_SIZE, is_train=True, aug_cfg={"scale": SCALE})
    shards = sorted(folder.glob("*.tar"))

    def load(workers: int) -> int:
        arguments = SimpleNamespace(
            train_data=f"{folder}/{{{shards[0].stem}..{shards[-1].stem}}}.tar",
            train_num_samples=count,
            train_data_upsampling_factors=None,
            seed=0,
            batch_size=BATCH,
            workers=workers,
            world_size=1,
        )
        data = get_wds_dataset(arguments, transform, is_train=True, tokenizer=tokenizer)
        return sum(len(images) for images, _ in data.dataloader)

    return {"0 workers": partial(load, 0), "2 workers": partial(load, 2)}


def _read_images(folder: Path) -> list[bytes]:
    images = []
    for shard in sorted(folder.glob("*.tar")):
        content = shard.read_bytes()
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            found = [member for member in tar if member.name.endswith(".jpg")]
        images += [content[each.offset_data : each.offset_data + each.size] for each in found]
    return images


def measure(measurement: Measurement) -> dict[str, float]:
    """One pass: samples, wall time, and CPU time of this process and of the workers it started and ended."""
    own, workers = _cpu_seconds(resource.RUSAGE_SELF), _cpu_seconds(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    samples = measurement()
    wall = time.perf_counter() - start
    own = _cpu_seconds(resource.RUSAGE_SELF) - own
    gc.collect()  # ends workers that a loader keeps for its next epoch: only ended ones are counted
    workers = _cpu_seconds(resource.RUSAGE_CHILDREN) - workers
    return {"samples": samples, "wall_s": wall, "cpu_s": own + workers}


def _cpu_seconds(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def main() -> None:
    side, folder, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import torch

    # As in workers: the spinning threads of torch's pool would be counted against whoever wakes them.
    torch.set_num_threads(1)
    measurements = {"ours": build_ours, "open_clip": build_open_clip}[side](folder, count)
    for line in sys.stdin:
        command = line.strip()
        if command == "quit":
            return
        answer: Any = measure(measurements[command])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
