"""What immich does with the folder of a model, written again from the layout that it documents."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from m2_encoder import load
from m2_encoder.exports.base import ExportSource
from m2_encoder.exports.immich import LISTED, Immich, listed_width
from m2_encoder.exports.samples import make_pictures
from tests.support.models import small_config
from tests.unit.exports.conftest import Exported

Features = npt.NDArray[np.float32]
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC}


class ImmichModel:
    """Loads a folder of immich's cache, and answers one request at a time."""

    def __init__(self, cache: Path, name: str) -> None:
        onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra export")
        tokenizers = pytest.importorskip("tokenizers", reason="needs the extra export")
        folder = cache / "clip" / name
        self.sessions = {
            part: onnxruntime.InferenceSession(str(folder / part / "model.onnx"), providers=["CPUExecutionProvider"])
            for part in ("textual", "visual")
        }
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = config["text_cfg"]
        self.canonicalize = text.get("tokenizer_kwargs", {}).get("clean") == "canonicalize"
        self.length = text.get("context_length", 77)
        pad = json.loads((folder / "textual" / "tokenizer_config.json").read_text(encoding="utf-8"))["pad_token"]
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "textual" / "tokenizer.json"))
        self.tokenizer.enable_padding(length=self.length, pad_token=pad, pad_id=self.tokenizer.token_to_id(pad))
        self.tokenizer.enable_truncation(max_length=self.length)
        self.preprocess = json.loads((folder / "visual" / "preprocess_cfg.json").read_text(encoding="utf-8"))

    def text(self, text: str) -> Features:
        assert not self.canonicalize
        ids = self.tokenizer.encode(" ".join(text.split())).ids
        return self._run("textual", {"text": np.array([ids], dtype=np.int32)})

    def image(self, content: bytes) -> Features:
        settings = self.preprocess
        assert settings["resize_mode"] == "squash"
        image = Image.open(io.BytesIO(content)).convert(settings["mode"])
        image = image.resize(tuple(settings["size"]), RESAMPLING[settings["interpolation"]])
        pixels = np.asarray(image, dtype=np.float32) / 255.0
        pixels = (pixels - np.float32(settings["mean"])) / np.float32(settings["std"])
        return self._run("visual", {"image": np.expand_dims(pixels.transpose(2, 0, 1), 0)})

    def _run(self, part: str, inputs: dict[str, Any]) -> Features:
        features: Features = self.sessions[part].run(None, inputs)[0][0]
        assert features.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(features), 1, atol=1e-5)
        return features


@pytest.fixture(scope="module")
def immich(exported: Exported) -> ImmichModel:
    return ImmichModel(exported.folder, "ViT-B-32__openai")


def _cosine(wide: Features, ours: torch.Tensor) -> float:
    assert wide.shape == (512,)
    assert not wide[len(ours) :].any(), "zeros behind, so that cosines stay"
    return float(torch.from_numpy(wide[: len(ours)]) @ ours)


@pytest.mark.parametrize(
    "text",
    [
        "红色的水果",
        "a red  apple\n\non   the\ttable",
        "",
        "   ",
        "一只cat\r\n和一只dog",
        "猫" * 500,
        "many words " * 60,
    ],
)
def test_texts_give_the_features_of_load(immich: ImmichModel, exported: Exported, text: str) -> None:
    model, _, tokenizer = load(exported.folder)
    (ours,) = model.encode_text(tokenizer([text]))
    assert _cosine(immich.text(text), ours) >= 0.9999


def test_pictures_give_the_features_of_load(immich: ImmichModel, exported: Exported) -> None:
    """immich drops alpha; what it sends is a JPEG of its own, upright, so that nothing else is left to choose."""
    model, preprocess, _ = load(exported.folder, pictures="official")
    names = ("quality-40.jpg", "grey.jpg", "rgb-1200x100.png", "alpha-200x300.png", "palette.png")
    pictures = {picture.name: picture.content for picture in make_pictures()}
    for name in names:
        (ours,) = model.encode_image(preprocess(pictures[name]).unsqueeze(0))
        assert _cosine(immich.image(pictures[name]), ours) >= 0.9999, name


def test_the_card_says_what_older_versions_do(exported: Exported) -> None:
    card = (exported.folder / "README.md").read_text(encoding="utf-8")
    assert "before mid-2026 crop instead of squashing" in card
    assert "clip/ViT-B-32__openai" in card
    found = json.loads((exported.folder / "parity.json").read_text(encoding="utf-8"))["formats"]["immich"]
    assert found["smallest_cosine"] >= 0.99999


def test_graphs_are_made_once_for_all_formats(exported: Exported) -> None:
    onnx = pytest.importorskip("onnx", reason="needs the extra export")
    theirs = onnx.load(exported.folder / "clip" / "ViT-B-32__openai" / "textual" / "model.onnx")
    ours = onnx.load(exported.folder / "onnx" / "text_model.onnx")
    weights = {each.name: each.raw_data for each in theirs.graph.initializer}
    assert all(weights[each.name] == each.raw_data for each in ours.graph.initializer)
    (entry,) = theirs.graph.input
    assert [each.dim_value for each in entry.type.tensor_type.shape.dim] == [0, 1024]


def test_names_are_those_of_models_as_wide(source: ExportSource) -> None:
    assert [listed_width(width) for width in (12, 512, 513, 768, 1024)] == [512, 512, 768, 768, 1024]
    assert LISTED[768] == "ViT-L-14__openai"
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    pytest.importorskip("tokenizers", reason="needs the extra export")
    assert [each.rule for each in Immich().problems(small_config(feature_dim=1025))] == [
        "features of 1025 numbers are wider than those of any model that immich lists"
    ]
    assert not [*Immich().problems(source.model.config)]


def test_a_revision_is_a_folder_below_the_name(exported: Exported, source: ExportSource, tmp_path: Path) -> None:
    """Versions from 3.3 on look there; they fix the batch by its name and keep an optimised copy of the graph."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra export")
    (result,) = (each for each in exported.parity.results if each.name == "immich_v2")
    assert all(name.startswith("clip/ViT-B-32__openai/v2/") for name in result.files)
    pinned = ImmichModel(exported.folder, "ViT-B-32__openai/v2")
    (ours,) = source.text_features(["红色的水果"])
    assert _cosine(pinned.text("红色的水果"), ours) >= 0.9999
    options = onnxruntime.SessionOptions()
    options.add_free_dimension_override_by_name("batch", 1)
    options.optimized_model_filepath = str(tmp_path / "model.onnx")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "model.data")
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    path = exported.folder / "clip" / "ViT-B-32__openai" / "v2" / "textual" / "model.onnx"
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    pinned.sessions["textual"] = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    assert _cosine(pinned.text("红色的水果"), ours) >= 0.9999
    card = (exported.folder / "README.md").read_text(encoding="utf-8")
    assert "`/cache/clip/ViT-B-32__openai/v2`" in card
    assert "MACHINE_LEARNING_MODEL_REVISION=v2" in card


@pytest.mark.parametrize(("revision", "is_wrong"), [("main", False), ("v2", False), ("../v2", True), (".hidden", True)])
def test_a_revision_is_the_name_of_one_folder(source: ExportSource, revision: str, is_wrong: bool) -> None:
    pytest.importorskip("onnxscript", reason="needs the extra export")
    keys = [each.key for each in Immich(revision=revision).problems(source.model.config)]
    assert keys == (["revision"] if is_wrong else [])
