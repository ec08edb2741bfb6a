"""Weights in several files with an index, and the folders that people give in place of a file."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from m2_encoder import CheckpointError, M2Encoder
from m2_encoder.checkpoints.io import load_model, read_state, save_safetensors
from tests.support.models import random_model, small_config

CONFIG = small_config(num_layers=1, num_vl_layers=1)
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def model() -> M2Encoder:
    torch.manual_seed(7)
    return random_model(CONFIG)


def write_parts(folder: Path, model: M2Encoder, *, suffix: str = "safetensors") -> Path:
    """Three files and their index, as transformers writes them."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    state = model.state_dict()
    names = list(state)
    places: dict[str, str] = {}
    folder.mkdir(exist_ok=True)
    for number in range(3):
        file = f"{stem}-{number + 1:05d}-of-00003.{suffix}"
        part: dict[str, Tensor] = {f"module.{name}": state[name].clone() for name in names[number::3]}
        places |= dict.fromkeys(part, file)
        if suffix == "safetensors":
            safetensors.torch.save_file(part, folder / file)
        else:
            torch.save(part, folder / file)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(CONFIG, path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_index_and_its_files(model: M2Encoder, tmp_path: Path, suffix: str) -> None:
    index = write_parts(tmp_path / "m", model, suffix=suffix)
    for path in (index, tmp_path / "m"):
        found = load_model(CONFIG, path).state_dict()
        assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    first = next(path for path in sorted((tmp_path / "m").iterdir()) if "00001" in path.name)
    assert refused(first).endswith(f"; it is one file of several: give {index.name}, which names them all")


def test_an_index_that_cannot_be_followed(model: M2Encoder, tmp_path: Path) -> None:
    index = write_parts(tmp_path, model)
    content = json.loads(index.read_text())
    second = tmp_path / "model-00002-of-00003.safetensors"
    kept = second.read_bytes()
    second.unlink()
    assert f"{second.name} of its 3 files missing in {tmp_path}" in refused(index)
    second.write_bytes(kept)
    for change, word in (
        ({**content["weight_map"], "more": second.name}, "lacks more"),
        ({n: f for n, f in content["weight_map"].items() if n != "module.logit_scale"}, "holds more"),
        ({**content["weight_map"], "more": "../secret.safetensors"}, "no file beside it"),
        ({}, "without weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": change}))
        assert word in refused(index)
    index.write_text(json.dumps({"weight_map": {"a": index.name}}))
    assert "is an index" in refused(index)


def test_an_index_is_a_small_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / INDEX)
    assert "no regular file" in refused(tmp_path / INDEX)
    (tmp_path / "zero").symlink_to("/dev/zero")
    assert "no regular file" in refused(tmp_path / "zero")
    (tmp_path / "deep").write_text('{"a":' * 100_000)
    assert "not readable as JSON" in refused(tmp_path / "deep")


def test_folders_of_exports_and_runs(model: M2Encoder, tmp_path: Path) -> None:
    save_safetensors(model, tmp_path / "model.safetensors")
    assert torch.equal(read_state(tmp_path)["logit_scale"], model.logit_scale)
    run = tmp_path / "run"
    (run / "export").mkdir(parents=True)
    shutil.copy(tmp_path / "model.safetensors", run / "export")
    assert torch.equal(read_state(run)["logit_scale"], model.logit_scale)
    (run / "checkpoints").mkdir()
    state = {f"model.{name}": value + 1 for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "global_step": 4}, run / "checkpoints" / "step=4.ckpt")
    assert torch.equal(read_state(run)["logit_scale"], model.logit_scale + 1)
    (tmp_path / "empty").mkdir()
    assert "is a folder without weights" in refused(tmp_path / "empty")
