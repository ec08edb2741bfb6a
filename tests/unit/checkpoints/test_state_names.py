"""Names as training frameworks leave them: prefixes, wrappers, moving averages beside the plain weights."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from m2_encoder import CheckpointError, M2Encoder
from m2_encoder.checkpoints.adapters import to_official_state
from m2_encoder.checkpoints.io import load_model, read_state
from m2_encoder.checkpoints.state_names import LEADING_NAMES
from tests.support.models import random_model, small_config

CONFIG = small_config(num_layers=1, num_vl_layers=1)
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def model() -> M2Encoder:
    torch.manual_seed(6)
    return random_model(CONFIG)


@pytest.fixture(params=["official", "ours"])
def state(model: M2Encoder, request: pytest.FixtureRequest) -> State:
    own = dict(model.state_dict())
    return to_official_state(own) if request.param == "official" else own


def load(path: Path, content: object) -> State:
    torch.save(content, path)
    return load_model(CONFIG, path).state_dict()


def assert_same(found: State, expected: M2Encoder) -> None:
    assert found.keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    "prefix",
    [
        *(f"{name}." for name in LEADING_NAMES),
        *(f"{first}.{second}." for first, second in itertools.permutations(("module", "_orig_mod", "model"), 2)),
        "model._orig_mod.module.",
        "module.module.",
    ],
)
def test_prefixes_of_frameworks(state: State, model: M2Encoder, tmp_path: Path, prefix: str) -> None:
    assert_same(load(tmp_path / "x.pt", {f"{prefix}{name}": value for name, value in state.items()}), model)


@pytest.mark.parametrize("inner", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_layers_that_were_wrapped_one_by_one(state: State, model: M2Encoder, tmp_path: Path, inner: str) -> None:
    wrapped = {name.replace(".layers.0.", f".layers.0.{inner}."): value for name, value in state.items()}
    assert wrapped.keys() != state.keys()
    assert_same(load(tmp_path / "x.pt", {"model": {f"module.{name}": value for name, value in wrapped.items()}}), model)


def test_wrappers_in_wrappers(state: State, model: M2Encoder, tmp_path: Path) -> None:
    assert_same(load(tmp_path / "x.pt", {"model": {"state_dict": state}, "optimizer": {"lr": 1.0}}), model)
    assert_same(load(tmp_path / "x.pt", {"model_state_dict": state, "epoch": 3}), model)


def test_what_torch_itself_writes(model: M2Encoder, tmp_path: Path) -> None:
    compiled = torch.compile(nn.Sequential(model))
    assert isinstance(compiled, nn.Module)
    named = {name.replace("_orig_mod.0.", "_orig_mod."): value for name, value in compiled.state_dict().items()}
    assert_same(load(tmp_path / "x.pt", named), model)
    assert_same(load(tmp_path / "y.pt", AveragedModel(model).state_dict()), model)


AVERAGED: dict[str, Callable[[State, State], object]] = {
    "ema_state_dict": lambda plain, other: {"ema_state_dict": other, "state_dict": plain},
    "model_ema": lambda plain, other: {"model": plain, "model_ema": other},
    "state_dict_ema": lambda plain, other: {"state_dict": plain, "state_dict_ema": other},
    "ema.": lambda plain, other: {**{f"ema.{name}": value for name, value in other.items()}, **plain},
    "ema_model.module.": lambda plain, other: {
        "state_dict": {
            **{f"model.{name}": value for name, value in plain.items()},
            **{f"ema_model.module.{name}": value for name, value in other.items()},
            "ema_model.n_averaged": torch.tensor(3),
        }
    },
    "module.ema.": lambda plain, other: {
        **{f"module.{name}": value for name, value in plain.items()},
        **{f"module.ema.{name}": value for name, value in other.items()},
    },
}


@pytest.mark.parametrize("kind", AVERAGED)
def test_plain_weights_win_over_averaged_ones_and_it_is_said(
    state: State, model: M2Encoder, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    other = {name: value + 1 for name, value in state.items()}
    with caplog.at_level(logging.WARNING):
        assert_same(load(tmp_path / "x.pt", AVERAGED[kind](state, other)), model)
    (line,) = caplog.messages
    assert "averaged weights (EMA) beside the plain ones: the plain ones are used" in line


@pytest.mark.parametrize("kind", ["ema.", "ema_state_dict"])
def test_averaged_weights_alone_are_used_and_it_is_said(
    state: State, model: M2Encoder, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    content = {"ema_state_dict": state} if kind == "ema_state_dict" else {f"ema.{n}": v for n, v in state.items()}
    with caplog.at_level(logging.WARNING):
        assert_same(load(tmp_path / "x.pt", content), model)
    (line,) = caplog.messages
    assert "averaged weights (EMA) alone" in line


def test_another_prefix_is_named(state: State, tmp_path: Path) -> None:
    torch.save({f"student.net.{name}": value for name, value in state.items()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"none of its .* names is known .*prefix 'student.net.'"):
        read_state(tmp_path / "x.pt")


def test_two_entries_of_one_meaning_are_refused(state: State, tmp_path: Path) -> None:
    torch.save({**state, **{f"module.{name}": value for name, value in state.items()}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="two of its entries mean"):
        read_state(tmp_path / "x.pt")


def test_a_name_of_nobody_stays_as_it_is(state: State, tmp_path: Path) -> None:
    torch.save({**state, "model.own.module.weight": torch.zeros(1)}, tmp_path / "x.pt")
    assert "own.module.weight" in read_state(tmp_path / "x.pt")
