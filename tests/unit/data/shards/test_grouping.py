from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from m2_encoder.data.shards.index import build_index, find_files
from m2_encoder.data.shards.names import decode_names, is_clutter
from tests.support.shards import make_image, write_tar


def write(path: Path, *names: str) -> Path:
    return write_tar(path, [(name, make_image(1) if name.endswith("png") else b"x") for name in names])


def keys(path: Path) -> list[str]:
    index = build_index(path)
    return [index[number].key for number in range(len(index))]


def faults(path: Path) -> list[tuple[str | None, str]]:
    return [(fault.key, fault.reason) for fault in build_index(path).faults]


def test_names_with_dots_of_their_own_are_samples(tmp_path: Path) -> None:
    names = [f"photo.{n}.{kind}" for n in range(1, 7) for kind in ("jpg", "txt")]
    tar = write(tmp_path / "t.tar", "good.jpg", "good.txt", *names, "IMG_2023.05.01.JPG", "IMG_2023.05.01.TXT")
    assert keys(tar) == ["good", *(f"photo.{n}" for n in range(1, 7)), "IMG_2023.05.01"]
    assert not faults(tar)


@pytest.mark.parametrize(
    "names",
    [
        ("0001.jpg", "0001.json", "0001.seg.png", "0001.depth.npy", "0001.seg.json"),
        ("0001.jpg", "0001.txt", "0001.left.png", "0001.cls", "0001.a.b.c"),
        ("a.b/0001.png", "a.b/0001.json"),
    ],
)
def test_further_files_of_a_sample_stay_its_own(tmp_path: Path, names: tuple[str, ...]) -> None:
    tar = write(tmp_path / "t.tar", *names)
    assert keys(tar) == [names[0].rpartition(".")[0]]
    assert not faults(tar)


def test_dotted_pairs_beside_a_plain_one(tmp_path: Path) -> None:
    tar = write(tmp_path / "t.tar", "p.jpg", "p.txt", "p.seg.png", "p.1.jpg", "p.1.txt", "p.1.cls", "p.1.seg.png")
    assert keys(tar) == ["p", "p.1"]
    index = build_index(tar)
    descriptor = os.open(tar, os.O_RDONLY)
    try:
        assert list(find_files(descriptor, index, 1, ["cls", "seg.png", "npy"])) == ["cls", "seg.png"]
        assert list(find_files(descriptor, index, 0, ["seg.png", "cls"])) == ["seg.png"]
    finally:
        os.close(descriptor)


def test_dotted_names_without_a_partner_are_counted(tmp_path: Path) -> None:
    tar = write(tmp_path / "t.tar", "p.1.jpg", "p.1.txt", "p.2.jpg", "p.3.txt", "p.4.jpg")
    assert keys(tar) == ["p.1"]
    assert faults(tar) == [("p.2", "missing_caption"), ("p.3", "missing_image"), ("p.4", "missing_caption")]


def test_what_systems_leave_behind_is_no_sample(tmp_path: Path) -> None:
    tar = write(
        tmp_path / "t.tar",
        "./._0.png", "./0.png", "./._0.txt", "./0.txt", "__MACOSX/0.png", "__MACOSX/._0.png", "a/.DS_Store",
        "Thumbs.db", "a/desktop.ini",
    )  # fmt: skip
    assert keys(tar) == ["./0"]
    assert not faults(tar)
    assert not is_clutter("a/my_thumbs.db.jpg")


def test_a_lonely_caption_goes_to_the_name_in_another_case(tmp_path: Path) -> None:
    names = ["A.jpg", "a.txt", "B.jpg", "c.txt", "C.TXT", "D.jpg", "d.jpg", "D.txt", "E.jpg", "e.JPG", "E.x", "e.txt"]
    tar = write(tmp_path / "t.tar", *names, "X/f.PNG", "x/F.Json", "x/F.cls")
    assert keys(tar) == ["A", "D", "e", "X/f"]
    assert sorted(faults(tar)) == [
        ("B", "missing_caption"), ("C", "missing_image"), ("E", "missing_caption"), ("c", "missing_image"),
        ("d", "missing_caption"),
    ]  # fmt: skip
    index = build_index(tar)
    descriptor = os.open(tar, os.O_RDONLY)
    try:
        assert list(find_files(descriptor, index, 3, ["cls"])) == ["cls"]
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("encoding", ["gbk", "utf-8"])
def test_names_are_read_in_the_encoding_of_all(tmp_path: Path, encoding: str) -> None:
    animals = "狗鸟猫鱼马牛羊鸡"
    with tarfile.open(tmp_path / "t.tar", "w", encoding=encoding, format=tarfile.GNU_FORMAT) as tar:
        for kind, order in (("png", animals), ("txt", reversed(animals))):  # all pictures, then all texts
            for animal in order:
                content = make_image(ord(animal)) if kind == "png" else animal.encode()
                info = tarfile.TarInfo(f"{animal}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    index = build_index(tmp_path / "t.tar")
    content = (tmp_path / "t.tar").read_bytes()
    assert [index[number].key for number in range(8)] == list(animals)
    for number, animal in enumerate(animals):
        text = index[number].text
        assert text is not None
        assert content[text.offset : text.offset + text.size].decode() == animal


def test_names_of_no_encoding_stay_distinct() -> None:
    assert decode_names([b"a\xff", b"a\xfe", "猫".encode()]) == ["a\\xff", "a\\xfe", "猫"]
    assert decode_names([b"a.jpg", "猫咪".encode(), "狗".encode("gbk")]) == ["a.jpg", "猫咪", "\\xb9\\xb7"]
    assert decode_names([b"a.jpg", "猫咪".encode("gbk"), "狗".encode("gbk")]) == ["a.jpg", "猫咪", "狗"]


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_links_are_followed_inside_of_the_tar(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tar", "0.png", "0.txt", "1.txt", "b/2.txt", "3.txt", "4.txt")
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(link("1.png", "./0.png", tarfile.LNKTYPE))
        tar.addfile(link("b/2.png", "../1.png", tarfile.SYMTYPE))
        tar.addfile(link("3.png", "/data/3.png", tarfile.SYMTYPE))
        tar.addfile(link("4.png", "4.png", tarfile.SYMTYPE))
        tar.addfile(link(f"{'long/' * 40}5.png", f"{'x' * 200}.png", tarfile.LNKTYPE))
    index = build_index(path)
    assert [index[number].key for number in range(len(index))] == ["0", "1", "b/2"]
    assert len({index[number].image for number in range(3)}) == 1
    found = {fault.key: fault for fault in index.faults}
    assert found["3"].reason == "missing_image"
    assert found["3"].detail == "its png is a link to a file that is not in this tar, or stored sparse"
    assert set(found) == {"3", "4", f"{'long/' * 40}5"}


def test_a_message_does_not_list_every_extension(tmp_path: Path) -> None:
    tar = write(tmp_path / "t.tar", *(f"p.{n:04d}" for n in range(3000)))
    (fault,) = build_index(tar).faults
    assert fault.detail.startswith("has 0000, 0001, 0002, 0003, 0004, 0005, 0006, 0007 and 2,992 more; wanted one of")
