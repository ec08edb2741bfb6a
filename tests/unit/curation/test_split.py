from __future__ import annotations

import errno
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from m2_encoder.curation import split as split_module
from m2_encoder.curation.split import SplitOptions, SplitResult, split
from m2_encoder.curation.split_groups import GlueOptions
from m2_encoder.data.shards.index import build_index
from m2_encoder.errors import UserError
from tests.support.shards import make_image, write_tar

Members = list[tuple[str, bytes]]


def sample(name: str, number: int, caption: str, **metadata: Any) -> Members:
    value = {"captions": {"en": [caption]}, **metadata}
    return [(f"{name}.png", make_image(number)), (f"{name}.json", json.dumps(value).encode())]


def plain(count: int, *, first: int = 0) -> Members:
    return [member for n in range(first, first + count) for member in sample(f"{n:06d}", n, f"caption {n}")]


def run(paths: list[Path], output: Path, **options: Any) -> SplitResult:
    glue = GlueOptions(**{name: options.pop(name) for name in tuple(options) if name in GlueOptions._fields})
    return split([str(path) for path in paths], output, SplitOptions(glue=glue, **options), workers=0)


def read(output: Path) -> dict[str, dict[str, bytes]]:
    """Content of members by side and name of tar and member."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(output.glob("*/*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                file = tar.extractfile(info)
                assert file is not None
                found.setdefault(path.parent.name, {})[f"{path.name}:{info.name}"] = file.read()
    return found


def keys(output: Path, side: str) -> set[str]:
    return {name.partition(":")[2].partition(".")[0] for name in read(output)[side]}


def test_the_share_is_exact_where_nothing_is_shared(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / f"{n}.tar", plain(25, first=25 * n)) for n in range(2)]
    record = run(tars, tmp_path / "out", share=0.2).record
    assert [side["samples"] for side in record["sides"].values()] == [40, 10]
    assert record["on_both_sides"] == {"pictures": 0, "captions": 0, "identities": 0}
    assert record["groups"] == 50
    assert [len(build_index(path)) for path in sorted((tmp_path / "out").glob("val/*.tar"))] != [10], "of both tars"


def test_all_files_of_a_sample_are_copied_byte_for_byte(tmp_path: Path) -> None:
    members = [*plain(9), ("a/X.JPG", make_image(90, kind="JPEG")), ("a/X.TXT", "一只猫".encode())]
    members += [("a/X.seg.png", b"mask"), ("a/X.cls", b"7"), ("a/._X.JPG", b"junk"), ("alone.jpg", b"x")]
    tar = write_tar(tmp_path / "t.tar", members)
    record = run([tar], tmp_path / "out", share=0.5).record
    copied = {
        name.partition(":")[2]: content for side in read(tmp_path / "out").values() for name, content in side.items()
    }
    assert copied == {name: content for name, content in members if "._" not in name and "alone" not in name}
    assert record["unusable"] == {"missing_caption": 1}
    failure = json.loads((tmp_path / "out" / "failures.jsonl").read_text())
    assert failure["key"] == "alone"


@pytest.mark.parametrize(
    "pair",
    [
        [*sample("a", 500, "one"), *sample("b", 500, "two")],
        [*sample("a", 500, "One  cat"), *sample("b", 501, "one cat")],
        [*sample("a", 500, "one", identity="cat"), *sample("b", 501, "two", identity="cat")],
        [*sample("a", 500, "one", key="cats/1"), *sample("b", 501, "two", key="cats/1")],
        [*sample("a", 500, "x"), *sample("c", 500, "y"), *sample("b", 501, "Y")],
    ],
    ids=["picture", "caption", "identity", "key", "over another"],
)
def test_what_is_shared_stays_together(tmp_path: Path, pair: Members) -> None:
    tar = write_tar(tmp_path / "t.tar", [*plain(4), *pair])
    for seed in range(8):
        run([tar], tmp_path / str(seed), share=0.5, seed=seed)
        held = keys(tmp_path / str(seed), "val")
        assert ("a" in held) == ("b" in held)


def test_similar_pictures_stay_together(tmp_path: Path) -> None:
    members = plain(6)
    for name, kind in (("a", "PNG"), ("b", "WEBP")):
        members += [(f"{name}.{kind.lower()}", make_image(5000, side=64, kind=kind)), (f"{name}.txt", name.encode())]
    tar = write_tar(tmp_path / "t.tar", members)
    assert run([tar], tmp_path / "near", share=0.5).record["glued"] == {"similar picture": 2}
    assert run([tar], tmp_path / "exact", share=0.5, near_images=None).record["glued"] == {}


def test_a_folder_of_the_original_path_stays_together(tmp_path: Path) -> None:
    members = [
        member for n in range(40) for member in sample(f"{n:06d}", n, f"caption {n}", key=f"animals/{n // 10}/{n}")
    ]
    record = run([write_tar(tmp_path / "t.tar", members)], tmp_path / "out", share=0.25, by="folder").record
    held = {int(key) // 10 for key in keys(tmp_path / "out", "val")}
    assert len(held) == 1
    assert [side["samples"] for side in record["sides"].values()] == [30, 10]


def test_folders_are_missing(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", plain(4))
    with pytest.raises(UserError, match=r"by=folder: no sample has a folder"):
        run([tar], tmp_path / "out", by="folder")


def test_by_hash_more_data_leave_others_where_they_are(tmp_path: Path) -> None:
    few, many = write_tar(tmp_path / "0.tar", plain(60)), write_tar(tmp_path / "1.tar", plain(60, first=60))
    run([few], tmp_path / "few", share=0.3, by="hash")
    record = run([few, many], tmp_path / "many", share=0.3, by="hash").record
    assert keys(tmp_path / "few", "val") == {key for key in keys(tmp_path / "many", "val") if int(key) < 60}
    assert 0.15 < record["sides"]["val"]["share"] < 0.45


def test_a_frequent_caption_does_not_glue_in_silence(tmp_path: Path) -> None:
    members = [member for n in range(20) for member in sample(f"{n:06d}", n, "photo" if n % 2 else f"caption {n}")]
    tar = write_tar(tmp_path / "t.tar", members)
    record = run([tar], tmp_path / "glued", share=0.2).record
    assert record["largest_group"] == 10
    assert record["largest_group_shares"] == {"kind": "caption", "value": "photo", "samples": 10}
    record = run([tar], tmp_path / "free", share=0.5, max_repeats=5).record
    assert (record["groups"], record["on_both_sides"]["captions"]) == (20, 1)


def test_one_group_is_refused_with_its_cause(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", [member for n in range(5) for member in sample(f"{n}", n, "photo")])
    with pytest.raises(UserError, match=r"'photo'; with max_repeats=1, captions of more samples") as caught:
        run([tar], tmp_path / "out", by="hash")
    assert caught.value.key == "val"
    assert not (tmp_path / "out").exists()


def test_no_share_helps_one_sample_or_one_class(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^source: one usable sample cannot be split; pack more pictures$"):
        run([write_tar(tmp_path / "one.tar", plain(1))], tmp_path / "out")
    cats = [member for n in range(5) for member in sample(f"{n}", n, "a cat", identity="cat")]
    tar = write_tar(tmp_path / "cats.tar", cats)
    with pytest.raises(UserError, match=r"no share splits one group.*the identity 'cat'; with by=picture") as caught:
        run([tar], tmp_path / "out")
    assert "max_repeats" not in str(caught.value), "captions are not all that keeps them together"
    assert "give another share" not in str(caught.value)
    run([tar], tmp_path / "out", by="picture")


def test_small_groups_are_not_named_where_the_share_is_at_fault(tmp_path: Path) -> None:
    pair = sample("a", 90, "photo") + sample("b", 91, "photo")
    with pytest.raises(UserError, match="22 samples are 21 groups that stay together; give another share"):
        run([write_tar(tmp_path / "t.tar", plain(20) + pair)], tmp_path / "out", share=0.999)


def test_names_of_tars_and_keys_that_begin_anew(tmp_path: Path) -> None:
    tars = [
        write_tar(tmp_path / name / "0.tar", [m for n in range(4) for m in sample(f"{n}", 10 * k + n, f"{name} {n}")])
        for k, name in enumerate(("a", "b"))
    ]
    record = run(tars, tmp_path / "out", share=0.5).record
    assert record["groups"] == 8
    found = read(tmp_path / "out")
    assert {name.partition(":")[0] for side in found.values() for name in side} == {"a-0.tar", "b-0.tar"}
    assert sum(len(side) for side in found.values()) == 16


def test_bytes_do_not_hang_on_workers_and_a_second_start_does_nothing(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / f"{n}.tar", plain(5, first=5 * n)) for n in range(2)]
    run(tars, tmp_path / "one", share=0.4)
    options = SplitOptions(share=0.4)
    result = split([str(path) for path in tars], tmp_path / "two", options, workers=2)
    assert read(tmp_path / "one") == read(tmp_path / "two")
    again = split([str(path) for path in tars], tmp_path / "two", options, workers=0)
    assert (again.was_finished, again.record) == (True, result.record)
    with pytest.raises(UserError, match="overwrite=true"):
        run(tars, tmp_path / "two", share=0.2)
    split([str(path) for path in tars], tmp_path / "two", SplitOptions(share=0.2), workers=0, overwrite=True)
    assert len(keys(tmp_path / "two", "val")) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar", "1.tar", "one", "two"]


def test_a_full_disk_is_one_line_and_done_tars_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tars = [write_tar(tmp_path / f"{n}.tar", plain(5, first=5 * n)) for n in range(2)]
    real = split_module.open_index
    opened: list[Path] = []

    def fill(path: Path) -> object:
        opened.append(path)
        if len(opened) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path)

    monkeypatch.setattr(split_module, "open_index", fill)
    with pytest.raises(UserError, match=r"No space left on device.*start again: tars that are done stay") as caught:
        run(tars, tmp_path / "out", share=0.4)
    assert (caught.value.key, (tmp_path / "out").exists()) == ("output", False)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / ".out.partial").glob("*/*.tar")}
    assert done
    run(tars, tmp_path / "out", share=0.4)
    for path, written in done.items():
        assert (tmp_path / "out" / path.parent.name / path.name).stat().st_mtime_ns == written
    assert not (tmp_path / ".out.partial").exists()


def test_a_folder_of_others_is_not_touched(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", plain(4))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds something else"):
            split([str(tar)], tmp_path / "out", SplitOptions(), workers=0, overwrite=overwrite)


def test_a_picture_that_cannot_be_decoded_is_on_neither_side(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", [*plain(4), ("bad.png", make_image(9)[:60]), ("bad.txt", b"cut")])
    record = run([tar], tmp_path / "out", share=0.5).record
    assert (record["samples"], record["unusable"]) == (4, {"undecodable_image": 1})
