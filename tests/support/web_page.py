"""A page without a server: of a small random model and a folder of pictures."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from m2_encoder.checkpoints.export import export_model
from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.exports.base import ExportSource
from m2_encoder.exports.parity import Parity
from m2_encoder.exports.web_format import Web
from m2_encoder.exports.web_runtime import PACKAGE, runtime_folder, runtime_rule
from m2_encoder.exports.writing import write_export
from m2_encoder.hub import LoadedModel
from m2_encoder.picture_search.index import PictureIndex, open_index
from m2_encoder.picture_search.model import SearchModel, open_search_model
from m2_encoder.picture_search.update import update_index
from m2_encoder.pictures import STANDARD
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from tests.support.models import random_model, small_config

NUMBER = 150


class WebPage(NamedTuple):
    home: Path  # of index.html
    parity: Parity
    source: ExportSource
    index: PictureIndex  # of the same pictures, by the exported model
    model: SearchModel


def need_web() -> None:
    """Skips a test where a page cannot be written."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="needs the extra export")
    if runtime_rule(runtime_folder()):
        pytest.skip(f"needs {PACKAGE}: python -m m2_encoder.exports.web_runtime")


def web_source(context_length: int = 14) -> ExportSource:
    """A model of a few thousand parameters with the built-in tokenizer."""
    torch.manual_seed(0)
    tokenizer = SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=context_length)
    model = random_model(small_config(vocab_size=tokenizer.vocab_size)).requires_grad_(False)
    write = partial(export_model, model=model, tokenizer=tokenizer, pictures=STANDARD)
    return ExportSource(LoadedModel(model, EvalTransform(16, pictures=STANDARD), tokenizer), "# Small\n", write)


def write_web_page(folder: Path) -> WebPage:
    """The page, and an index with which to compare it."""
    photos, rng = folder / "photos", np.random.default_rng(0)
    for number in range(NUMBER):
        path = photos / ("海 & beach" if number % 2 else "town") / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((400, 200)).save(path)
    (photos / "broken.png").write_bytes(b"broken")
    source = web_source()
    source.write_native(folder / "native")
    model = open_search_model(folder / "native")
    update_index(folder / "photos.index", photos, model)
    web = Web(pictures=str(folder / "photos.index"))
    parity = write_export(folder / "export", source=source, formats={"web": web})
    return WebPage(folder / "export" / "web", parity, source, open_index(folder / "photos.index"), model)
