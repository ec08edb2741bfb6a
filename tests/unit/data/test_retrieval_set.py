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
import torch
from PIL import Image

from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.data.packing.pack import PackOptions, pack
from m2_encoder.data.packing.records import Columns
from m2_encoder.data.packing.sources import find_source
from m2_encoder.data.retrieval_contents import SetReading
from m2_encoder.data.retrieval_set import RetrievalSet, check_retrieval_set, read_retrieval_set
from m2_encoder.data.shards import index as shard_index
from m2_encoder.data.shards.index import INDEX_SUFFIX, build_index, open_index
from m2_encoder.errors import UserError
from m2_encoder.pictures import OFFICIAL, STANDARD, PicturePolicy

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
    assert [key.rpartition("\0")[2] for key in found.keys] == ["k", "b", "c"]
    assert found.captions == {"en": (("a cat", "cat"),) * 3, "zh": (("猫",),) * 3}
    assert found.images.shape == (3, 3, 4, 4)
    assert [int(image.float().mean().round()) for image in found.images] == [10, 20, 30]


def caption(text: str, role: str | None = None) -> dict[str, object]:
    return {"captions": {"en": [text if role is None else {"text": text, "role": role}]}}


def contents(found: RetrievalSet) -> list[list[int]]:
    """Grey levels of the pictures of each content, in order."""
    by_key: dict[str, list[int]] = {}
    for key, image in zip(found.keys, found.images, strict=True):
        by_key.setdefault(key, []).append(int(image.float().mean().round()))
    return list(by_key.values())


def test_names_that_begin_again_in_every_shard_mean_nothing(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {**sample("0", 10, **caption("a")), **sample("1", 20, **caption("b"))})
    write_tar(tmp_path / "1.tar", {**sample("0", 30, key="0", **caption("c")), **sample("1", 40, **caption("d"))})
    found = read(tmp_path)
    assert contents(found) == [[10], [20], [30], [40]]
    assert found.queries("en") == [(0, "a"), (1, "b"), (2, "c"), (3, "d")]


@pytest.mark.parametrize(("first", "keys"), [("0", ("0.png", "1")), ("00007", (7, 7.0)), ("./x/0", ("x/0", "0"))])
def test_keys_that_repeat_such_names_mean_nothing_either(tmp_path: Path, first: str, keys: tuple[object, ...]) -> None:
    for shard, level in (("0", 10), ("1", 20)):
        parts = [sample(first, level, key=keys[0], **caption("a")), sample("1", level + 5, key=keys[1], **caption("b"))]
        write_tar(tmp_path / f"{shard}.tar", parts[0] | parts[1])
    found = contents(read(tmp_path))
    assert len([levels for levels in found if levels in ([10], [20])]) == 2


def test_a_folder_is_the_set_that_it_is_in_tars(tmp_path: Path) -> None:
    """Keys that repeat the name of the files say nothing, identities count, and keep equal pictures apart."""
    for folder, level in (("a", 10), ("b", 30)):
        parts = [
            sample("0", level, key="0", **caption("zero")),
            sample("1", level + 10, identity=5, **caption("one")),
            sample("2", 50, identity=folder, **caption("two")),
        ]
        (tmp_path / "pictures" / folder).mkdir(parents=True)
        for part in parts:
            for name, content in part.items():
                (tmp_path / "pictures" / folder / name).write_bytes(content)
    source = find_source(str(tmp_path / "pictures"), columns=Columns())
    pack(source, tmp_path / "tars", PackOptions(samples_per_shard=2), workers=0)
    for place in ("pictures", "tars"):
        found = read(tmp_path / place)
        assert contents(found) == [[10], [20, 40], [50], [30], [50]]
        assert found.reading == SetReading(samples=6, repeated_images=0, kept_apart=1)


def test_marks_and_equal_pictures_are_one_content(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "0.tar",
        sample("0", 10, **caption("ten"))
        | sample("1", 20, identity=7, **caption("twenty"))
        | sample("2", 10, **caption("ten"))
        | sample("3", 10, key="row 3", **caption("ten again"))
        | sample("4", 30, identity="7", **caption("thirty"))
        | sample("5", 40, key="row 3", **caption("forty"))
        | sample("6", 50, key="k", **caption("ten")),
    )
    found = read(tmp_path)
    assert contents(found) == [[10, 40], [20, 30], [50]]
    assert [text for _, text in found.queries("en")] == ["ten", "ten again", "twenty", "thirty", "forty", "ten"]
    assert [number for number, _ in found.queries("en")] == [0, 0, 1, 1, 0, 2]
    assert found.reading == SetReading(samples=7, repeated_images=2)
    assert found.languages == ("en",)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (1, 0, 2)])
def test_different_identities_keep_equal_pictures_apart(tmp_path: Path, order: tuple[int, ...]) -> None:
    parts = [
        sample("0", 10, **caption("no mark")),
        sample("1", 10, identity="x", **caption("x")),
        sample("2", 10, identity="y", **caption("y")),
    ]
    for place, number in enumerate(order):
        write_tar(tmp_path / f"{place}.tar", parts[number])
    found = read(tmp_path)
    assert found.reading == SetReading(samples=3, repeated_images=1, kept_apart=1)
    assert contents(found) == [[10], [10]]
    assert len({number for number, _ in found.queries("en")}) == 2


def test_keys_of_the_built_in_set_are_identities(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {**sample("0", 10, key="a"), **sample("1", 10, key="b"), **sample("2", 20, key="b")})
    found = read_retrieval_set(tmp_path, name="toy", transform=EvalTransform(4), split="val")
    assert contents(found) == [[10], [10, 20]]
    assert contents(read(tmp_path)) == [[10, 20]]


def test_rows_and_lists_are_the_same_set(tmp_path: Path) -> None:
    words = [[f"picture {level}, said {number}" for number in range(5)] for level in (10, 20, 30, 40)]
    for kind in ("rows", "lists", "twice"):
        (tmp_path / kind).mkdir()
    lists = [sample(str(n), 10 * (n + 1), captions={"en": texts}) for n, texts in enumerate(words)]
    write_tar(tmp_path / "lists" / "0.tar", {name: content for part in lists for name, content in part.items()})
    for copy in ("0", "1"):
        (tmp_path / "twice" / f"{copy}.tar").write_bytes((tmp_path / "lists" / "0.tar").read_bytes())
    rows = [
        sample(f"{n}{m}", 10 * (n + 1), **caption(text))
        for n, texts in enumerate(words)
        for m, text in enumerate(texts)
    ]
    write_tar(tmp_path / "rows" / "0.tar", {name: content for part in rows for name, content in part.items()})
    wanted = read(tmp_path / "lists")
    assert wanted.queries("en") == [(n, text) for n, texts in enumerate(words) for text in texts]
    for kind, samples in (("rows", 20), ("twice", 8)):
        found = read(tmp_path / kind)
        assert found.queries("en") == wanted.queries("en")
        assert torch.equal(found.images, wanted.images)
        assert found.reading == SetReading(samples, samples - 4)


def test_captions_of_every_role_but_search_words_are_queries(tmp_path: Path) -> None:
    texts = [{"text": role, "role": role} for role in ("original", "rewritten", "name", "alias", "keyword", "keyword")]
    zh = [{"text": " 红色的圆 ", "role": "translated"}]
    ja = ["赤い丸"]
    write_tar(
        tmp_path / "0.tar",
        {**sample("0", 10, captions={"en": texts, "zh": zh, "ja": ja}), **sample("1", 20, **caption("b"))},
    )
    found = read(tmp_path)
    assert found.languages == ("zh", "en")
    assert found.queries("en") == [(0, "original"), (0, "rewritten"), (0, "name"), (1, "b")]
    assert found.queries("zh") == [(0, "红色的圆")]
    assert found.captions_of(1, "zh") == ()
    assert found.reading == SetReading(2, left_out={"alias": 1, "keyword": 2}, other_languages={"ja": 1})


def test_many_pictures_are_read_into_one_array(tmp_path: Path) -> None:
    levels = list(range(200))
    write_tar(tmp_path / "0.tar", {name: c for n in levels for name, c in sample(f"{n:03}", n).items()})
    found = read(tmp_path)
    assert [int(image[0, 0, 0]) for image in found.images] == levels
    assert found.images.untyped_storage().nbytes() == found.images.nbytes


def test_equals_the_transform(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 6, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    write_tar(tmp_path / "a.tar", {**sample("a", 0), "a.png": stream.getvalue()})
    assert read(tmp_path).images[0].equal(EvalTransform(4).to_uint8(pixels))


@pytest.mark.parametrize("policy", [STANDARD, OFFICIAL, PicturePolicy(background="grey")])
def test_a_folder_has_the_pixels_of_its_files(tmp_path: Path, policy: PicturePolicy) -> None:
    deep = Image.fromarray(np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8))
    clear = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(8, 8, 4), "RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6
    deep.save(tmp_path / "a.png")
    deep.save(tmp_path / "b.tif", tiffinfo={0x0112: 6})
    clear.save(tmp_path / "c.tif")
    clear.convert("RGB").save(tmp_path / "d.bmp")
    clear.convert("RGB").save(tmp_path / "e.webp", lossless=True, exif=exif)
    for name in "abcde":
        (tmp_path / f"{name}.txt").write_text(f"a {name}")
    transform = EvalTransform(8, pictures=policy)
    found = read_retrieval_set(tmp_path, name="toy", transform=transform)
    for image, name in zip(found.images, ("a.png", "b.tif", "c.tif", "d.bmp", "e.webp"), strict=True):
        assert torch.equal(image, transform.to_uint8(tmp_path / name)), name


def test_tars_that_systems_leave_behind_are_not_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", sample("a", 1))
    (tmp_path / "._0.tar").write_bytes(b"mac")
    assert len(read(tmp_path).keys) == 1


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
        assert len(read(tmp_path).keys) == 3
    assert snapshot() == before
    assert f"a.tar{INDEX_SUFFIX}" not in before
    assert built == ["a.tar", "c.tar"] * 2  # once each for checking and reading
    assert [said for said in caplog.messages if "recall at 10" not in said] == []  # which three samples deserve


BAD = {
    "no json": ({"a.png": image_bytes(1)}, "a.tar:a: missing_caption .*wanted a json"),
    "broken json": ({**sample("a", 1), "a.json": b"{"}, "a.tar:a: bad_json"),
    "json without captions": ({**sample("a", 1), "a.json": b"[]"}, "a.tar:a: bad_json: holds a list"),
    "no image": ({"a.json": sample("a", 1)["a.json"]}, "a.tar:a: missing_image .*wanted one of jpg, jpeg"),
    "broken image": ({**sample("a", 1), "a.png": image_bytes(1)[:40]}, "a.tar:a: .*"),
    "empty captions": (sample("a", 1, captions={"en": [" "], "zh": [""]}), "a.tar:a: missing_caption"),
    "unknown role": (
        sample("a", 1, captions={"en": [{"text": "cat", "role": "title"}]}),
        "a.tar:a: wrong_type: unknown role title",
    ),
    "keywords alone": (
        sample("a", 1, captions={"en": [{"text": "cat", "role": "keyword"}]}),
        "all captions are of the roles alias and keyword, which are no queries; give captions of another role",
    ),
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
    with pytest.raises(UserError, match=r"no \*\.tar in .*no image in it"):
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
