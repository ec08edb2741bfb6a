"""A set that is written anew under a run is not what the run measured itself by."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from m2_encoder.data.file_watch import FileWatch
from m2_encoder.errors import UserError
from tests.support.mixtures import make_module_over
from tests.support.shards import make_image, make_sample, write_tar


@pytest.fixture(params=["tars", "photos"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / str(request.param)
    if request.param == "tars":
        write_tar(folder / "0.tar", make_sample("a", 1))
        write_tar(folder / "1.tar", make_sample("b", 2))
    else:
        (folder / "sub").mkdir(parents=True)
        for name in ("a", "sub/b"):
            (folder / f"{name}.png").write_bytes(make_image(1))
            (folder / f"{name}.txt").write_text("a cat", encoding="utf-8")
    return folder


@pytest.mark.parametrize("change", ["rewritten", "touched", "removed", "added"])
def test_every_change_is_refused(source: Path, change: str) -> None:
    watch = FileWatch({"mine": str(source)})
    watch.check()
    last = sorted(path for path in source.rglob("*") if path.is_file())[-1]
    if change == "rewritten":
        last.write_bytes(b"other" * 5000)
    elif change == "touched":
        os.utime(last, ns=(0, last.stat().st_mtime_ns + 1))
    elif change == "removed":
        last.unlink()
    else:
        last = last.with_name(f"new{last.suffix}")
        last.write_bytes(b"")
    said = {"removed": "is missing", "added": "was added"}.get(change, "has changed")
    name = re.escape(f"its {last.relative_to(source)} {said}")
    with pytest.raises(UserError, match=rf"data\.validation\.mine=.*: while the run went on, {name}: nothing is repo"):
        watch.check()


def test_what_systems_and_readers_leave_is_no_change(source: Path) -> None:
    watch = FileWatch({"mine": str(source)})
    for name in (".DS_Store", "Thumbs.db", "0.tar.index" if source.name == "tars" else "._a.png"):
        (source / name).write_bytes(b"")
    watch.check()


def test_a_run_reports_no_set_that_changed(tmp_path: Path) -> None:
    for number, name in enumerate(("train", "val", "test")):
        samples = [member for i in range(20) for member in make_sample(f"s{number}{i}", 100 * number + i)]
        write_tar(tmp_path / name / "0.tar", samples)
    validation = {name: str(tmp_path / name) for name in ("val", "test")}
    module = make_module_over(sources={"a": {"shards": f"{tmp_path}/train"}}, validation=validation)
    module.prepare_data()
    assert list(module.retrieval_sets()) == ["val", "test"]
    write_tar(tmp_path / "test" / "0.tar", [m for i in range(30) for m in make_sample(f"x{i}", 900 + i)])
    with pytest.raises(UserError, match=r"data\.validation\.test=.*its 0\.tar has changed: nothing is reported"):
        module.retrieval_sets()
