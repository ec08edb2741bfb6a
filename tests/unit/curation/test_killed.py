"""A curation that is killed, again and again, and started again gives the bytes of one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.curation import file_hashes, write_corpus

_KILLS = 8


def command(corpus: Path, output: Path) -> list[str]:
    arguments = [f"shards={corpus}", f"output={output}", "images.min_side=16", "partition_rows=50", "workers=2"]
    return [sys.executable, "-m", "m2_encoder.cli.data", "curate", *arguments, "samples_per_shard=10"]


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    corpus, output = write_corpus(tmp_path / "web", shards=6, samples=25), tmp_path / "killed"
    subprocess.run(command(corpus, tmp_path / "whole"), check=True, capture_output=True)
    clock = random.Random(5)
    killed = 0
    started = time.monotonic()
    while killed < _KILLS:
        process = subprocess.Popen(command(corpus, output), start_new_session=True, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=clock.uniform(2.0, 7.0))
            break  # so quick a machine that it was finished
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)  # the workers are left to notice it themselves
            process.wait()
            killed += 1
    assert killed, f"never killed within {time.monotonic() - started:.0f} s: the test tests nothing"
    result = subprocess.run(command(corpus, output), check=True, capture_output=True, text=True)
    assert "kept" in result.stdout
    assert file_hashes(output) == file_hashes(tmp_path / "whole")
