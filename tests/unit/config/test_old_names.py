"""Configurations of earlier versions are read as today's."""

from __future__ import annotations

import pkgutil
from pathlib import Path

import pytest

from m2_encoder.config import old_names
from m2_encoder.runs.folder import read_config


@pytest.mark.parametrize("new", old_names._MOVED.values())
def test_what_has_moved_is_there(new: str) -> None:
    assert callable(pkgutil.resolve_name(new))


def test_a_saved_configuration_is_read_as_today(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "data: {_target_: m2_encoder.data.datamodule.EmojiDataModule, keep: m2_encoder.data.captions.CaptionSampler}\n"
        "objective: {itm: {_target_: mine.Own, schedule: {0: 0, 500: 1.0}, softness: 0.2}}\n"
        "scheduler: {schedule: {linear: 1}}\n"
    )
    assert read_config(path) == {
        "data": {
            "_target_": "m2_encoder.data.emoji.emoji_module.EmojiDataModule",
            "keep": "m2_encoder.data.captions.CaptionSampler",
        },
        "objective": {"itm": {"_target_": "mine.Own", "schedule": [[0, 0], [500, 1.0]], "softness": 0.2}},
        "scheduler": {"schedule": {"linear": 1}},
    }
