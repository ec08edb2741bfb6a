"""Image-text scores by a model: workers decode windows of pairs, one model per device encodes them.

Only pairs that no rule has rejected are scored, because scores cost most. A window is always the same rows of the same
shard, encoded together, so a score depends neither on the executor nor on where it was stopped.

Letters: n rows of a window · k images of it · S image side in pixels.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from m2_encoder.checkpoints.exported import read_exported
from m2_encoder.curation.measure import check_unchanged, read_member
from m2_encoder.curation.settings import ScoreSettings
from m2_encoder.curation.sources import Shard
from m2_encoder.curation.tables import read_table, write_table
from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.data.shards.index import Member
from m2_encoder.errors import ImageError
from m2_encoder.hub import choose_pictures, load
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.pictures import PicturePolicy

_COLUMNS = ("sample", "keep", "text", "image_offset", "image_size")


class ScoreTask(NamedTuple):
    """A window of a shard."""

    output: str  # a table with the column `score`, (n,) float32, null for rejected rows
    decided: str  # the shard's decisions so far
    shard: Shard  # where the images are
    start: int
    stop: int
    image_size: int
    pictures: PicturePolicy
    max_pixels: int


class Window(NamedTuple):
    """A decoded window."""

    output: str
    num_rows: int  # n
    # which rows are scored; kept ones are missing if their image cannot be decoded after all
    rows: npt.NDArray[np.int64]
    image_of_row: npt.NDArray[np.int64]  # place in `images` of each of them
    images: npt.NDArray[np.uint8]  # (k, 3, S, S) uint8
    texts: list[str]  # of the scored rows


def inputs_of(settings: ScoreSettings) -> tuple[int, PicturePolicy]:
    """S of the model, and what the pixels of its pictures are, without loading its weights."""
    folder = Path(settings.model)
    exported = read_exported(folder) if folder.is_dir() else None
    config = exported.config if exported is not None else M2EncoderConfig.from_name(settings.model)
    return config.image_size, choose_pictures(config, settings.weights, exported)


def prepare_window(task: ScoreTask) -> Window:
    """Read and decode what a window needs.

    Raises:
        UserError: if the shard was replaced since it was measured.
    """
    check_unchanged(task.shard)
    table = read_table(Path(task.decided), _COLUMNS).slice(task.start, task.stop - task.start)
    rows = np.flatnonzero(table.column("keep").to_numpy())
    kept = table.take(pa.array(rows)).to_pydict()
    _, first, image_of_row = np.unique(np.array(kept["sample"], dtype=np.int64), return_index=True, return_inverse=True)
    transform = EvalTransform(task.image_size, pictures=task.pictures, max_pixels=task.max_pixels)
    images = np.empty((len(first), 3, task.image_size, task.image_size), dtype=np.uint8)
    usable = np.zeros(len(first), dtype=bool)
    with open(task.shard.path, "rb") as file:
        for place, row in enumerate(first):
            member = Member(kept["image_offset"][row], kept["image_size"][row])
            # Damage that decoding at a fraction of the size did not find; the pair then has no score.
            with contextlib.suppress(ImageError):
                images[place] = transform.to_uint8(read_member(file, member)).numpy()
                usable[place] = True
    scored = usable[image_of_row]
    new_place = np.cumsum(usable) - 1
    texts = [text for text, has_image in zip(kept["text"], scored, strict=True) if has_image]
    return Window(task.output, len(table), rows[scored], new_place[image_of_row[scored]], images[usable], texts)


class Scorer:
    """Holds the model and scores windows.

    Raises:
        UserError: if the model cannot be loaded.
    """

    def __init__(self, settings: ScoreSettings) -> None:
        loaded = load(settings.model, weights=settings.weights, tokenizer=settings.tokenizer, device=settings.device)
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self._device = torch.device(settings.device)

    def __call__(self, window: Window) -> None:
        """Write the cosine of every pair of the window."""
        scores: list[float | None] = [None] * window.num_rows
        if len(window.rows):
            cosines = self._cosines(window)
            for row, cosine in zip(window.rows.tolist(), cosines, strict=True):
                scores[row] = cosine
        write_table(Path(window.output), pa.table({"score": pa.array(scores, pa.float32())}))

    @torch.inference_mode()
    def _cosines(self, window: Window) -> list[Any]:
        images = self._model.encode_image(torch.from_numpy(window.images).to(self._device))
        tokens = self._tokenizer(window.texts)
        texts = self._model.encode_text(type(tokens)(*(part.to(self._device) for part in tokens)))
        paired = images[torch.from_numpy(window.image_of_row).to(self._device)]
        return (paired.float() * texts.float()).sum(dim=1).cpu().tolist()
