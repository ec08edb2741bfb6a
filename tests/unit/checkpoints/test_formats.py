"""Files that are no checkpoint, broken, or hostile: one line with the file's name, and nothing executed."""

from __future__ import annotations

import contextlib
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from m2_encoder import CheckpointError
from m2_encoder.checkpoints.formats import file_kind, read_safetensors
from m2_encoder.checkpoints.io import load_model, read_state
from tests.support.damage import Attack, hostile_safetensors, safetensors_entry
from tests.support.models import random_model, small_config

CONFIG = small_config()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The same weights as the content of a zip, of an old pickle, and of a safetensors file."""
    folder = tmp_path_factory.mktemp("good")
    state = random_model(CONFIG).state_dict()
    torch.save({"state_dict": state}, folder / "zip")
    torch.save({"state_dict": state}, folder / "pickle", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(state, folder / "safetensors")
    return {name: (folder / name).read_bytes() for name in ("zip", "pickle", "safetensors")}


def refuse(path: Path) -> str:
    """The message with which a file is refused."""
    with pytest.raises(CheckpointError) as caught:
        load_model(CONFIG, path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("kind", ["zip", "pickle", "safetensors"])
def test_kind_by_content(good: dict[str, bytes], tmp_path: Path, kind: str) -> None:
    path = tmp_path / "weights.txt"
    path.write_bytes(good[kind])
    assert file_kind(path) == kind
    assert len(read_state(path)) == len(random_model(CONFIG).state_dict())


# ------------------------------------------------------------------------------------------- not a checkpoint


def _image(path: Path) -> None:
    Image.new("RGB", (8, 8)).save(path, format="PNG")


def _zip_of_text(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "the file is empty"),
    "text": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1"), "not a checkpoint"),
    "short": (lambda p: p.write_bytes(b"hi"), "not a checkpoint"),
    "image": (_image, "not a checkpoint"),
    "json": (lambda p: p.write_text('{"a": 1}'), "not a checkpoint"),
    "another zip": (_zip_of_text, "damaged or not a checkpoint"),
    "zeros": (lambda p: p.write_bytes(bytes(1000)), "not a checkpoint"),
    "list": (lambda p: torch.save([torch.zeros(2)], p), "holds a list, expected a state dict"),
    "tensor": (lambda p: torch.save(torch.zeros(2), p), "holds a Tensor, expected a state dict"),
    "number": (lambda p: torch.save(3, p), "holds a int, expected a state dict"),
    "empty dict": (lambda p: torch.save({}, p), "holds no parameters"),
    "empty wrapper": (lambda p: torch.save({"state_dict": {}, "a": 1}, p), "its 'state_dict' is empty"),
    "other values": (
        lambda p: torch.save({"epoch": 3, "weights": torch.zeros(2)}, p),
        "it has int under 'epoch'",
    ),
    "nested": (
        lambda p: torch.save({"model": {"logit_scale": {"a": torch.zeros(2)}}}, p),
        "its 'model' has dict under 'logit_scale'",
    ),
    "numbers as names": (lambda p: torch.save({1: torch.zeros(2)}, p), "has Tensor under '1'"),
    "folder": (lambda p: p.mkdir(), "is a folder"),
    "missing": (lambda p: None, "no such checkpoint file"),
    "safetensors of nothing": (lambda p: safetensors.torch.save_file({}, p), "none of its 0 names"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_file(tmp_path: Path, kind: str) -> None:
    write, message = FOREIGN[kind]
    path = tmp_path / "weights.ckpt"
    write(path)
    assert message in refuse(path)


def test_name_that_no_file_can_have() -> None:
    with pytest.raises(CheckpointError, match="cannot read the checkpoint"):
        read_state("a\0b")


# ----------------------------------------------------------------------------------------------------- broken


@pytest.mark.parametrize("kind", ["zip", "pickle", "safetensors"])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.9999])
def test_truncated(good: dict[str, bytes], tmp_path: Path, kind: str, share: float) -> None:
    path = tmp_path / "weights.ckpt"
    path.write_bytes(good[kind][: max(12, int(len(good[kind]) * share))])
    assert "damaged" in refuse(path)


BROKEN_SAFETENSORS = {
    "huge header": hostile_safetensors(safetensors_entry(), bytes(8), size=2**62),
    "header beyond the file": hostile_safetensors(safetensors_entry(), size=10_000),
    "no JSON": hostile_safetensors(b"{" + b"x" * 20),
    "offsets beyond the file": hostile_safetensors(safetensors_entry(data_offsets=[0, 4000], shape=[1000]), bytes(8)),
    "offsets and shape differ": hostile_safetensors(safetensors_entry(shape=[3]), bytes(8)),
    "negative offsets": hostile_safetensors(safetensors_entry(data_offsets=[-8, 0]), bytes(8)),
    "overflowing shape": hostile_safetensors(safetensors_entry(shape=[2**62, 2**62]), bytes(8)),
    "trailing bytes": hostile_safetensors(safetensors_entry(), bytes(80)),
    "unknown dtype": hostile_safetensors(safetensors_entry(dtype="F7"), bytes(8)),
}


@pytest.mark.parametrize("kind", BROKEN_SAFETENSORS)
def test_broken_safetensors(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(BROKEN_SAFETENSORS[kind])
    assert "damaged or not a safetensors file" in refuse(path)


def test_safetensors_of_every_dtype(tmp_path: Path) -> None:
    tensors = {
        str(dtype): torch.arange(6).reshape(2, 3).to(dtype)
        for dtype in (
            torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
            torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
        )
    }  # fmt: skip
    tensors["scalar"] = torch.tensor(2.5)
    tensors["nothing"] = torch.zeros(0, 3)
    safetensors.torch.save_file(tensors, tmp_path / "t")
    read = read_safetensors(tmp_path / "t")
    assert set(read) == set(tensors)
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name].double(), value.double())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["zip", "pickle", "safetensors"]),
    place=st.floats(0, 1, exclude_max=True),
    junk=st.binary(min_size=1, max_size=40),
)
def test_any_damage_is_one_error_or_a_model(
    good: dict[str, bytes], tmp_path: Path, kind: str, place: float, junk: bytes
) -> None:
    content = bytearray(good[kind])
    start = int(len(content) * place)
    content[start : start + len(junk)] = junk
    path = tmp_path / "weights.ckpt"
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        load_model(CONFIG, path)


# ---------------------------------------------------------------------------------------------------- hostile


def _save(content: object, path: Path, how: str) -> None:
    if how == "raw pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")


@pytest.mark.parametrize("how", ["zip", "legacy", "raw pickle"])
@pytest.mark.parametrize("place", ["whole", "value", "beside"])
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_code_is_refused_not_executed(tmp_path: Path, how: str, place: str, suffix: str) -> None:
    target = tmp_path / "executed"
    attack = Attack(target)
    state: dict[str, Any] = {"logit_scale": torch.tensor(1.0)}
    content = {
        "whole": attack,
        "value": {"state_dict": {**state, "pooler.bias": attack}},
        "beside": {"state_dict": state, "hyper_parameters": attack},
    }[place]
    path = tmp_path / f"weights.{suffix}"
    _save(content, path, how)
    assert "could execute code" in refuse(path)
    assert not target.exists()


def test_the_attack_would_work(tmp_path: Path) -> None:
    """Otherwise the test above could not fail."""
    pickle.loads(pickle.dumps(Attack(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def test_the_environment_cannot_switch_the_refusal_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(Attack(tmp_path / "executed"), tmp_path / "w")
    assert "could execute code" in refuse(tmp_path / "w")
    assert not (tmp_path / "executed").exists()


def test_pickled_model_is_refused_with_its_type(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w")
    message = refuse(tmp_path / "w")
    assert "torch.nn.modules.linear.Linear" in message
    assert "save its state dict alone" in message


@pytest.mark.parametrize("opcodes", [b"(" * 100_000, b"]" * 100_000, b"N" * 10, b""])
def test_pickle_bombs(tmp_path: Path, opcodes: bytes) -> None:
    path = tmp_path / "w"
    path.write_bytes(b"\x80\x02" + opcodes + b".")
    assert "damaged" in refuse(path)
