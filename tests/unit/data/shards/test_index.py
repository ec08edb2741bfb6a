"""Indices against `tarfile`, of damaged tars, and when they are built anew."""

from __future__ import annotations

import logging
import os
import random
import tarfile
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from m2_encoder.data.shards.index import INDEX_SUFFIX, ShardIndex, build_index, load_index, open_index
from m2_encoder.data.shards.reader import OpenShard
from tests.support.shards import make_sample, write_tar

NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/."), min_size=1, max_size=60)
FORMATS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
NOISE = random.Random(0).randbytes(4096)


def pair(key: str, image: bytes = b"image", caption: bytes = b"{}") -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", image), (f"{key}.json", caption)]


def reasons(index: ShardIndex) -> Counter[tuple[str | None, str]]:
    return Counter((fault.key, fault.reason) for fault in index.faults)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(
    keys=st.lists(
        st.tuples(NAMES, st.lists(NAMES, max_size=6)), unique_by=lambda k: "/".join([*k[1], k[0]]), max_size=9
    ),
    sizes=st.lists(st.sampled_from([1, 511, 512, 513, 2000]), min_size=9, max_size=9),
    form=FORMATS,
)
def test_places_are_those_of_tarfile(
    tmp_path: Path, keys: list[tuple[str, list[str]]], sizes: list[int], form: int
) -> None:
    names = ["/".join([*folders, name]) for name, folders in keys]
    form = tarfile.GNU_FORMAT if any(len(name.encode()) > 90 for name in names) and form == 0 else form
    members = [m for name, size in zip(names, sizes, strict=False) for m in pair(name, bytes(size), b"1" * size)]
    path = write_tar(tmp_path / "a.tar", members, form=form)
    index = build_index(path)
    assert not index.faults
    assert [index[i].key for i in range(len(index))] == names
    with tarfile.open(path) as tar:
        known = {info.name: (info.offset_data, info.size) for info in tar}
    for i, name in enumerate(names):
        assert index[i].image == known[f"{name}.jpg"]
        assert index[i].json == known[f"{name}.json"]
        assert index[i].text is None


def test_names_that_differ_by_case_of_the_extension_and_other_members(tmp_path: Path) -> None:
    members = [("a.JPEG", b"x"), ("a.cls", b"1"), ("a.txt", b"y"), ("folder/b.c.webp", b"z"), ("folder/b.webp", b"z")]
    index = build_index(write_tar(tmp_path / "a.tar", [*members, ("folder/b.json", b"{}")]))
    assert [(index[i].key, index[i].extension, index[i].text is None) for i in range(2)] == [
        ("a", "jpeg", False),
        ("folder/b", "webp", True),
    ]


def test_the_file_says_the_same_as_the_scan(tmp_path: Path) -> None:
    members = [*pair("一"), *pair("b"), ("c.jpg", b"lonely"), *pair("d")]
    path = write_tar(tmp_path / "a.tar", members, form=tarfile.PAX_FORMAT)
    built = open_index(path)
    loaded = load_index(f"{path}{INDEX_SUFFIX}")
    assert loaded is not None
    assert [loaded[i] for i in range(len(loaded))] == [built[i] for i in range(len(built))]
    assert loaded.faults == built.faults
    assert (loaded.size, loaded.written) == (built.size, built.written)
    with pytest.raises(IndexError, match="sample 3 of a shard with 3"):
        loaded[3]


def test_it_is_built_once_and_again_when_the_tar_changes(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pair("a"))
    open_index(path)
    kept = Path(f"{path}{INDEX_SUFFIX}")
    first = kept.stat()
    open_index(path)
    assert kept.stat().st_ino == first.st_ino
    write_tar(path, [*pair("a"), *pair("b")])
    assert len(open_index(path)) == 2
    assert kept.stat().st_ino != first.st_ino
    os.utime(path, ns=(1, 1))  # of the same size, but another time
    assert open_index(path).written == 1
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.endswith(".tmp")] == []


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "foreign"])
def test_a_damaged_index_is_built_anew(tmp_path: Path, damage: str) -> None:
    path = write_tar(tmp_path / "a.tar", [*pair("a"), *pair("b")])
    whole = open_index(path).dump()
    flipped = bytearray(whole)
    flipped[-20] ^= 4
    content = {"empty": b"", "cut": whole[:-9], "flipped": bytes(flipped), "foreign": b"not an index at all"}[damage]
    kept = Path(f"{path}{INDEX_SUFFIX}")
    kept.write_bytes(content)
    assert load_index(kept) is None
    assert len(open_index(path)) == 2
    assert kept.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tar(tmp_path / "a.tar", pair("a"))

    def refuse(*_: object) -> int:
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with caplog.at_level(logging.WARNING):
        assert len(open_index(path)) == 1
    assert "every process will scan the tar again" in caplog.text


def test_every_fault_is_found_by_its_reason(tmp_path: Path) -> None:
    members = [
        *pair("good"),
        ("alone.jpg", b"x"),
        ("silent.json", b"{}"),
        *pair("empty", image=b""),
        *pair("hollow", caption=b""),
        *pair("twice"),
        *pair("other"),
        *pair("twice"),
        *pair("twice"),
        ("last.png", b"x"),
        ("last.txt", b"text"),
    ]
    index = build_index(write_tar(tmp_path / "a.tar", members))
    assert [index[i].key for i in range(len(index))] == ["good", "twice", "other", "last"]
    assert index[1].image.offset < index[2].image.offset, "the first of two counts"
    assert reasons(index) == Counter(
        {
            ("alone", "missing_caption"): 1,
            ("silent", "missing_image"): 1,
            ("empty", "empty_member"): 1,
            ("hollow", "empty_member"): 1,
            ("twice", "duplicate_key"): 2,
        }
    )


def test_every_cut_leaves_what_is_whole(tmp_path: Path) -> None:
    keys = ["a", "b", "c"]
    whole = write_tar(tmp_path / "a.tar", [m for key in keys for m in pair(key, b"i" * 700, b"j" * 30)]).read_bytes()
    ends = [(512 + 1024 + 512 + 512) * (i + 1) for i in range(3)]  # of the padded samples
    cut = tmp_path / "cut.tar"
    for size in range(0, ends[-1] + 1, 64):
        cut.write_bytes(whole[:size])
        index = build_index(cut)
        # The bytes of the last caption may be all there although its padding is not.
        usable = sum(size >= end - 512 + 30 for end in ends)
        assert [index[i].key for i in range(len(index))] == keys[:usable], size
        shard_faults = [fault for fault in index.faults if fault.key is None]
        assert len(shard_faults) == 1, size
        assert shard_faults[0].reason == ("truncated_shard" if size >= 512 else "not_a_tar")
        assert {fault.reason for fault in index.faults} <= {"truncated_shard", "not_a_tar"}
        lost = [fault.key for fault in index.faults if fault.key is not None]
        begun = sum(size >= end - ends[0] + 512 for end in ends)
        assert lost == keys[usable:begun], size


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(content=st.binary(max_size=3000), position=st.integers(0, 6000), bits=st.integers(1, 255))
def test_no_bytes_raise(tmp_path: Path, content: bytes, position: int, bits: int) -> None:
    garbage = tmp_path / "garbage.tar"
    garbage.write_bytes(content)
    index = build_index(garbage)
    assert len(index) == 0 or content.strip(b"\0")
    whole = bytearray(write_tar(tmp_path / "a.tar", [m for key in "abc" for m in pair(key)]).read_bytes())
    whole[position] ^= bits
    garbage.write_bytes(whole)
    for fault in build_index(garbage).faults:
        assert fault.reason in {"truncated_shard", "not_a_tar", "missing_caption", "missing_image", "duplicate_key"}


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (NOISE, "not a tar"),
        (b"", "empty, 0 bytes"),
        (b"short", "no tar, 5 bytes"),
        (b"\x1f\x8b" + NOISE[:2048], "packed with gzip; unpack it"),
        (b"<html>Not found</html>" * 50, "not a tar"),
    ],
)
def test_what_is_no_tar_is_said(tmp_path: Path, content: bytes, detail: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    (fault,) = build_index(path).faults
    assert (fault.key, fault.reason) == (None, "not_a_tar")
    assert detail in fault.detail


def damaged_header(size: bytes, *, kind: bytes, is_sound: bool) -> bytes:
    """A header of 512 bytes with its field of 12 bytes for the size set, and its checksum made anew if sound."""
    header = bytearray(tarfile.TarInfo("b.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136], header[156:157] = size, kind
    if is_sound:
        header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * ord(" "))
    return bytes(header)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    size=st.one_of(
        st.binary(min_size=11, max_size=11).map(lambda rest: b"\x80" + rest),  # binary, up to 2^88
        st.text("01234567-_+ \0", min_size=12, max_size=12).map(str.encode),
        st.binary(min_size=12, max_size=12),
    ),
    kind=st.sampled_from([b"0", b"x", b"L", b"g", b"K", b"5"]),
    is_sound=st.booleans(),
)
@example(size=b"\x80" + b"\xff" * 11, kind=b"0", is_sound=False)  # beyond the largest offset of a file
@example(size=b"\x80" + b"\xff" * 11, kind=b"0", is_sound=True)
@example(size=b"\x80\0\0\0\x7f" + b"\xff" * 7, kind=b"L", is_sound=True)
@example(size=b"-7777777777\0", kind=b"0", is_sound=True)  # would lead before the beginning
@example(size=b"-7777777777\0", kind=b"x", is_sound=False)
@example(size=b"-0000002000\0", kind=b"0", is_sound=False)  # would lead back to the beginning
def test_no_size_raises(tmp_path: Path, size: bytes, kind: bytes, is_sound: bool) -> None:
    content = bytearray(write_tar(tmp_path / "a.tar", [m for key in "abc" for m in pair(key)]).read_bytes())
    content[2048:2560] = damaged_header(size, kind=kind, is_sound=is_sound)
    (tmp_path / "b.tar").write_bytes(content)
    index = build_index(tmp_path / "b.tar")
    assert index[0].key == "a"
    if not is_sound:
        assert [(f.key, f.reason, f.detail) for f in index.faults] == [
            (None, "truncated_shard", "damaged at byte 2048")
        ]


@pytest.mark.parametrize("length", [b"9" * 24, b"9" * 5000], ids=["beyond a file", "beyond what int() reads"])
@pytest.mark.parametrize("record", [b"size=%s", b"%s path=x"], ids=["of the file", "of the record"])
def test_lengths_of_extended_headers_never_raise(tmp_path: Path, length: bytes, record: bytes) -> None:
    text = record % length
    text = text if record.startswith(b"%s") else b"%d %s\n" % (len(text) + 6, text)
    info = tarfile.TarInfo("a.pax")
    info.type, info.size = tarfile.XHDTYPE, len(text)
    padding = bytes(-len(text) % 512)
    whole = write_tar(tmp_path / "a.tar", [m for key in "ab" for m in pair(key)]).read_bytes()
    before, after = whole[:2048], whole[2048:]
    (tmp_path / "b.tar").write_bytes(before + info.tobuf(tarfile.USTAR_FORMAT) + text + padding + after)
    assert build_index(tmp_path / "b.tar")[0].key == "a"


def test_damage_in_the_middle_keeps_what_is_before(tmp_path: Path) -> None:
    content = bytearray(write_tar(tmp_path / "a.tar", [m for key in "abc" for m in pair(key)]).read_bytes())
    content[2048:2560] = NOISE[:512]  # the header of b.jpg
    (tmp_path / "b.tar").write_bytes(content)
    index = build_index(tmp_path / "b.tar")
    assert [index[i].key for i in range(len(index))] == ["a"]
    assert [(f.key, f.reason, f.detail) for f in index.faults] == [(None, "truncated_shard", "damaged at byte 2048")]


def test_sizes_beyond_octal_digits(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = 9 * 2**30
    path = tmp_path / "a.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(512))
    (shard, own) = build_index(path).faults
    assert (own.key, own.reason) == ("a", "truncated_shard")
    assert "cut at byte 1024" in shard.detail


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_further_files_stand_beside_the_image_among_unusable_neighbours(tmp_path: Path, form: int) -> None:
    long = "l" * (90 if form == tarfile.USTAR_FORMAT else 200)
    members: list[tuple[str, bytes]] = []
    for key in ("alone", "a", "mute", long, "c", "last"):
        members += [(f"{key}.Depth.bin", key.encode())]
        if key not in ("alone", "mute", "last"):
            members += [*make_sample(key, 1), (f"{key}.cls", b"7")]
    path = write_tar(tmp_path / "a.tar", members, form=form)
    with closing(OpenShard(str(path))) as shard:
        found = [shard.read(number, files=("depth.bin", "cls", "none")) for number in range(len(shard.index))]
    assert [(each.key, each.files) for each in found] == [
        (key, {"depth.bin": key.encode(), "cls": b"7"}) for key in ("a", long, "c")
    ]
