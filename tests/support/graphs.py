"""The small model of `tests.support.serving` as an exported folder with graphs."""

from __future__ import annotations

from pathlib import Path

import pytest

from m2_encoder.checkpoints.export import export_model
from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.hub import LoadedModel
from m2_encoder.pictures import OFFICIAL
from tests.support.once import build_once
from tests.support.serving import small_encoder, small_tokenizer


def small_graphs(factory: pytest.TempPathFactory) -> Path:
    """Native files and graphs of 32 bits, read-only by agreement; made once, because the exporter takes seconds."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="needs the extra export")
    return build_once(factory, "small_graphs", write_graphs)


def write_graphs(folder: Path, dtype: str = "float32") -> None:
    """The same, at a path where nothing is."""
    from m2_encoder.exports.base import ExportSource
    from m2_encoder.exports.onnx_format import Onnx

    tokenizer = small_tokenizer()
    model = small_encoder(tokenizer).requires_grad_(False)

    def write_native(place: Path) -> None:
        export_model(place, model=model, tokenizer=tokenizer, pictures=OFFICIAL)

    loaded = LoadedModel(model, EvalTransform(32, pictures=OFFICIAL), tokenizer)
    source = ExportSource(loaded, "# Small\n", write_native)
    write_native(folder)
    Onnx(dtype=dtype).write(folder / "staged" / "onnx", source)
    (folder / "staged" / "onnx" / "onnx").rename(folder / "onnx")
