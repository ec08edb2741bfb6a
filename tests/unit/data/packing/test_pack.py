"""Packing as a whole: what is in the tars, and that neither workers nor interruptions change a byte."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from m2_encoder.data.inspect.inspection import InspectionOptions
from m2_encoder.data.inspect.survey import survey_source
from m2_encoder.data.loading.faults import SKIP_REASONS
from m2_encoder.data.packing.download import DownloadOptions
from m2_encoder.data.packing.encoding import ImageOptions
from m2_encoder.data.packing.pack import PackOptions, PackSummary, pack
from m2_encoder.data.packing.records import Columns
from m2_encoder.data.packing.sources import Source, find_source
from m2_encoder.data.shards.index import INDEX_SUFFIX, build_index, load_index
from m2_encoder.errors import UserError
from tests.support.image_server import serve_images
from tests.support.shards import make_image

PROGRAM = """
import sys
from pathlib import Path
from m2_encoder.data.packing.pack import PackOptions, pack
from m2_encoder.data.packing.records import Columns
from m2_encoder.data.packing.sources import find_source
if __name__ == "__main__":
    source = find_source(sys.argv[1], columns=Columns())
    pack(source, Path(sys.argv[2]), PackOptions(samples_per_shard=4), workers=int(sys.argv[3]))
"""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twenty sound samples, and two that fail."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(22):
        (folder / f"{number:03d}.png").write_bytes(make_image(number))
        (folder / f"{number:03d}.txt").write_text(f"图片 {number}" if number % 2 else f"picture {number}", "utf-8")
    (folder / "005.png").write_bytes(make_image(5)[:-100])
    (folder / "011.txt").unlink()
    return folder


def _source(path: Path) -> Source:
    return find_source(str(path), columns=Columns())


def _pack(photos: Path, output: Path, **values: Any) -> PackSummary:
    run = {"workers": values.pop("workers", 0), "overwrite": values.pop("overwrite", False)}
    return pack(_source(photos), output, PackOptions(**({"samples_per_shard": 4} | values)), **run)


def _digests(folder: Path) -> dict[str, str]:
    """Of everything but the records of the work itself."""
    paths = [path for path in folder.iterdir() if path.is_file() and path.suffix != ".index"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def _members(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as file:
        return {info.name: file.extractfile(info).read() for info in file}  # type: ignore[union-attr]


def test_content(photos: Path, tmp_path: Path) -> None:
    summary = _pack(photos, tmp_path / "out", pattern="x-%04d.tar")
    assert summary[:2] == (6, 20)
    assert summary.captions == {"en": 11, "zh": 9}
    assert summary.failed == {"missing_caption": 1, "undecodable_image": 1}
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == [f"x-{i:04d}.tar" for i in range(6)]
    members = _members(tmp_path / "out" / "x-0001.tar")
    assert sorted(members) == sorted(f"{i:09d}.{e}" for i in (4, 6, 7) for e in ("png", "json"))
    assert members["000000007.png"] == make_image(7)
    assert json.loads(members["000000007.json"]) == {
        "key": "007", "captions": {"zh": ["图片 7"]}, "width": 16, "height": 16,
    }  # fmt: skip
    failures = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert [(item["name"], item["reason"]) for item in failures] == [
        ("005.png", "undecodable_image"), ("011.png", "missing_caption"),
    ]  # fmt: skip
    said = json.loads((tmp_path / "out" / "pack.json").read_text())
    assert (said["samples"], said["shards"][1]["samples"]) == (20, 3)


def test_what_is_packed_can_be_trained_on(photos: Path, tmp_path: Path) -> None:
    _pack(photos, tmp_path / "out")
    survey = survey_source(sorted((tmp_path / "out").glob("*.tar")), InspectionOptions(), max_shards=None)
    assert len(survey.rows) == 20
    assert not any(item.content_faults or item.header_faults or item.shard_faults for item in survey.shards)


def test_workers_and_places_change_no_byte(photos: Path, tmp_path: Path) -> None:
    _pack(photos, tmp_path / "one")
    moved = photos.rename(tmp_path / "moved")
    for path in moved.iterdir():
        os.utime(path, (1, 1))
    _pack(moved, tmp_path / "two", workers=2)
    assert _digests(tmp_path / "one") == _digests(tmp_path / "two")


def test_second_run_does_nothing(photos: Path, tmp_path: Path) -> None:
    _pack(photos, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    summary = _pack(photos, tmp_path / "out")
    assert (summary.reused, summary.samples) == (6, 20)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_damaged_output_is_packed_again(photos: Path, tmp_path: Path) -> None:
    _pack(photos, tmp_path / "out")
    whole = _digests(tmp_path / "out")
    (tmp_path / "out" / "000001.tar").unlink()
    with (tmp_path / "out" / "000002.tar").open("r+b") as file:
        file.truncate(100)
    (tmp_path / "out" / ".pack" / "000003.tar.json").write_text("{", encoding="utf-8")
    (tmp_path / "out" / ".000004.tar.123.partial").write_text("left by a killed run", encoding="utf-8")
    assert _pack(photos, tmp_path / "out").reused == 3
    assert _digests(tmp_path / "out") == whole


def test_killed_runs_go_on(photos: Path, tmp_path: Path) -> None:
    """`kill -9` at growing delays, other numbers of workers in between; the end is that of one whole run."""
    _pack(photos, tmp_path / "whole")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    output = tmp_path / "out"
    for run in range(4):
        arguments = [sys.executable, str(program), str(photos), str(output), str(run % 3)]
        with subprocess.Popen(arguments, stderr=subprocess.DEVNULL) as process:
            shards = 0
            while process.poll() is None and shards <= run:
                shards = len(list(output.glob(".pack/*.tar.json")))
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
    summary = _pack(photos, output)
    assert summary.reused >= 1
    assert _digests(output) == _digests(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples_per_shard": 5}, r"packed with other options \(samples_per_shard\)"),
        ({"images": ImageOptions(quality=80)}, r"other options \(images\)"),
        ("rename", "000001.tar was packed from other records"),
        ("remove", "000005.tar was packed from other records"),
    ],
)
def test_other_input_is_refused_until_it_may_replace(
    photos: Path, tmp_path: Path, change: dict[str, Any] | str, message: str
) -> None:
    _pack(photos, tmp_path / "out")
    options = {} if isinstance(change, str) else change
    if change == "rename":
        (photos / "004.txt").rename(photos / "0041.txt")
        (photos / "004.png").rename(photos / "0041.png")
    elif change == "remove":
        for name in ("020", "021"):
            (photos / f"{name}.png").unlink()
            (photos / f"{name}.txt").unlink()
    with pytest.raises(UserError, match=message):
        _pack(photos, tmp_path / "out", **options)
    _pack(photos, tmp_path / "out", overwrite=True, **options)
    _pack(photos, tmp_path / "fresh", **options)
    assert _digests(tmp_path / "out") == _digests(tmp_path / "fresh")


@pytest.mark.parametrize("name", ["004.png", "004.txt", "011.txt"])
def test_files_that_were_written_again_are_packed_again(photos: Path, tmp_path: Path, name: str) -> None:
    """An image or caption of the same name and size is noticed by its time; one that was missing, too."""
    _pack(photos, tmp_path / "out")
    content = make_image(400) if name == "004.png" else "图片 4".encode()
    (photos / name).write_bytes(content)
    os.utime(photos / name, (1, 1))
    assert _pack(photos, tmp_path / "out").reused == 5
    _pack(photos, tmp_path / "fresh")
    assert _digests(tmp_path / "out") == _digests(tmp_path / "fresh")


def test_touched_files_leave_the_tars_as_they_are(photos: Path, tmp_path: Path) -> None:
    _pack(photos, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    os.utime(photos / "004.png", (1, 1))
    assert _pack(photos, tmp_path / "out").reused == 5
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert _pack(photos, tmp_path / "out").reused == 6


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_images_of_tables_that_were_written_again_are_packed_again(photos: Path, tmp_path: Path, kind: str) -> None:
    rows = [{"image": f"photos/{i:03d}.png", "caption": f"picture {i}"} for i in range(8)]
    table = tmp_path / f"table.{kind}"
    if kind == "jsonl":
        table.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif kind == "csv":
        table.write_text("image,caption\n" + "\n".join(",".join(row.values()) for row in rows), encoding="utf-8")
    else:
        pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs the extra `parquet`")
        importlib.import_module("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), table)
    _pack(table, tmp_path / "out")
    assert _pack(table, tmp_path / "out").reused == 2
    (photos / "006.png").write_bytes(make_image(600))
    assert _pack(table, tmp_path / "out").reused == 1
    assert _members(tmp_path / "out" / "000001.tar")["000000006.png"] == make_image(600)


def test_parquet_with_other_rows_of_the_same_size_is_packed_again(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs the extra `parquet`")
    table = tmp_path / "table.parquet"
    sizes = set()
    for word in ("cat", "dog"):
        rows = [{"image": make_image(i), "caption": f"{word} {i}"} for i in range(8)]
        options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        importlib.import_module("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), table, **options)
        sizes.add(table.stat().st_size)
        assert _pack(table, tmp_path / "out").reused == 0
    assert len(sizes) == 1
    assert b"dog 0" in _members(tmp_path / "out" / "000000.tar")["000000000.json"]


def test_shards_come_with_true_indices(photos: Path, tmp_path: Path) -> None:
    _pack(photos, tmp_path / "out", workers=2)
    tars = sorted((tmp_path / "out").glob("*.tar"))
    assert len(tars) == 6
    for tar in tars:
        index, status = load_index(f"{tar}{INDEX_SUFFIX}"), tar.stat()
        assert index is not None
        assert (index.size, index.written) == (status.st_size, status.st_mtime_ns)
        assert len(index) == len(build_index(tar)) > 0


def test_options_that_change_no_byte_may_change(photos: Path, tmp_path: Path) -> None:
    _pack(photos, tmp_path / "out")
    assert _pack(photos, tmp_path / "out", downloads=DownloadOptions(threads=2), workers=1).reused == 6


def test_foreign_folder_is_left_alone(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(UserError, match=r"holds other files \(thesis.txt\)"):
        _pack(photos, tmp_path / "out", overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_two_runs_do_not_mix(photos: Path, tmp_path: Path) -> None:
    _pack(photos, tmp_path / "out")

    def start_another(_: object) -> None:
        with pytest.raises(UserError, match="another m2-data pack writes there"):
            _pack(photos, tmp_path / "out")

    pack(_source(photos), tmp_path / "out", PackOptions(samples_per_shard=4), workers=0, report=start_another)


def test_nothing_usable(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(b"<html>")
        (tmp_path / "photos" / f"{number}.txt").write_text("cat", encoding="utf-8")
    with pytest.raises(UserError, match="nothing could be packed: 3 undecodable_image"):
        _pack(tmp_path / "photos", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))


def test_full_disk_is_said_in_one_line(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("m2_encoder.data.packing.shards._sync", full)
        with pytest.raises(UserError, match="No space left on device"):
            pack(_source(photos), tmp_path / "out", PackOptions(samples_per_shard=4), workers=0)
    assert not list((tmp_path / "out").glob("*.tar*"))
    assert not list((tmp_path / "out").glob(".*.partial"))


def test_images_from_the_web(tmp_path: Path) -> None:
    """Counts of every fault are exact, samples keep their order, and a second run may fetch what failed."""
    files = {f"{i}.png": make_image(i) for i in range(6)}
    with serve_images(files) as server:
        paths = ["0.png", "status/404", "1.png", "status/503", "half/2.png", "silent", "once/503/3.png", "4.png"]
        rows = [{"url": server.url(path), "caption": f"number {i}"} for i, path in enumerate(paths)]
        (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        options = PackOptions(downloads=DownloadOptions(threads=3, timeout_s=0.5, retries=0, wait_s=0.01))
        source, output = _source(tmp_path / "t.jsonl"), tmp_path / "out"
        summary = pack(source, output, options, workers=0)
        assert summary.failed == {"missing_image": 1, "remote_incomplete": 3, "remote_timeout": 1}
        assert set(summary.failed) <= set(SKIP_REASONS)
        first = [name for name in _members(output / "000000.tar") if name.endswith("png")]
        assert first == ["000000000.png", "000000002.png", "000000007.png"]
        again = pack(source, output, options._replace(retry_remote=True), workers=0)
        assert again.failed == {"missing_image": 1, "remote_incomplete": 2, "remote_timeout": 1}
        assert "000000006.png" in _members(output / "000000.tar")


def test_duplicate_files_and_missing_ones(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(make_image(1))
    (tmp_path / "empty.png").touch()
    lines = ["image,caption", "a.png,one", "gone.png,two", "empty.png,three", "a.png,four", ",five", "folder,six"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "t.csv").write_text("\n".join(lines), encoding="utf-8")
    summary = pack(_source(tmp_path / "t.csv"), tmp_path / "out", PackOptions(), workers=0)
    assert summary.failed == {"empty_member": 1, "missing_image": 3}
    keys = [json.loads(v)["key"] for n, v in _members(tmp_path / "out" / "000000.tar").items() if n.endswith("json")]
    assert keys == ["a.png", "a.png"], "the same file is the same content"


@pytest.mark.parametrize(
    "pattern", ["a.tar", "%d.tar", "x/%06d.tar", "%06d%06d.tar", "%06d.zip", ".%06d.tar", "%s.tar"]
)
def test_wrong_patterns(photos: Path, tmp_path: Path, pattern: str) -> None:
    with pytest.raises(UserError, match="pattern="):
        _pack(photos, tmp_path / "out", pattern=pattern)
