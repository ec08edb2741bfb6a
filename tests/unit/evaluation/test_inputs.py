"""What m2-embed finds, before anything is decoded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m2_encoder.errors import UserError
from m2_encoder.evaluation.inputs import MAX_LINE_BYTES, list_images, read_lines


def test_images_below_a_folder_sorted(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/1.png", "a.webp", "猫/猫.jpeg", "notes.txt", ".hidden.png", ".git/x.png", "png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    items = list_images(tmp_path)
    assert [item.name for item in items] == ["a.webp", "b/1.png", "b/2.JPG", "猫/猫.jpeg"]
    assert [item.place for item in items] == [0, 1, 2, 3]
    assert [item.content for item in items] == [tmp_path / item.name for item in items]
    assert not any(item.problem for item in items)


def test_what_systems_leave_behind_is_no_picture(tmp_path: Path) -> None:
    for name in ("a.jpg", "._a.jpg", "__MACOSX/a.jpg", "b/__macosx/c/a.jpg", "b/.DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"\xff\xd8\xff")
    assert [item.name for item in list_images(tmp_path)] == ["a.jpg"]


def test_what_cannot_be_opened_carries_its_problem(tmp_path: Path) -> None:
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    problems = {item.name: item.problem for item in list_images(tmp_path)}
    assert problems == {"gone.png": "a link to nothing", "pipe.png": "not a regular file"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_unreadable_folders_are_reported(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0)
    (item,) = list_images(tmp_path)
    assert "the folder cannot be read" in item.problem


def test_names_that_are_no_text_become_escapes(tmp_path: Path) -> None:
    raw = os.path.join(os.fsencode(tmp_path), b"\xff.png")
    with open(raw, "wb"):
        pass
    (item,) = list_images(tmp_path)
    assert item.name == "\\udcff.png"
    assert item.problem == ""


def lines_of(path: Path, content: bytes) -> list[tuple[int, str, str]]:
    path.write_bytes(content)
    return [(item.place, item.name, item.problem.split(";")[0]) for item in read_lines(path)]


def test_lines_keep_their_place(tmp_path: Path) -> None:
    content = "\ufeff一只猫\r\n\n  \t\n a cat \nlast".encode() + b"\nbad \xff\n"
    assert lines_of(tmp_path / "t.txt", content) == [
        (0, "一只猫", ""),
        (1, "line 2", "blank"),
        (2, "line 3", "blank"),
        (3, " a cat ", ""),
        (4, "last", ""),
        (5, "line 6", "not UTF-8 at byte 5"),
    ]


def test_other_encodings_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes("中文\n英文\n".encode("gb18030"))
    assert all("iconv -f gb18030" in item.problem for item in read_lines(path))
    path.write_bytes("猫\n".encode("utf-16"))
    with pytest.raises(UserError, match="UTF-16; convert it with"):
        list(read_lines(path))


def test_a_huge_line_is_one_problem(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    content = b"x" * MAX_LINE_BYTES + b"\n" + b"y" * (3 * MAX_LINE_BYTES) + b"\nend"
    found = lines_of(path, content)
    assert [place for place, _, _ in found] == [0, 1, 2]
    assert [bool(problem) for _, _, problem in found] == [True, True, False]
    path.write_bytes(b"x" * (MAX_LINE_BYTES - 1) + b"\nend")
    assert [bool(item.problem) for item in read_lines(path)] == [False, False]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"])), max_size=6))
def test_any_text_is_read_back(tmp_path: Path, texts: list[str]) -> None:
    path = tmp_path / "t.txt"
    path.write_text("\n".join(["first", *texts, "last"]), encoding="utf-8", newline="")
    found = list(read_lines(path))
    assert len(found) == len(texts) + 2
    expected = [text for text in texts if text.strip()]
    assert [item.content for item in found[1:-1] if not item.problem] == expected


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        list(read_lines(tmp_path / "nothing.txt"))
