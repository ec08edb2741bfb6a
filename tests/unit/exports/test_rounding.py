"""Weights of 8 bits, against tables rounded by NumPy and against the graphs' own tensors."""

from __future__ import annotations

import copy
import errno
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from m2_encoder.errors import UserError
from m2_encoder.exports.base import ExportSource, Features, Measured, compare
from m2_encoder.exports.graphs import Graphs, run_graphs
from m2_encoder.exports.onnx_format import Onnx
from m2_encoder.exports.parity import WARNING, FormatResult
from m2_encoder.exports.rounding import RoundedTable, round_matrices
from m2_encoder.exports.writing import write_export
from m2_encoder.models.config import NAME_TO_CONFIG
from m2_encoder.models.m2_encoder import M2Encoder


def _rounded(weight: torch.Tensor) -> torch.Tensor:
    values = weight.double().numpy()
    largest = np.abs(values).max(axis=1, keepdims=True)
    scales = np.where(largest > 0, largest / 127, 1)
    return torch.from_numpy(np.rint(values / scales) * scales).float()


def test_a_rounded_table_is_near_and_keeps_its_largest_numbers() -> None:
    torch.manual_seed(0)
    weight = torch.randn(50, 8) * torch.logspace(-6, 2, 50).unsqueeze(1)
    weight[7] = 0
    table = RoundedTable(weight)
    assert table.rows.dtype == torch.int8
    ids = torch.arange(50).reshape(5, 10)
    found = table(ids).reshape(50, 8)
    torch.testing.assert_close(found, _rounded(weight), rtol=1e-6, atol=0)
    assert (found - weight).abs().amax(1).le(weight.abs().amax(1) / 254 * 1.001).all()
    assert found[7].eq(0).all()


class Rounded(NamedTuple):
    folder: Path  # of graphs below "table" and "whole"
    table: Measured
    whole: Measured


@pytest.fixture(scope="module")
def rounded(source: ExportSource, tmp_path_factory: pytest.TempPathFactory) -> Rounded:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="needs the extra export")
    folder, found = tmp_path_factory.mktemp("rounded"), []
    for name, form in (("table", Onnx(token_table="int8")), ("whole", Onnx(dtype="int8"))):
        form.write(folder / name, source)
        found.append(form.measure(folder / name, source))
    return Rounded(folder, *found)


def test_a_text_graph_holds_its_table_in_8_bits(rounded: Rounded, source: ExportSource) -> None:
    _check_table(rounded.folder / "table" / "onnx" / "text_model.onnx", source.model.text_embed.tokens.weight)
    assert rounded.table.recall is not None
    assert 0.999 < rounded.table.smallest_cosine < 1
    assert [note.en for note in rounded.table.notes] == [
        f"{WARNING}{rounded.table.recall.silence}; the cosine decided alone"
    ]


@pytest.mark.slow
def test_a_graph_of_half_precision_does_so_too(source: ExportSource, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs the extra export")
    form = Onnx(dtype="float16", token_table="int8")
    write_export(tmp_path / "out", source=source, formats={"onnx": form})
    _check_table(tmp_path / "out" / form.text_file, source.model.text_embed.tokens.weight.half().float())


def _check_table(path: Path, weight: torch.Tensor) -> None:
    onnx = pytest.importorskip("onnx", reason="needs the extra export")
    tensors = onnx.load(path).graph.initializer
    (table,) = (each for each in tensors if list(each.dims) == [*weight.shape])
    assert table.data_type == onnx.TensorProto.INT8
    steps = weight.abs().amax(1, keepdim=True) / 127
    stored = torch.from_numpy(onnx.numpy_helper.to_array(table).copy()) * steps
    assert ((stored - weight).abs() <= 0.501 * steps).all()


def test_features_are_those_of_a_model_with_a_rounded_table(rounded: Rounded, source: ExportSource) -> None:
    texts = ["一只猫", "a cat in the rain", "", "苹果"]
    model: M2Encoder = copy.deepcopy(source.model)
    model.text_embed.tokens.weight.data = _rounded(model.text_embed.tokens.weight)
    with torch.inference_mode():
        expected = model.encode_text(source.tokenizer(texts))
    run = Onnx(token_table="int8")._run(rounded.folder / "table", source, source.pixels[:2], texts)
    assert compare(Features(source.image_features[:2], expected), run.features)[0] < 1e-5


def test_matrices_of_8_bits_are_written_with_a_warning(rounded: Rounded) -> None:
    onnx = pytest.importorskip("onnx", reason="needs the extra export")
    paths = sorted((rounded.folder / "whole" / "onnx").iterdir())
    assert [path.name for path in paths] == ["text_model_int8.onnx", "vision_model_int8.onnx"]
    for path in paths:
        model = onnx.load(path)
        assert "MatMulInteger" in {node.op_type for node in model.graph.node}
        floats = {each.name for each in model.graph.initializer if each.data_type == onnx.TensorProto.FLOAT}
        products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
        assert not [node.name for node in products if floats & {*node.input}], "of weights; others stay"
        assert {"preprocess", "tokenizer"} <= {entry.key for entry in model.metadata_props}
    assert rounded.whole.notes[0].en.startswith(f"{WARNING}all matrix products")
    assert 0.95 < rounded.whole.smallest_cosine < 0.999
    result = FormatResult("onnx", Onnx(dtype="int8").bound, rounded.whole, {}, "")
    assert result.rule.startswith("recall says nothing"), "the weights are random, and cosines too small to do without"


@pytest.mark.parametrize(
    ("name", "external_data", "named"),
    [("tiny", True, "external_data"), ("m2-encoder-10b", False, "dtype"), ("m2-encoder-1b", False, "")],
)
def test_what_cannot_be_rounded_is_known_before(name: str, external_data: bool, named: str) -> None:
    pytest.importorskip("onnxscript", reason="needs the extra export")
    problems = [*Onnx(dtype="int8", external_data=external_data).problems(NAME_TO_CONFIG[name])]
    assert [problem.key for problem in problems] == ([named] if named else [])


def test_a_disk_without_room_is_noticed_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quantiser itself goes on with half of a file."""
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    (tmp_path / "whole.onnx").write_bytes(bytes(100))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=199))
    with pytest.raises(OSError, match="No space left on device"):
        round_matrices(tmp_path / "whole.onnx", tmp_path / "small.onnx")


def test_a_full_folder_for_temporary_files_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match=r"cannot write samples to .*tmp.*No space left.*set TMPDIR"):
        run_graphs(Graphs(Path("a.onnx"), Path("b.onnx")), pixels=torch.zeros(1, 3, 4, 4), rows=[[1, 2]])
