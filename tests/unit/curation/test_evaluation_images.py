from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import pytest

from m2_encoder.curation.evaluation_images import hash_files, join_hashes, plan_hashes, read_hash_list, write_hash_list
from m2_encoder.curation.executors import LocalExecutor
from m2_encoder.curation.pipeline import curate
from m2_encoder.curation.settings import CurationSettings
from m2_encoder.curation.sources import list_shards
from m2_encoder.errors import UserError
from tests.support.curation import decided, draw, encode, read_decisions
from tests.support.shards import write_tar

MAX_PIXELS = 10**6


def collect_hashes(*places: Path) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        tasks = plan_hashes([str(place) for place in places], Path(folder), max_pixels=MAX_PIXELS)
        for task in tasks:
            hash_files(task)
        return join_hashes(tasks)


def test_lists_tars_and_folders_say_the_same(tmp_path: Path) -> None:
    images = {f"{number}.png": encode(draw(number)) for number in range(4)}
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    for name, content in images.items():
        (tmp_path / "folder" / "deep" / name).write_bytes(content)
    members = list(images.items())
    members += [(name.replace("png", "txt"), b"a cat") for name in images]
    write_tar(tmp_path / "tars" / "0.tar", members)
    by_folder = collect_hashes(tmp_path / "folder")
    assert collect_hashes(tmp_path / "tars") == by_folder
    write_hash_list(tmp_path / "list.txt", by_folder)
    assert collect_hashes(tmp_path / "list.txt") == by_folder
    found = read_hash_list(tmp_path / "list.txt")
    assert set(found.hashes.to_pylist()) == {hashlib.sha256(content).digest() for content in images.values()}
    assert len(found.perceptual) == len(found.colors) == 4


def test_many_images_are_several_tasks(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"{number}.jpg").write_bytes(b"image %d" % number)
    tasks = plan_hashes([str(tmp_path)], tmp_path / "work", max_pixels=MAX_PIXELS)
    assert [len(task.files) for task in tasks] == [256, 44]
    assert collect_hashes(tmp_path) == sorted(hashlib.sha256(b"image %d" % n).hexdigest() for n in range(300))


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_output_of_sha256sum_is_a_list(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "sums.txt"
    path.write_text(f"{mark}{'0A' * 32}  images/a b.jpg\n\n{'b' * 64} *c.jpg\n", encoding="utf-8")
    found = read_hash_list(path)
    assert found.hashes.to_pylist() == [b"\n" * 32, b"\xbb" * 32]
    assert len(found.perceptual) == 0


def test_damaged_evaluation_images_count_by_their_bytes(tmp_path: Path) -> None:
    for name in ("._a.jpg", "__MACOSX/a.jpg", ".hidden/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"left behind")
    (tmp_path / "a.jpg").write_bytes(b"no image")
    assert collect_hashes(tmp_path) == [hashlib.sha256(b"no image").hexdigest()]


@pytest.mark.parametrize(
    ("content", "message"), [("hello\n", "line 1, 'hello', is no SHA-256"), ("", "no image or hash")]
)
def test_wrong_lists(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "list.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        collect_hashes(path)


def test_missing_place(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        collect_hashes(tmp_path / "none")


def test_evaluation_images_and_their_copies_fall(tmp_path: Path) -> None:
    picture = draw(1, width=200, height=160)
    images = [encode(picture), encode(picture.resize((150, 120)), "JPEG", quality=80), encode(draw(2))]
    members = []
    for number, image in enumerate(images):
        members += [(f"{number}.{'jpg' if number == 1 else 'png'}", image), (f"{number}.txt", b"a green boat")]
    write_tar(tmp_path / "web" / "0.tar", members)
    (tmp_path / "benchmark.png").write_bytes(images[0])
    shards = list_shards({"web": str(tmp_path / "web")})
    output = tmp_path / "out"
    places = [str(tmp_path / "benchmark.png")]
    curate(shards, output, CurationSettings(), executor=LocalExecutor(0), evaluation=places)
    assert [d.reason for d in decided(read_decisions(output))] == ["evaluation_image", "evaluation_image", None]
    assert len((output / "evaluation_hashes.txt").read_text().splitlines()) == 1
    again = tmp_path / "again"
    curate(
        shards, again, CurationSettings(), executor=LocalExecutor(0), evaluation=[str(output / "evaluation_hashes.txt")]
    )
    assert decided(read_decisions(again)) == decided(read_decisions(output))
