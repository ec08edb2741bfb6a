from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m2_encoder.checkpoints.training_state import read_step
from m2_encoder.errors import CheckpointError, UserError
from m2_encoder.runs.folder import read_config, read_run, write_config

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("ab 1.e-:#'\"中\n", max_size=8)
)
trees = st.dictionaries(
    st.text("abc", min_size=1, max_size=3), st.recursive(scalars, lambda x: st.lists(x, max_size=3), max_leaves=4)
)


@given(cfg=trees)
def test_configuration_survives(tmp_path_factory: pytest.TempPathFactory, cfg: dict[str, object]) -> None:
    path = tmp_path_factory.mktemp("run") / "config.yaml"
    write_config(path, cfg)
    assert read_config(path) == cfg


def test_no_partial_file_stays(tmp_path: Path) -> None:
    write_config(tmp_path / "run" / "config.yaml", {"a": 1})
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("content", [b"a: [1", b"- 1\n", b"\xff\xfe"])
def test_damaged_configuration(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml"):
        read_config(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ("optimizer: [{_target_: own.run}]", "optimizer"),
        ("objective: {itc: [a]}", "objective.itc"),
        ("objective: {itc: {weight: a}}", "objective.itc.weight"),
        ("callbacks: 1", "callbacks"),
        ("model: {name: [tiny]}", "model.name"),
        ("run: {name: a}\nmodel: {name: tiny, tokenizer: emoji}\ntrainer: {max_steps: x}", "trainer.max_steps"),
        ("? \n: a", None),
        ("a: !!set {b}", None),
    ],
)
def test_a_part_of_another_kind_is_named(tmp_path: Path, content: str, key: str | None) -> None:
    (tmp_path / "config.yaml").write_text(content)
    named = "is not valid YAML" if key is None else f"is no configuration of a run: {key} is missing, or of another"
    with pytest.raises(UserError, match=named):
        read_config(tmp_path / "config.yaml")


@pytest.mark.parametrize("content", ["", "a: 1", "run: {name: a}\ntrainer: {max_steps: 1}\nmodel: {_target_: own.run}"])
def test_a_part_that_every_run_has_is_asked_for(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(
        UserError, match=r"is no configuration of a run: (run|trainer|model.name|model.tokenizer) is missing"
    ):
        read_run(tmp_path / "config.yaml")


def test_missing_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_config(tmp_path / "config.yaml")


def test_step_of_a_checkpoint(tmp_path: Path) -> None:
    torch.save({"global_step": 17, "state_dict": {"w": torch.zeros(3)}}, tmp_path / "last.ckpt")
    assert read_step(tmp_path / "last.ckpt") == 17


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut"])
def test_damaged_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"last\.ckpt"):
        read_step(tmp_path / "last.ckpt")


def test_checkpoint_of_something_else(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError):
        read_step(tmp_path / "last.ckpt")
