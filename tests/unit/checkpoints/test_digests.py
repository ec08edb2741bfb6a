"""A flipped bit is found, in what we write and in what torch writes; files without a digest are read as before."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from m2_encoder import CheckpointError, M2Encoder, load
from m2_encoder.checkpoints.digests import DIGEST_KEY, check_zip, digest_tensors
from m2_encoder.checkpoints.export import export_model
from m2_encoder.checkpoints.io import load_model
from tests.support.models import random_model, small_config
from tests.support.training import make_tokenizer, tiny_config

CONFIG = small_config(num_layers=1, num_vl_layers=1)


@pytest.fixture(scope="module")
def model() -> M2Encoder:
    torch.manual_seed(8)
    return random_model(CONFIG)


def flip(path: Path, where: float) -> None:
    """The lowest bit of one byte, at a share of the file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("where", [0.4, 0.7, 0.999])
def test_a_flipped_bit_in_an_export(tmp_path: Path, where: float) -> None:
    export_model(tmp_path / "e", model=M2Encoder(tiny_config()), tokenizer=make_tokenizer())
    load(tmp_path / "e")
    flip(tmp_path / "e" / "model.safetensors", where)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged: .* SHA-256 [0-9a-f]{64}, [0-9a-f]{64} "):
        load(tmp_path / "e")


def test_a_file_without_a_digest(model: M2Encoder, tmp_path: Path) -> None:
    safetensors.torch.save_file(model.state_dict(), tmp_path / "x.safetensors", metadata={"format": "pt"})
    flip(tmp_path / "x.safetensors", 0.999)
    load_model(CONFIG, tmp_path / "x.safetensors")


@pytest.mark.parametrize("optimizer", [False, True], ids=["weights", "training"])
def test_a_flipped_bit_in_a_checkpoint(model: M2Encoder, tmp_path: Path, optimizer: bool) -> None:
    path = tmp_path / "x.ckpt"
    more = {"optimizer_states": [{"exp_avg": torch.ones(200_000)}]} if optimizer else {}
    torch.save({"state_dict": model.state_dict(), **more}, path)
    load_model(CONFIG, path)
    flip(path, 0.5)
    with pytest.raises(CheckpointError, match=r"x\.ckpt: damaged \(Bad CRC-32 for file"):
        load_model(CONFIG, path)


def test_a_zip_whose_checksums_were_not_computed(model: M2Encoder, tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(model.state_dict(), tmp_path / "x.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(tmp_path / "x.ckpt") as archive:
        assert not any(record.CRC for record in archive.infolist())
    check_zip(tmp_path / "x.ckpt")
    load_model(CONFIG, tmp_path / "x.ckpt")


def test_the_digest_covers_names_shapes_and_types_but_no_order() -> None:
    tensors = {"a": torch.arange(4.0), "b": torch.tensor(1, dtype=torch.int64), "c": torch.empty(0)}
    expected = digest_tensors(tensors)
    assert digest_tensors(dict(reversed(tensors.items()))) == expected
    for change in ({"a": torch.arange(4.0).reshape(2, 2)}, {"b": torch.tensor(1.0)}, {"d": torch.empty(0)}):
        assert digest_tensors({**tensors, **change}) != expected
    assert DIGEST_KEY == "tensors_sha256"
