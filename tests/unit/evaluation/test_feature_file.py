"""Both formats hold what was written, or nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from m2_encoder.errors import UserError
from m2_encoder.evaluation.feature_file import check_feature_path, open_feature_file, read_features

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@pytest.mark.parametrize("suffix", [".safetensors", ".parquet"])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(st.lists(NAMES, min_size=1, max_size=5), max_size=5), width=st.integers(1, 5))
def test_round_trip(tmp_path: Path, suffix: str, batches: list[list[str]], width: int) -> None:
    path = tmp_path / f"f{suffix}"
    names = [name for batch in batches for name in batch]
    features, places = torch.randn(len(names), width), torch.arange(len(names)) * 3
    with open_feature_file(path, feature_dim=width, provenance={"模型": "m"}, overwrite=True) as add:
        start = 0
        for batch in batches:
            rows = slice(start, start + len(batch))
            add(places[rows], batch, features[rows])
            start += len(batch)
    found = read_features(path)
    assert torch.equal(found.features, features)
    assert found.features.dtype == torch.float32
    assert found.names == tuple(names)
    assert torch.equal(found.places, places)
    assert found.provenance == {"模型": "m"}
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_safetensors_is_readable_by_its_own_library(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    with open_feature_file(path, feature_dim=3, provenance={}) as add:
        add(torch.tensor([4]), ["a"], torch.tensor([[1.0, 2.0, 3.0]]))
    tensors = load_file(path)
    assert tensors["features"].tolist() == [[1, 2, 3]]
    assert tensors["index"].tolist() == [4]


def test_parquet_columns(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "f.parquet"
    with open_feature_file(path, feature_dim=2, provenance={}) as add:
        for start in range(0, 20_000, 5_000):  # more than one row group
            rows = torch.arange(start, start + 5_000)
            add(rows, [str(n) for n in rows.tolist()], rows[:, None].expand(-1, 2).float())
    table = parquet.read_table(path)
    assert {field.name: str(field.type) for field in table.schema}["feature"].startswith("fixed_size_list<")
    assert table.column("name")[19_999].as_py() == "19999"
    assert table.column("feature")[12_345].as_py() == [12_345, 12_345]


@pytest.mark.parametrize("suffix", [".safetensors", ".parquet"])
def test_interrupted_file_does_not_appear(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"f{suffix}"
    path.write_text("before")

    def interrupted() -> None:
        with open_feature_file(path, feature_dim=1, provenance={}, overwrite=True) as add:
            add(torch.tensor([0]), ["a"], torch.ones(1, 1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


def test_paths_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "there.safetensors"
    there.touch()
    assert "overwrite=true" in check_feature_path(there, overwrite=False)[0]
    assert check_feature_path(there, overwrite=True) == []
    assert ".safetensors or .parquet" in check_feature_path(tmp_path / "f.csv", overwrite=False)[0]
    assert "is a folder" in check_feature_path(tmp_path, overwrite=True)[1]
    assert "no folder that you may write" in check_feature_path(there / "f.parquet", overwrite=False)[0]
    monkeypatch.setattr("m2_encoder.evaluation.feature_file.find_spec", lambda name: None)
    assert "pip install 'm2-encoder[parquet]'" in check_feature_path(tmp_path / "f.parquet", overwrite=False)[0]
    with pytest.raises(UserError, match="overwrite=true"), open_feature_file(there, feature_dim=1, provenance={}):
        pass


@pytest.mark.parametrize("suffix", [".safetensors", ".parquet"])
@pytest.mark.parametrize("content", [b"", b"hello", b"PAR1" + bytes(40) + b"PAR1", bytes(100)])
def test_foreign_files_are_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"f{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match="no file of features that m2-embed wrote"):
        read_features(path)


def test_missing_files_and_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_features(tmp_path / "f.parquet")
    with pytest.raises(UserError, match="must end in"):
        read_features(tmp_path / "f.npy")


def test_wrong_width_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"\(1, 2\), expected \(B, 3\)"),
        open_feature_file(tmp_path / "f.safetensors", feature_dim=3, provenance={}) as add,
    ):
        add(torch.tensor([0]), ["a"], torch.ones(1, 2))


def test_reading_safetensors_needs_no_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "f.safetensors"
    with open_feature_file(path, feature_dim=1, provenance={}) as add:
        add(torch.tensor([0]), ["a"], torch.ones(1, 1))
    assert read_features(path).names == ("a",)
