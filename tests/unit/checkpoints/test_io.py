"""Checkpoints in every wrapper and container, strictly matched, and held in memory once."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from m2_encoder import CheckpointError, M2Encoder
from m2_encoder.checkpoints.adapters import to_official_state
from m2_encoder.checkpoints.digests import DIGEST_KEY, digest_tensors
from m2_encoder.checkpoints.io import build_model, load_model, read_state, save_official, save_safetensors
from tests.support.models import random_model, small_config

CONFIG = small_config()
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def model() -> M2Encoder:
    torch.manual_seed(5)
    return random_model(CONFIG)


@pytest.fixture
def ours(model: M2Encoder) -> State:
    return dict(model.state_dict())


@pytest.fixture
def official(model: M2Encoder) -> State:
    return to_official_state(model.state_dict())


def assert_same(model: M2Encoder, expected: State) -> None:
    state = model.state_dict()
    assert list(state) == list(expected)
    for name, value in state.items():
        assert torch.equal(value, expected[name]), name


# --------------------------------------------------------------------------------------------------- wrappers

WRAPPERS: dict[str, Callable[[State], object]] = {
    "state_dict": lambda s: {"epoch": 3, "state_dict": s, "hyper_parameters": {"a": [1, "b"]}},
    "module": lambda s: {"module": {f"_forward_module.{k}": v for k, v in s.items()}, "dp_world_size": 8},
    "module without prefix": lambda s: {"module": s},
    "model": lambda s: {"model": s},
    "bare": lambda s: s,
    "bare with prefix": lambda s: {f"_forward_module.{k}": v for k, v in s.items()},
    "state_dict before module": lambda s: {"module": {"x": torch.zeros(1)}, "state_dict": s},
    "visual tokenizer": lambda s: {"state_dict": {**s, "visual_tokenizer.encoder.weight": torch.zeros(3)}},
    "module with visual tokenizer": lambda s: {"module": {**s, "_forward_module.visual_tokenizer.q": torch.ones(2)}},
    "bare with visual tokenizer": lambda s: {**s, "visual_tokenizer.decoder.bias": torch.zeros(3)},
    "training": lambda s: {
        "state_dict": {**{f"model.{k}": v for k, v in s.items()}, "objectives.cmlm.head.weight": torch.ones(2)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(50_000)}}}],
    },
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("names", ["official", "ours"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "pickle"])
def test_wrapper(ours: State, official: State, tmp_path: Path, wrapper: str, names: str, legacy: bool) -> None:
    path = tmp_path / "weights.anything"
    content = WRAPPERS[wrapper](official if names == "official" else ours)
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert_same(load_model(CONFIG, path), ours)


@pytest.mark.parametrize("names", ["official", "ours"])
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_safetensors(ours: State, official: State, tmp_path: Path, names: str, suffix: str) -> None:
    path = tmp_path / f"weights.{suffix}"
    safetensors.torch.save_file(official if names == "official" else ours, path)
    assert_same(load_model(CONFIG, path), ours)


def test_torch_file_with_the_suffix_of_safetensors(ours: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    torch.save({"state_dict": ours}, path)
    assert_same(load_model(CONFIG, path), ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("container", ["torch", "safetensors"])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
def test_values_are_converted(
    ours: State, tmp_path: Path, dtype: torch.dtype, container: str, stored: torch.dtype
) -> None:
    path = tmp_path / "weights"
    source = {name: value.to(stored) for name, value in ours.items()}
    torch.save(source, path) if container == "torch" else safetensors.torch.save_file(source, path)
    loaded = load_model(CONFIG, path, dtype=dtype)
    assert_same(loaded, {name: value.to(dtype) for name, value in source.items()})


def test_read_state_uses_our_names_and_the_dtype_of_the_file(official: State, tmp_path: Path) -> None:
    torch.save({"state_dict": {name: value.half() for name, value in official.items()}}, tmp_path / "w")
    state = read_state(tmp_path / "w")
    assert "text_embed.tokens.weight" in state
    assert {value.dtype for value in state.values()} == {torch.float16}


def test_image_positions_follow_the_image_size(ours: State, tmp_path: Path) -> None:
    torch.save({"model": ours}, tmp_path / "w")
    for side in (4, 8, 16, 28):
        config = dataclasses.replace(CONFIG, image_size=side)
        model = load_model(config, tmp_path / "w")
        assert model.image_embed.positions.weight.shape == ((side // 4) ** 2 + 3, 16)
        assert model.encode_image(torch.rand(1, 3, side, side)).isfinite().all()


# ------------------------------------------------------------------------------------------------- strictness


def _message(state: State, path: Path) -> str:
    torch.save(state, path)
    with pytest.raises(CheckpointError) as caught:
        load_model(CONFIG, path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_everything_wrong_is_one_error_with_counts_and_names(ours: State, tmp_path: Path) -> None:
    for layer in range(2):
        for part in ("weight", "bias"):
            del ours[f"backbone.layers.{layer}.text_expert.fc1.{part}"]
            ours[f"backbone.layers.{layer + 7}.text_expert.fc1.{part}"] = torch.zeros(3)
    del ours["pooler.bias"]
    ours["banana"] = torch.zeros(3)
    ours["text_embed.positions.weight"] = torch.zeros(30, 16)
    ours["logit_scale"] = torch.tensor(3)
    message = _message(ours, tmp_path / "w.ckpt")
    assert "5 missing (" in message
    assert "backbone.layers.0.text_expert.fc1.weight" in message
    assert "and 1 more" in message
    assert "5 unexpected (" in message
    assert "text_embed.positions.weight is (30, 16), expected (20, 16)" in message
    assert "1 unusable (logit_scale is torch.int64, expected floating point)" in message


@pytest.mark.parametrize("name", ["logit_vl_scale", "norm.weight", "vl_encoder.norm.text_expert.bias"])
def test_unused_parameters_are_required_too(ours: State, tmp_path: Path, name: str) -> None:
    del ours[name]
    assert f"1 missing ({name})" in _message(ours, tmp_path / "w")


def test_text_positions_are_never_resized(ours: State, tmp_path: Path) -> None:
    ours["text_embed.positions.weight"] = torch.zeros(52, 16)
    assert "is (52, 16), expected (20, 16)" in _message(ours, tmp_path / "w")


def test_image_positions_of_no_square_grid(ours: State, tmp_path: Path) -> None:
    ours["image_embed.positions.weight"] = torch.zeros(3 + 4 * 5, 16)
    assert "23 rows has no square grid" in _message(ours, tmp_path / "w")


def test_foreign_model(tmp_path: Path) -> None:
    message = _message(torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(3)]).state_dict(), tmp_path / "w")
    assert "none of its 6 names is known (0.weight, 0.bias, 1.weight, 1.bias, and 2 more)" in message


def test_two_entries_for_one_parameter(ours: State, tmp_path: Path) -> None:
    ours["_forward_module.logit_scale"] = torch.tensor(0.0)
    assert "two of its entries mean 'logit_scale'" in _message(ours, tmp_path / "w")


def test_sparse_and_meta_tensors(ours: State, tmp_path: Path) -> None:
    ours["pooler.bias"] = torch.zeros(16).to_sparse()
    ours["norm.bias"] = torch.empty(16, device="meta")
    message = _message(ours, tmp_path / "w")
    assert "pooler.bias is sparse" in message
    assert "norm.bias is without data" in message


# ----------------------------------------------------------------------------------------------------- memory


def _storages(model: M2Encoder) -> list[tuple[int, int, int]]:
    return [
        (p.untyped_storage().data_ptr(), p.untyped_storage().nbytes(), p.numel() * p.element_size())
        for p in model.parameters()
    ]


def test_tied_and_sliced_tensors_get_their_own_storage(ours: State, tmp_path: Path) -> None:
    big = torch.randn(1000, 16)
    ours["text_embed.tokens.weight"] = big[:40]
    ours["text_embed.positions.weight"] = big[10:30]
    ours["pooler.weight"] = torch.randn(16, 16).t()
    ours["vl_encoder.norm.text_expert.bias"] = ours["vl_encoder.norm.vision_expert.bias"]
    ours["norm.bias"] = torch.zeros(1).expand(16)
    path = tmp_path / "w"
    torch.save(ours, path)
    model = load_model(CONFIG, path)
    assert_same(model, ours)
    storages = _storages(model)
    assert len({pointer for pointer, _, _ in storages}) == len(storages)
    assert all(held == needed for _, held, needed in storages)
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_tensors_are_taken_over_not_copied(ours: State) -> None:
    state = {name: value.clone() for name, value in ours.items()}
    pointers = {name: value.data_ptr() for name, value in state.items()}
    model = build_model(CONFIG, state)
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == pointers
    assert not state, "the state is emptied on the way"


def test_a_tensor_that_expands_to_terabytes_is_refused(ours: State, tmp_path: Path) -> None:
    ours["norm.bias"] = torch.zeros(1).expand(10**12)
    for extra in ({}, {"optimizer": torch.zeros(10**6)}):
        torch.save({"state_dict": ours, **extra}, tmp_path / "w")
        with pytest.raises(CheckpointError, match=r"norm.bias is \(1000000000000,\), expected \(16,\)"):
            load_model(CONFIG, tmp_path / "w")


def test_overwriting_the_file_does_not_change_the_model(ours: State, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    for save in (safetensors.torch.save_file, torch.save):
        save(ours, path)
        model = load_model(CONFIG, path)
        path.write_bytes(b"\0" * path.stat().st_size)
        assert_same(model, ours)


# ----------------------------------------------------------------------------------------------------- saving


def test_official_format_round_trip(model: M2Encoder, ours: State, official: State, tmp_path: Path) -> None:
    save_official(model, tmp_path / "out.ckpt")
    content = torch.load(tmp_path / "out.ckpt", weights_only=True)
    assert list(content) == ["state_dict"]
    assert set(content["state_dict"]) == set(official)
    assert_same(load_model(CONFIG, tmp_path / "out.ckpt"), ours)


def test_safetensors_round_trip(model: M2Encoder, ours: State, tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    save_safetensors(model, path, metadata={"a": "b"})
    assert_same(load_model(CONFIG, path), ours)
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"a": "b", DIGEST_KEY: digest_tensors(ours)}
        assert set(file.keys()) == set(ours)


def test_saving_leaves_nothing_else_behind(model: M2Encoder, tmp_path: Path) -> None:
    save_official(model, tmp_path / "out.ckpt")
    save_official(model, tmp_path / "out.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["out.ckpt"]


@pytest.mark.parametrize("save", [save_official, save_safetensors])
def test_saving_where_it_is_impossible(
    model: M2Encoder, tmp_path: Path, save: Callable[[M2Encoder, Path], None]
) -> None:
    with pytest.raises(CheckpointError, match="does not exist; create it first"):
        save(model, tmp_path / "nowhere" / "out.ckpt")
    with pytest.raises(CheckpointError, match="it is a folder"):
        save(model, tmp_path)
    with torch.device("meta"):
        empty = M2Encoder(CONFIG)
    with pytest.raises(CheckpointError, match=re.escape(f"{len(empty.state_dict())} parameters are on the meta")):
        save(empty, tmp_path / "out.ckpt")
    assert not list(tmp_path.iterdir())


def test_a_failure_keeps_the_earlier_file(model: M2Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.ckpt"
    save_official(model, path)
    before = path.read_bytes()

    def full_disk(_content: object, target: Path) -> None:
        target.write_bytes(b"half a fi")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_official(model, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
