"""Which changes of a continued run are told."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from m2_encoder.runs.changes import describe_changes
from m2_encoder.runs.folder import write_config

CONFIG: dict[str, Any] = {
    "seed": 0,
    "run": {"name": "a", "resume": "never"},
    "trainer": {"devices": 1, "max_steps": 20},
    "strategy": {"_target_": "m2_encoder.strategies.single.LocalStrategy"},
    "data": {
        "num_workers": 0,
        "sources": {"a": {"shards": ["x.tar"], "weight": None}},
        "transform": {"flip": 0.5, "scale": [0.5, 1.0]},
    },
    "optimizer": {"lr": 1e-05},
}


def changed(tmp_path: Path, key: str, value: Any) -> list[str]:
    write_config(tmp_path / "config.yaml", CONFIG)
    cfg = copy.deepcopy(CONFIG)
    *parents, last = key.split(".")
    node = cfg
    for parent in parents:
        node = node[parent]
    node[last] = value
    return describe_changes(tmp_path / "config.yaml", cfg)


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("data.transform.flip", 0.0, "data.transform.flip: 0.5 then, 0.0 now"),
        ("data.transform.scale", [0.6, 1.0], "data.transform.scale: [0.5, 1.0] then, [0.6, 1.0] now"),
        ("optimizer.lr", 1e-4, "optimizer.lr: 1e-05 then, 0.0001 now"),
        ("trainer.max_steps", 30, "trainer.max_steps: 20 then, 30 now"),
        ("data.sources.b", {"shards": "y"}, "data.sources.b: None then, {'shards': 'y'} now"),
        ("data.sources.a", None, "data.sources.a: {'shards': ['x.tar'], 'weight': None} then, None now"),
    ],
)
def test_what_changes_the_result_is_told(tmp_path: Path, key: str, value: Any, line: str) -> None:
    assert changed(tmp_path, key, value) == [line]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.num_workers", 4),
        ("trainer.devices", 8),
        ("run.resume", "auto"),
        ("optimizer.lr", 0.00001),
        ("data.new_segment", True),
    ],
)
def test_what_does_not_is_not(tmp_path: Path, key: str, value: Any) -> None:
    assert changed(tmp_path, key, value) == []


def test_a_run_without_its_configuration_tells_nothing(tmp_path: Path) -> None:
    assert describe_changes(tmp_path / "config.yaml", CONFIG) == []
