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
import torch

from m2_encoder.curation.global_rules import RULES
from tests.support.curation import SETTINGS, export_scorer, file_hashes, write_corpus

_KILLS = 8
_STAGES = (
    "measure",
    "rules",
    *(f"{rule.reason}: {part}" for rule in RULES.values() if rule.is_on(SETTINGS) for part in ("spill", "judge")),
    "merge",
    "score",
    "flag",
    "write",
)

_PROGRAM = """
import dataclasses, os, signal, sys
from pathlib import Path
from m2_encoder.curation.executors import LocalExecutor
from m2_encoder.curation.pipeline import curate
from m2_encoder.curation.ray_executor import RayExecutor
from m2_encoder.curation.settings import ScoreSettings
from m2_encoder.curation.sources import list_shards
from tests.support.curation import SETTINGS

corpus, model, output, executor, stage, share = sys.argv[1:]

def die(now, done, total):
    if now == stage and done >= float(share) * total:
        os.kill(os.getpid(), signal.SIGKILL)

score = ScoreSettings(model=model, rows=16, rewrite_below=0.0)
curate(
    list_shards({"web": corpus}), Path(output), dataclasses.replace(SETTINGS, score=score, samples_per_shard=10),
    executor=RayExecutor(workers=2) if executor == "ray" else LocalExecutor(2), progress=die,
)
os._exit(0)  # that executors close is tested elsewhere
"""


def command(corpus: Path, output: Path) -> list[str]:
    arguments = [f"shards={corpus}", f"output={output}", "images.min_side=16", "partition_rows=50", "workers=2"]
    arguments.append("max_drop_share=1")  # most of what is made here is meant to be dropped
    return [sys.executable, "-m", "m2_encoder.cli.data", "curate", *arguments, "samples_per_shard=10"]


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    corpus, output = write_corpus(tmp_path / "web", shards=6, samples=25), tmp_path / "killed"
    started = time.monotonic()
    subprocess.run(command(corpus, tmp_path / "whole"), check=True, capture_output=True)
    whole = time.monotonic() - started
    clock = random.Random(5)
    killed = 0
    while killed < _KILLS:
        process = subprocess.Popen(command(corpus, output), start_new_session=True, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=whole * clock.uniform(0.4, 0.95))
            break  # what earlier starts had done left too little
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)  # the workers are left to notice it themselves
            process.wait()
            killed += 1
    assert killed, f"never killed within {whole:.0f} s: the test tests nothing"
    result = subprocess.run(command(corpus, output), check=True, capture_output=True, text=True)
    assert "kept" in result.stdout
    assert file_hashes(output) == file_hashes(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("executor", "stages"),
    [("local", _STAGES), ("ray", ("measure", "near_duplicate_image: judge", "merge", "score", "write"))],
)
def test_killed_in_every_stage(tmp_path: Path, repo_root: Path, executor: str, stages: tuple[str, ...]) -> None:
    if executor == "ray":
        pytest.importorskip("ray", reason="the extra ray is not installed")
    torch.manual_seed(3)
    model = export_scorer(tmp_path / "model")
    corpus, output = write_corpus(tmp_path / "web", shards=6, samples=25), tmp_path / "killed"
    clock = random.Random(7)

    def start(folder: Path, kind: str, stage: str) -> int:
        share = str(clock.random())
        arguments = [str(corpus), str(model), str(folder), kind, stage, share]
        return subprocess.run(
            [sys.executable, "-c", _PROGRAM, *arguments], cwd=repo_root, capture_output=True, timeout=300, check=False
        ).returncode

    assert start(tmp_path / "whole", "local", "never") == 0
    for stage in stages:
        assert start(output, executor, stage) == -signal.SIGKILL, f"{stage}: was not killed there"
    assert start(output, executor, "never") == 0
    assert file_hashes(output) == file_hashes(tmp_path / "whole")
