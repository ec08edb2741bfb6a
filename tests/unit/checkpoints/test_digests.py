"""A flipped bit is found, in what we write and in what torch writes; files without a digest are read as before."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from m2_encoder import CheckpointError, M2Encoder, load
from m2_encoder.checkpoints.digests import DIGEST_KEY, check_zip, digest_tensors
from m2_encoder.checkpoints.export import export_model
from m2_encoder.checkpoints.io import load_model
from m2_encoder.errors import UserError
from tests.support.damage import flip
from tests.support.models import random_model, small_config
from tests.support.training import make_tokenizer, tiny_config

CONFIG = small_config(num_layers=1, num_vl_layers=1)


@pytest.fixture(scope="module")
def model() -> M2Encoder:
    torch.manual_seed(8)
    return random_model(CONFIG)


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    state = random_model(CONFIG).state_dict()
    state["text_proj.weight"][2, 3] = value
    torch.save(state, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"x\.ckpt: text_proj\.weight holds values that are NaN or infinite"):
        load_model(CONFIG, tmp_path / "x.ckpt")
    broken = M2Encoder(tiny_config())
    with torch.no_grad():
        broken.norm.bias.fill_(value)
    with pytest.raises(UserError, match=r"cannot export the model: norm\.bias holds values that are NaN or infinite"):
        export_model(tmp_path / "e", model=broken, tokenizer=make_tokenizer())
    assert not (tmp_path / "e").exists()


def test_a_full_disk_at_an_export_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object, **__: object) -> None:
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", fill)
    with pytest.raises(CheckpointError, match=r"cannot write .*No space left on device") as caught:
        export_model(tmp_path / "e", model=M2Encoder(tiny_config()), tokenizer=make_tokenizer())
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("field", "value"), [("embed_dim", 10**12), ("num_layers", 10**9), ("vocab_size", 2**62)])
def test_absurd_sizes_are_refused_before_they_are_built(tmp_path: Path, field: str, value: int) -> None:
    export_model(tmp_path / "e", model=M2Encoder(tiny_config()), tokenizer=make_tokenizer())
    path = tmp_path / "e" / "config.json"
    content = json.loads(path.read_text())
    content["model"][field] = value
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"damaged or edited .*{field}={value}"):
        load(tmp_path / "e")


@pytest.mark.parametrize("kind", ["fifo", "endless"])
def test_a_configuration_that_never_ends_is_refused(tmp_path: Path, kind: str) -> None:
    export_model(tmp_path / "e", model=M2Encoder(tiny_config()), tokenizer=make_tokenizer())
    path = tmp_path / "e" / "config.json"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError):
        load(tmp_path / "e")
