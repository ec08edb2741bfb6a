"""The page of predictions stays within its panel, whatever the captions are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from m2_encoder.evaluation.pictures.drawing import SCALE
from m2_encoder.evaluation.pictures.masked import MaskedRow, PredictedCaption, Words, draw_masked_page

LONG = "a dog, a cat and seventeen other animals play together in the park near the river on a warm evening in spring "
CAPTIONS = {
    "alternating": PredictedCaption(
        LONG, tuple(Words(f"{w} ", (None, True)[i % 2]) for i, w in enumerate(LONG.split()))
    ),
    "visible": PredictedCaption(LONG, (Words("a ", True), Words(LONG))),
    "one pill": PredictedCaption(LONG, (Words(LONG, False),)),
    "one word": PredictedCaption("x" * 200, (Words("x" * 200),)),
    "Chinese": PredictedCaption("一只" * 60, tuple(Words("一只", [None, False][i % 2]) for i in range(60))),
    "blanks": PredictedCaption(" ", (Words(" ", True),) * 40),
    "nothing": PredictedCaption("", ()),
}


@pytest.mark.parametrize("name", list(CAPTIONS))
def test_nothing_is_drawn_beside_the_panel(tmp_path: Path, name: str) -> None:
    caption = CAPTIONS[name]
    pictures = {column: torch.zeros((3, 8, 8), dtype=torch.uint8) for column in ("original", "hidden")}
    row = MaskedRow(pictures, {"zh": caption, "en": caption})
    path = tmp_path / "页 1.png"
    draw_masked_page(path, [row], title="title", subtitle=f"run {'名' * 90}", note=LONG)
    pixels = np.asarray(Image.open(path))
    margin = pixels[:, -round(36 * SCALE) :]
    assert (margin == margin[0, 0]).all()
    panel = pixels[round(160 * SCALE) : -round(60 * SCALE), -round(60 * SCALE) : -round(46 * SCALE)]
    assert (panel == 255).all(), "the padding of the panel"
