"""A wrong layout gives one message, and the right one is found."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from m2_encoder.errors import UserError
from m2_encoder.evaluation.sets.layouts import LAYOUTS, expect, recognise
from m2_encoder.evaluation.sets.reading import READERS, read_set
from tests.unit.evaluation.sets import (
    test_caption_lines,
    test_chinese_clip,
    test_clip_benchmark,
    test_elevater_cn,
    test_image_folder,
    test_many_languages,
    test_own,
    test_tuxpaint,
)


def write(layout: str, root: Path) -> Path:
    if layout == "clip_benchmark":
        return test_clip_benchmark.write_set(root, "classification", [b"0", b"1"])
    if layout == "elevater_cn":
        return test_elevater_cn.write(root, ["000", "001"], ["猫", "狗"], ["cat", "dog"])
    if layout == "xm3600":
        return test_many_languages.write_xm3600(root)
    if layout == "xtd":
        return test_many_languages.write_xtd(root)
    if layout == "chinese_clip":
        return test_chinese_clip.write(root, test_chinese_clip.TEXTS)
    if layout == "caption_lines":
        return test_caption_lines.write(root, test_caption_lines.ROWS)
    if layout == "tuxpaint":
        return test_tuxpaint.write(root)
    if layout == "own":
        return test_own.write_folder(root)
    if layout == "image_folder":
        return test_image_folder.write(root)
    root.mkdir()
    return test_many_languages.write_babel(root / "babel.json", {"ZH": [[0], ["猫"]]})


@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - {"emoji"}))
def test_each_layout_is_recognised_among_all(tmp_path: Path, layout: str) -> None:
    assert recognise(write(layout, tmp_path / "set")) == layout


def test_the_emoji_set_is_recognised(emoji_folder: Path) -> None:
    assert recognise(emoji_folder) == recognise(emoji_folder / "val") == "emoji"


def test_every_layout_has_a_reader() -> None:
    assert list(READERS) == list(LAYOUTS)


@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - {"emoji", "babel_imagenet"}))
def test_a_mislabelled_layout_says_which_one_fits(tmp_path: Path, layout: str) -> None:
    place = write(layout, tmp_path / "set")
    other = "xtd" if layout != "xtd" else "xm3600"
    with pytest.raises(UserError) as caught:
        read_set(place, layout=other)
    message = str(caught.value)
    assert f"layout {other} is {LAYOUTS[other].expects}; not there: " in message
    assert f"it fits layout {layout}" in message
    assert "\n" not in message


def test_nothing_that_fits_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "label_cn.txt").write_text("猫")
    with pytest.raises(
        UserError, match=r"It holds label_cn\.txt, test; nearest is layout elevater_cn, which lacks test/000"
    ):
        recognise(tmp_path)
    with pytest.raises(UserError, match=r"nowhere: no such file or folder; .* holds label_cn"):
        expect(tmp_path / "nowhere", "own")


def test_unknown_layouts_and_settings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="layout=coco: one of clip_benchmark, elevater_cn"):
        read_set(tmp_path, layout="coco")
    with pytest.raises(UserError, match="splits: no setting of layout elevater_cn; it has split, name"):
        read_set(write("elevater_cn", tmp_path / "set"), splits="test")


def test_a_folder_in_place_of_a_file_is_said(tmp_path: Path) -> None:
    place = write("clip_benchmark", tmp_path / "set")
    (place / "test" / "0.tar").unlink()
    (place / "test" / "0.tar").mkdir()
    with pytest.raises(UserError, match=r"0\.tar: cannot be read: Is a directory"):
        read_set(place)


def test_a_set_without_a_layout_is_read(tmp_path: Path) -> None:
    assert read_set(write("elevater_cn", tmp_path / "pets")).name == "pets"


def test_the_page_names_every_layout_with_its_settings(repo_root: Path) -> None:
    page = (repo_root / "docs" / "evaluation_sets.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:4:2] for line in page.splitlines() if line.startswith("| `")]
    said = {name.strip(" `"): set(re.findall("`([a-z_]+)`", settings)) for name, settings in rows}
    assert said == {
        name: set(inspect.signature(reader).parameters) - {"path", "name"} for name, reader in READERS.items()
    }
