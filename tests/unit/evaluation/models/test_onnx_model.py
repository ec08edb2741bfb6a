"""Models by their graphs: the features of torch, the fingerprint of the weights, and what is refused."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from m2_encoder import CheckpointError, UserError
from m2_encoder.evaluation.encode import encode_images, encode_texts
from m2_encoder.evaluation.models.base import EvaluatedModel
from m2_encoder.evaluation.models.onnx_model import open_graphs
from m2_encoder.picture_search.model import open_search_model
from tests.support.graphs import small_graphs, write_graphs

TEXTS = ["一只猫", "a dog on the beach, seen from afar", "红色的水果 " * 40, "", "😀\n\n"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_graphs(tmp_path_factory)


@pytest.fixture(scope="module")
def by_torch(folder: Path) -> EvaluatedModel:
    return open_search_model(folder).encoder


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def edit(path: Path, **metadata: str | None) -> None:
    """Sets or removes entries of a graph's metadata."""
    import onnx

    graph = onnx.load(path)
    kept = {entry.key: entry.value for entry in graph.metadata_props} | metadata
    del graph.metadata_props[:]
    onnx.helper.set_model_props(graph, {key: value for key, value in kept.items() if value is not None})
    onnx.save(graph, path)


def entry_of(path: Path, key: str) -> str:
    """Of a graph's metadata."""
    import onnx

    return next(str(entry.value) for entry in onnx.load(path).metadata_props if entry.key == key)


def gap(one: EvaluatedModel, other: EvaluatedModel) -> float:
    """Smallest cosine of a feature by one model to that by the other."""
    pictures = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8))
    cosines = []
    for each in (one, other):
        assert each.model is not None
        cosines.append(
            torch.cat([encode_images(each.model, pictures), encode_texts(each.model, TEXTS, each.tokenizer)]).double()
        )
    return float(torch.nn.functional.cosine_similarity(*cosines).min())


def test_features_and_fingerprint_are_those_of_torch(folder: Path, by_torch: EvaluatedModel) -> None:
    graphs = open_graphs(folder, name="small")
    assert gap(graphs, by_torch) >= 0.99999
    assert graphs.fingerprint == by_torch.fingerprint
    assert graphs.preprocess(np.zeros((5, 9, 3), dtype=np.uint8)).dtype == torch.uint8
    facts = graphs.facts
    assert (facts.embed_dim, facts.image_size, facts.context_length) == (16, 32, 24)
    assert facts.weight_bytes == sum(path.stat().st_size for path in (folder / "onnx").iterdir())


@pytest.mark.parametrize(("dtype", "least"), [("float16", 0.9999), pytest.param("int8", 0.95, marks=pytest.mark.slow)])
def test_graphs_of_fewer_bits(by_torch: EvaluatedModel, tmp_path: Path, dtype: str, least: float) -> None:
    write_graphs(tmp_path / "small", dtype=dtype)
    graphs = open_graphs(tmp_path / "small", name="small")
    assert gap(graphs, by_torch) >= least
    assert graphs.fingerprint == by_torch.fingerprint


def test_graphs_and_a_tokenizer_are_enough(copied: Path, by_torch: EvaluatedModel, tmp_path: Path) -> None:
    (copied / "model.safetensors").unlink()
    (copied / "config.json").unlink()
    (copied / "tokenizer.model").rename(tmp_path / "sp.model")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: no such file.*, or add tokenizer=FILE"):
        open_graphs(copied, name="small")
    assert gap(open_graphs(copied, name="small", tokenizer=tmp_path / "sp.model"), by_torch) >= 0.99999


def test_folders_without_graphs_say_what_writes_them(copied: Path) -> None:
    (copied / "onnx" / "text_model.onnx").unlink()
    said = rf"onnx/text_model\.onnx missing; write them with m2-export model={copied} 'to=\[native,onnx\]' output=NEW"
    with pytest.raises(CheckpointError, match=said):
        open_graphs(copied, name="small")
    shutil.rmtree(copied / "onnx")
    with pytest.raises(CheckpointError, match=r"onnx/vision_model\.onnx and onnx/text_model\.onnx missing"):
        open_graphs(copied, name="small")


def test_graphs_of_two_models(copied: Path) -> None:
    edit(copied / "onnx" / "text_model.onnx", fingerprint="0" * 64)
    with pytest.raises(CheckpointError, match=r"and text_model\.onnx are of two models \(fingerprint"):
        open_graphs(copied, name="small")


def test_graphs_that_do_not_say_whose_they_are(copied: Path) -> None:
    edit(copied / "onnx" / "vision_model.onnx", fingerprint=None)
    with pytest.raises(CheckpointError, match="do not say which model they are of; write it again with m2-export"):
        open_graphs(copied, name="small")


@pytest.mark.parametrize("entry", ["preprocess", "tokenizer", "feature_dim"])
@pytest.mark.parametrize("value", ["{", "[]", '{"image_size": "x"}', "{}"])
def test_damaged_metadata(copied: Path, entry: str, value: str) -> None:
    for name in ("vision_model", "text_model"):
        edit(copied / "onnx" / f"{name}.onnx", **{entry: value})
    with pytest.raises(CheckpointError, match="metadata are damaged"):
        open_graphs(copied, name="small")


def test_a_damaged_graph(copied: Path) -> None:
    path = copied / "onnx" / "text_model.onnx"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"text_model\.onnx: ONNX Runtime cannot open it"):
        open_graphs(copied, name="small")


def test_another_tokenizer(copied: Path) -> None:
    for name in ("vision_model", "text_model"):
        path = copied / "onnx" / f"{name}.onnx"
        edit(path, tokenizer=entry_of(path, "tokenizer").replace('"tokenizer_sha256": "', '"tokenizer_sha256": "0'))
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is not the tokenizer of the graphs"):
        open_graphs(copied, name="small")


def test_without_onnx_runtime(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    with pytest.raises(UserError, match=r"onnxruntime; install it with pip install 'm2-encoder\[export\]'"):
        open_graphs(folder, name="small")
