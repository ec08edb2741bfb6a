"""A small model with the built-in tokenizer, written once in all formats."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from m2_encoder.checkpoints.export import export_model
from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.exports.base import ExportSource
from m2_encoder.exports.immich import Immich
from m2_encoder.exports.native import Native
from m2_encoder.exports.onnx_format import Onnx
from m2_encoder.exports.parity import Parity
from m2_encoder.exports.writing import write_export
from m2_encoder.hub import LoadedModel
from m2_encoder.pictures import STANDARD
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from tests.support.models import random_model, small_config

CARD = "# A small model\n\nRandom.\n"


class Exported(NamedTuple):
    folder: Path
    parity: Parity


@pytest.fixture(scope="session")
def source() -> ExportSource:
    torch.manual_seed(0)
    tokenizer = SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=14)
    model = random_model(small_config(vocab_size=tokenizer.vocab_size)).requires_grad_(False)
    write = partial(export_model, model=model, tokenizer=tokenizer, pictures=STANDARD)
    return ExportSource(LoadedModel(model, EvalTransform(16, pictures=STANDARD), tokenizer), CARD, write)


@pytest.fixture(scope="session")
def exported(source: ExportSource, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    for name in ("onnx", "onnxscript", "onnxruntime", "tokenizers"):
        pytest.importorskip(name, reason="needs the extra export")
    folder = tmp_path_factory.mktemp("exports") / "all"
    formats = {"native": Native(), "onnx": Onnx(), "immich": Immich(), "immich_v2": Immich(revision="v2")}
    with pytest.MonkeyPatch.context() as patch:
        # As if weights were above 1.5 GB, from where on torch would write a second file of its own accord.
        patch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1)
        return Exported(folder, write_export(folder, source=source, formats=formats))
