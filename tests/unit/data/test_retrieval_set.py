"""Reading retrieval sets from tars: whole, in order, and never with a gap."""

from __future__ import annotations

import io
import json
import logging
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.data.retrieval_set import check_retrieval_set, read_retrieval_set
from m2_encoder.data.shards import index as shard_index
from m2_encoder.data.shards.index import INDEX_SUFFIX, build_index, open_index
from m2_encoder.errors import UserError

CAPTIONS = {"en": ["a cat", "cat"], "zh": ["猫"]}


def image_bytes(value: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((5, 7, 3), value, dtype=np.uint8)).save(stream, kind)
    return stream.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def sample(name: str, value: int, **record: object) -> dict[str, bytes]:
    metadata = json.dumps({"captions": CAPTIONS, **record}).encode()
    return {f"{name}.png": image_bytes(value), f"{name}.json": metadata}


def read(folder: Path):  # type: ignore[no-untyped-def]
    return read_retrieval_set(folder, name="toy", transform=EvalTransform(4))


def test_samples_of_all_shards_in_order(tmp_path: Path) -> None:
    write_tar(tmp_path / "000001.tar", sample("c", 30))
    write_tar(
        tmp_path / "000000.tar",
        {**sample("x/a", 10, key="k"), "b.JSON": json.dumps({"captions": CAPTIONS}).encode()}
        | {"b.webp": image_bytes(20, "WEBP"), "b.extra.txt": b"?"},
    )
    found = read(tmp_path)
    assert found.name == "toy"
    assert found.keys == ("k", "b", "c")
    assert found.captions == {"en": ("a cat",) * 3, "zh": ("猫",) * 3}
    assert found.images.shape == (3, 3, 4, 4)
    assert [int(image.float().mean().round()) for image in found.images] == [10, 20, 30]


def test_equals_the_transform(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 6, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    write_tar(tmp_path / "a.tar", {**sample("a", 0), "a.png": stream.getvalue()})
    assert read(tmp_path).images[0].equal(EvalTransform(4).to_uint8(pixels))


def test_reading_leaves_the_folder_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def snapshot() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    write_tar(tmp_path / "a.tar", sample("a", 1))
    write_tar(tmp_path / "b.tar", sample("b", 2))
    open_index(tmp_path / "b.tar")
    write_tar(tmp_path / "c.tar", sample("c", 3))
    open_index(tmp_path / "c.tar")
    os.utime(tmp_path / "c.tar", ns=(1, 1))  # its index is old
    before = snapshot()
    built: list[str] = []

    def build(tar: str) -> shard_index.ShardIndex:
        built.append(Path(tar).name)
        return build_index(tar)

    monkeypatch.setattr(shard_index, "build_index", build)
    with caplog.at_level(logging.WARNING):
        check_retrieval_set(tmp_path, name="toy")
        assert read(tmp_path).keys == ("a", "b", "c")
    assert snapshot() == before
    assert f"a.tar{INDEX_SUFFIX}" not in before
    assert built == ["a.tar", "c.tar"] * 2  # once each for checking and reading
    assert caplog.text == ""


BAD = {
    "no json": ({"a.png": image_bytes(1)}, "a.tar:a: missing_caption .*wanted a json"),
    "broken json": ({**sample("a", 1), "a.json": b"{"}, "a.tar:a: bad_json"),
    "json without captions": ({**sample("a", 1), "a.json": b"[]"}, "a.tar:a: bad_json: holds a list"),
    "no image": ({"a.json": sample("a", 1)["a.json"]}, "a.tar:a: missing_image .*wanted one of webp, png"),
    "broken image": ({**sample("a", 1), "a.png": image_bytes(1)[:40]}, "a.tar:a: .*"),
    "missing language": (sample("a", 1, captions={"en": ["x"]}), "no caption in 'zh'"),
    "empty caption": (sample("a", 1, captions={"en": [" "], "zh": ["猫"]}), "no caption in 'en'"),
    "caption as a number": (
        sample("a", 1, captions={"en": 7, "zh": "猫"}),
        "a.tar:a: wrong_type: captions of 'en'",
    ),
    "empty tar": ({}, "no samples"),
    "a file that is no sample": ({**sample("a", 1), "README": b"hello"}, "a.tar:README: missing_image"),
}


@pytest.mark.parametrize("kind", BAD)
def test_gaps_are_refused(tmp_path: Path, kind: str) -> None:
    members, message = BAD[kind]
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=message):
        read(tmp_path)


def test_damaged_tars_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \*\.tar shards"):
        read(tmp_path)
    write_tar(tmp_path / "a.tar", {**sample("a", 1), **sample("b", 2)})
    whole = (tmp_path / "a.tar").read_bytes()
    for content in (b"hello", whole[:700]):
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.tar"):
            read(tmp_path)


def test_a_member_twice_and_damage_in_the_middle_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {**sample("a", 1), **sample("b", 2), **sample("c", 3)})
    whole = (tmp_path / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        start = tar.getmember("b.png").offset
    (tmp_path / "a.tar").write_bytes(whole[:start] + b"\x5a" * 512 + whole[start + 512 :])
    with pytest.raises(
        UserError, match=rf"a\.tar: truncated_shard \(damaged at byte {start}\); an evaluation skips nothing"
    ):
        read(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for value in (1, 2):
            content = image_bytes(value)
            info = tarfile.TarInfo("a.png")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        info = tarfile.TarInfo("a.txt")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"cat"))
    with pytest.raises(UserError, match=r"a\.tar:a: duplicate_key"):
        read(tmp_path)
