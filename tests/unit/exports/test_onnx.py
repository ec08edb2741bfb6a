from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m2_encoder import M2EncoderConfig
from m2_encoder.exports.base import ExportSource
from m2_encoder.exports.onnx_format import Onnx
from m2_encoder.exports.writing import write_export
from m2_encoder.models.config import NAME_TO_CONFIG
from tests.support.models import plain_of, random_images
from tests.unit.exports.conftest import Exported

TEXTS = ["一只猫", "a cat in the rain", "", "red<|endoftext|>apple"]


def _run(folder: Path, name: str, values: np.ndarray[Any, Any]) -> torch.Tensor:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra export")
    session = onnxruntime.InferenceSession(str(folder / "onnx" / name), providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    return torch.from_numpy(session.run(None, {entry.name: values})[0])


@pytest.mark.parametrize("number", [1, 2, 5])
def test_image_graph_gives_the_plain_encoder_s_features(exported: Exported, source: ExportSource, number: int) -> None:
    images = random_images(source.model.config, number)
    features = _run(exported.folder, "vision_model.onnx", images.numpy())
    torch.testing.assert_close(features, plain_of(source.model).image(images).cls_vlffn_feats, atol=1e-5, rtol=0)


@pytest.mark.parametrize("padded_to", [None, 14])
def test_text_graph_derives_the_mask(exported: Exported, source: ExportSource, padded_to: int | None) -> None:
    """Padding has the id of the end token, and a text may have that inside."""
    ids, mask = source.tokenizer(TEXTS)
    assert (ids[3, 1:-1] == source.tokenizer.end_id).any(), "the last text has an end token inside"
    more = 0 if padded_to is None else padded_to - ids.shape[1]
    padded = torch.nn.functional.pad(ids, (0, more), value=source.tokenizer.end_id)
    expected = plain_of(source.model).text(ids, mask).cls_vlffn_feats
    features = _run(exported.folder, "text_model.onnx", padded.numpy())
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
    for row in range(len(TEXTS)):
        alone = _run(exported.folder, "text_model.onnx", ids[row : row + 1, mask[row]].numpy())
        torch.testing.assert_close(alone[0], expected[row], atol=1e-5, rtol=0)


def test_texts_beyond_the_context_are_refused(exported: Exported, source: ExportSource) -> None:
    with pytest.raises(Exception, match=r"(?i)broadcast|axis|dimension"):
        _run(exported.folder, "text_model.onnx", np.full((1, 15), source.tokenizer.end_id))


def test_metadata_say_how_pictures_and_texts_are_read(exported: Exported, source: ExportSource) -> None:
    onnx = pytest.importorskip("onnx", reason="needs the extra export")
    for name in ("vision_model", "text_model"):
        model = onnx.load(exported.folder / "onnx" / f"{name}.onnx")
        onnx.checker.check_model(model)
        facts = {entry.key: entry.value for entry in model.metadata_props}
        assert json.loads(facts["preprocess"])["image_size"] == 16
        assert json.loads(facts["preprocess"])["pictures"] == source.loaded.preprocess.pictures.to_dict()
        text = json.loads(facts["tokenizer"])
        assert text["pad_id"] == source.tokenizer.end_id
        assert text["context_length"] == 14
        assert facts["feature_dim"] == "12"


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("m2-encoder-0.4b", {}, ""),
        ("m2-encoder-1b", {}, ""),
        ("m2-encoder-10b", {"dtype": "float16"}, "external_data"),
        ("m2-encoder-10b", {"external_data": True}, ""),
        ("tiny", {"context_length": 127}, "context_length"),
        ("tiny", {"context_length": 126}, ""),
    ],
)
def test_what_does_not_fit_is_known_before(name: str, settings: dict[str, Any], named: str) -> None:
    pytest.importorskip("onnxscript", reason="needs the extra export")
    problems = [*Onnx(**settings).problems(NAME_TO_CONFIG[name])]
    assert [problem.key for problem in problems] == ([named] if named else [])


@pytest.mark.slow
def test_half_precision_and_weights_beside_the_graph(source: ExportSource, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs the extra export")
    formats = {
        "half": Onnx(dtype="float16", context_length=8),
        "beside": Onnx(external_data=True),
    }
    parity = write_export(tmp_path / "out", source=source, formats=formats)
    half, beside = parity.results
    assert half.measured.smallest_cosine >= 0.9999
    assert beside.measured.smallest_cosine >= 0.99999
    assert {"onnx/text_model_fp16.onnx", "onnx/vision_model_fp16.onnx"} == half.files.keys()
    assert {f"onnx/{name}.onnx{end}" for name in ("text_model", "vision_model") for end in ("", ".data")} == {
        *beside.files
    }
    assert source.model.text_proj.weight.dtype == torch.float32, "the source is as it was"


def test_sizes_are_counted_without_the_other_tower() -> None:
    from m2_encoder.exports.graphs import graph_bytes

    sizes = graph_bytes(M2EncoderConfig.from_name("m2-encoder-0.4b"), bytes_per_value=4)
    assert 340e6 < sizes["image"] < 350e6
    assert 690e6 < sizes["text"] < 710e6
