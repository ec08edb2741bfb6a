"""m2-search index, killed twenty times at any moment while its folder changes, indexes each picture once."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from m2_encoder.picture_search.index import ENCODING_FOLDER, INDEX_FILE, open_index
from m2_encoder.picture_search.model import open_search_model
from m2_encoder.picture_search.update import update_index
from tests.support.pictures import export_small, write_picture

KILLS = 20
PICTURES = 240
CHANGED = 60
RECORD_BYTES = 100  # about what a feature takes


def start(folder: Path, model: Path) -> subprocess.Popen[bytes]:
    command = (
        sys.executable, "-m", "m2_encoder.cli.search", "index", "photos", f"model={model}", "batch_size=2",
        "num_workers=1",
    )  # fmt: skip
    with (folder / "said").open("wb") as said:
        return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=said)


def encoded(index: Path) -> int:
    """Bytes of features that were kept so far."""
    paths = [os.path.join(parent, name) for parent, _, names in os.walk(index / ENCODING_FOLDER) for name in names]
    return sum(os.path.getsize(path) for path in paths if os.path.exists(path))


def change(photos: Path, random_: random.Random, round_: int) -> None:
    """Some pictures are others, one is there no more, one is new."""
    *others, gone = random_.sample(sorted(photos.glob("[0-9]*.png")), CHANGED)
    for number, path in enumerate(others):
        write_picture(path, 1000 * round_ + number)
    gone.unlink()
    write_picture(photos / f"new-{round_:02}.png", 1000 * round_ + CHANGED)


@pytest.mark.slow
def test_killed_twenty_times(tmp_path: Path) -> None:
    model = export_small(tmp_path / "export")
    photos, index, random_ = tmp_path / "photos", tmp_path / "photos.index", random.Random(0)
    for number in range(PICTURES):
        write_picture(photos / f"{number:03}.png", number)
    (photos / "bad.png").write_text("none")
    finished, killed, round_ = 0, 0, 0
    while killed < KILLS:
        round_ += 1
        with start(tmp_path, model) as process:
            more = encoded(index) + random_.randrange(CHANGED) * RECORD_BYTES
            while process.poll() is None and (encoded(index) < more or not (index / "lock").exists()):
                time.sleep(0.002)
            time.sleep(random_.choice((0, 0, 0.02, 0.2)))
            if round_ % 5:  # each fifth one is left alone
                process.kill()
        if process.returncode == -signal.SIGKILL:
            killed += 1
        else:
            assert process.returncode == 1, (tmp_path / "said").read_text()
            finished += 1
        if (index / INDEX_FILE).exists():
            names = open_index(index).names
            assert len(set(names)) == len(names) >= PICTURES - round_
            change(photos, random_, round_)
    with start(tmp_path, model) as process:
        assert process.wait() == 1, "one picture is bad"
    found = open_index(index)
    assert found.names == sorted(path.name for path in photos.glob("*.png") if path.name != "bad.png")
    assert [item.name for item in found.skipped] == ["bad.png"]
    update_index(tmp_path / "whole", photos, open_search_model(model), num_workers=0)
    whole = open_index(tmp_path / "whole")
    assert whole.names == found.names
    np.testing.assert_allclose(
        np.asarray(found.features, np.float32), np.asarray(whole.features, np.float32), atol=2e-3
    )
    assert sorted(path.name.partition("-")[0] for path in index.iterdir()) == ["features", INDEX_FILE]
    assert finished >= 4
