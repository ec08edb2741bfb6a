"""Pictures by number: little memory, sound messages, and workers may have them."""

from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from m2_encoder.errors import ImageError, UserError
from m2_encoder.evaluation.sets.pictures import FilePictures, PartPictures, find_missing


def test_files_parts_and_copies_for_workers(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(b"one")
    (tmp_path / "all.bin").write_bytes(b"..twothree")
    files = FilePictures(tmp_path, ["a/1.png", "a/2.png"])
    parts = PartPictures(["x", "y"], [str(tmp_path / "all.bin")], np.array([[0, 2, 3], [0, 5, 5]]))
    assert [pickle.loads(pickle.dumps(each))[0].read() for each in (files, parts)] == [b"one", b"two"]
    assert [picture.read() for picture in parts[::-1]] == [b"three", b"two"]
    assert files[-2].name == "a/1.png"
    with pytest.raises(IndexError):
        files[2]
    with pytest.raises(ImageError, match=r"a/2\.png: no such file"):
        files[1].read()
    (tmp_path / "all.bin").write_bytes(b"..two")
    with pytest.raises(UserError, match="is shorter than it was, 0 of 5 bytes at 5"):
        parts[1].read()


def test_what_is_no_base64_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b"1\tAA*A\n")
    parts = PartPictures(["1"], [str(tmp_path / "a.tsv")], np.array([[0, 2, 4]]), base64=True)
    with pytest.raises(ImageError, match=r"a\.tsv: 1 is not base64"):
        parts[0].read()


def test_a_hundred_thousand_pictures_take_little() -> None:
    names = [f"{number:06d}.jpg" for number in range(100_000)]
    tracemalloc.start()
    parts = PartPictures(names, ["0.tar"], np.zeros((len(names), 3), np.int64))
    picture = parts[99_999]
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert picture.name == "099999.jpg"
    assert held < 4_000_000


def test_folders_are_listed_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1").touch()
    (tmp_path / "2").touch()
    assert find_missing(tmp_path, ["a/1", "2", "a/3", "b/1"]) == ["a/3", "b/1"]
