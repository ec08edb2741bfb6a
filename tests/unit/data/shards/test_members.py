"""The index of tars against `tarfile`, and every way in which a shard can be broken."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from m2_encoder.data.shards.members import SampleLocation, index_shards, read_sample
from m2_encoder.errors import UserError

Files = dict[str, bytes]


def picture(level: int = 0) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 40, 90)).save(content, "PNG")
    return content.getvalue()


def record(text: str) -> bytes:
    return json.dumps({"captions": {"en": [text], "zh": ["图"]}, "key": text}).encode()


def sample(key: str, *, level: int = 0) -> Files:
    return {f"{key}.png": picture(level), f"{key}.json": record(key)}


def write_tar(path: Path, files: Files, *, tar_format: int = tarfile.PAX_FORMAT, directory: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        if directory is not None:
            info = tarfile.TarInfo(directory)
            info.type = tarfile.DIRTYPE
            tar.addfile(info)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def read_all(folder: Path) -> dict[str, tuple[bytes, str]]:
    return {raw.key: (raw.image, raw.metadata["key"]) for raw in map(read_sample, index_shards(folder))}


def test_the_index_of_the_embedded_set_equals_tarfile(emoji_folder: Path) -> None:
    locations = index_shards(emoji_folder / "train")
    expected: dict[tuple[str, str], dict[str, bytes]] = {}
    for shard in sorted((emoji_folder / "train").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for info in tar:
                key, extension = info.name.rsplit(".", 1)
                stream = tar.extractfile(info)
                assert stream is not None
                expected.setdefault((str(shard), key), {})[extension] = stream.read()
    assert [(location.shard, location.key) for location in locations] == list(expected)
    for location in locations[::37]:
        raw = read_sample(location)
        members = expected[location.shard, location.key]
        assert raw.image == members["webp"]
        assert raw.metadata == json.loads(members["json"])
        assert raw.origin == f"{location.shard}:{location.key}"


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_tar_formats_and_long_names(tmp_path: Path, tar_format: int) -> None:
    deep = "folder/" * 12 + "sub.folder/猫-" + "x" * 20
    files = {**sample("plain"), **sample(deep, level=9)}
    write_tar(tmp_path / "0.tar", files, tar_format=tar_format)
    assert [location.key for location in index_shards(tmp_path)] == ["plain", deep]
    assert read_all(tmp_path)[deep] == (picture(9), deep)


def test_names_as_tar_writes_them_for_a_folder(tmp_path: Path) -> None:
    # `tar cf x.tar .` puts ./ before every name, and a member for the folder itself.
    write_tar(tmp_path / "0.tar", {**sample("./a"), **sample("./b.c/d")}, directory=".")
    assert [location.key for location in index_shards(tmp_path)] == ["./a", "./b.c/d"]


def test_shards_come_by_name_and_extensions_in_any_case(tmp_path: Path) -> None:
    for name in ("10", "02", "01"):
        write_tar(tmp_path / f"{name}.tar", {f"k{name}.JSON": record(name), f"k{name}.PNG": picture()})
    assert [location.key for location in index_shards(tmp_path)] == ["k01", "k02", "k10"]
    assert list(read_all(tmp_path)) == ["k01", "k02", "k10"]


@pytest.mark.parametrize("extension", ["webp", "png", "jpg", "jpeg"])
def test_every_image_extension(tmp_path: Path, extension: str) -> None:
    write_tar(tmp_path / "0.tar", {f"a.{extension}": b"image", "a.json": record("a"), "a.txt": b"more"})
    assert read_sample(index_shards(tmp_path)[0]).image == b"image"


def assert_refused(folder: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        index_shards(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_a_folder_without_tars(tmp_path: Path) -> None:
    assert_refused(tmp_path, str(tmp_path), "no *.tar")
    assert_refused(tmp_path / "absent", "absent", "no *.tar")


def test_tars_without_samples(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {})
    assert_refused(tmp_path, str(tmp_path), "no samples")


@pytest.mark.parametrize("content", [b"", b"garbage " * 500, b"PK\x03\x04" + bytes(2000)], ids=["empty", "text", "zip"])
def test_files_that_are_no_tars(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "7.tar").write_bytes(content)
    assert_refused(tmp_path, "7.tar", "not a readable tar")


def test_a_folder_named_like_a_tar(tmp_path: Path) -> None:
    (tmp_path / "8.tar").mkdir()
    assert_refused(tmp_path, "8.tar", "not a readable tar")


def test_truncation_anywhere_is_noticed(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole" / "0.tar", {**sample("a"), **sample("b")}, tar_format=tarfile.USTAR_FORMAT)
    content = whole.read_bytes()
    with tarfile.open(whole) as tar:
        end_of_members = max(info.offset_data + -(-info.size // 512) * 512 for info in tar)
    assert len(index_shards(whole.parent)) == 2
    cuts = [*range(200, end_of_members + 1, 300), *range(512, end_of_members + 1, 512)]
    for cut in cuts:
        broken = tmp_path / "cut" / "0.tar"
        broken.parent.mkdir(exist_ok=True)
        broken.write_bytes(content[:cut])
        with pytest.raises(UserError, match=r"0\.tar"):
            index_shards(broken.parent)


def test_garbage_in_the_middle_does_not_end_the_shard_quietly(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "0.tar", {**sample("a"), **sample("b"), **sample("c")})
    with tarfile.open(shard) as tar:
        start = tar.getmember("b.png").offset
    content = bytearray(shard.read_bytes())
    content[start : start + 512] = b"\x5a" * 512
    shard.write_bytes(content)
    assert_refused(tmp_path, "0.tar", "damaged")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.png": b"x"}, ["'a'", "has png", ".json"]),
        ({"a.json": b"{}"}, ["'a'", "has json", ".webp"]),
        ({"a.json": b"{}", "a.gif": b"x"}, ["'a'", "gif, json", ".png"]),
        ({"README": b"hello"}, ["'README'", "no extension"]),
        ({"a.png": b"x", "a.json": b"{}", "b.seg.png": b"x", "b.json": b"{}"}, ["'b'", "seg.png"]),
    ],
    ids=["no-json", "no-image", "unknown-image", "no-extension", "double-extension"],
)
def test_incomplete_samples_are_named(tmp_path: Path, files: Files, words: list[str]) -> None:
    write_tar(tmp_path / "0.tar", files)
    assert_refused(tmp_path, "0.tar", *words)


def test_a_member_that_comes_twice_is_named(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "0.tar", sample("a"))
    with tarfile.open(shard, "a") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"new"))
    assert_refused(tmp_path, "0.tar", "a.png", "twice")


def located(tmp_path: Path, files: Files | None = None) -> SampleLocation:
    write_tar(tmp_path / "0.tar", files or {**sample("a"), **sample("b")})
    return index_shards(tmp_path)[-1]


@pytest.mark.parametrize("replacement", ["gone", "short", "garbage", "other"])
def test_a_shard_that_changes_while_training_reads_it(tmp_path: Path, replacement: str) -> None:
    location = located(tmp_path)
    shard = tmp_path / "0.tar"
    if replacement == "gone":
        shard.unlink()
    elif replacement == "short":
        os.truncate(shard, 700)
    elif replacement == "garbage":
        shard.write_bytes(b"\x00\xff" * 20_000)
    else:  # of the same layout, so that every offset still fits
        write_tar(tmp_path / "new" / "0.tar", {**sample("c"), **sample("d")}).replace(shard)
    with pytest.raises(UserError) as caught:
        read_sample(location)
    message = str(caught.value)
    assert f"{shard}:b" in message
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"{", b"[]", b"null", b'{"captions": ["a"]}', b"{}", b"\xff\xfe", b""])
def test_json_without_captions_is_named(tmp_path: Path, content: bytes) -> None:
    location = located(tmp_path, {"k.png": picture(), "k.json": content})
    with pytest.raises(UserError, match=r"0\.tar:k: "):
        read_sample(location)
