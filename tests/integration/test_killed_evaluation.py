"""`m2-evaluate` on sets on disk, killed and on a disk that is really full: what is finished is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from m2_encoder.evaluation.feature_store import SUFFIX
from tests.support.suites import captioned, own, small_export

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a set; never written to."""
    folder = tmp_path_factory.mktemp("suites")
    small_export(folder / "one")
    captioned(folder / "own", 6)
    return folder


_LIMITED = """
import os, resource, signal, sys
from m2_encoder.cli.commands import EVALUATE
from m2_encoder.models.m2_encoder import M2Encoder
log, size, kill_at = sys.argv[1:4]
if int(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
encode, calls = M2Encoder.encode_image, []
def counted(self, images):
    if len(calls) == int(kill_at):
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(1)
    with open(log, "a") as file:
        file.write(f"{len(images)}\\n")
    return encode(self, images)
M2Encoder.encode_image = counted
sys.argv[1:] = sys.argv[4:]
sys.exit(EVALUATE())
"""


def _start(repo_root: Path, log: Path, *lines: str, size: int = 0, kill_at: int = -1) -> tuple[int, str, str]:
    more = ["num_workers=0", "batch_size=2", "device=cpu"]
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(log), str(size), str(kill_at), *lines, *more],
        env={**os.environ, "PYTHONPATH": str(repo_root / "src")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr, done.stdout


def test_killed_at_any_picture_no_picture_is_encoded_twice(made: Path, repo_root: Path, tmp_path: Path) -> None:
    captioned(tmp_path / "set", 10)
    output, log = tmp_path / "report.json", tmp_path / "log"
    lines = [f"model={made / 'one'}", *own(tmp_path / "set"), f"features={tmp_path / 'fs'}", f"output={output}"]
    for calls in (1, 0, 2):
        code, *_ = _start(repo_root, log, *lines, kill_at=calls)
        assert code == -signal.SIGKILL
        assert not output.exists()
    assert _start(repo_root, log, *lines)[:2] == (0, "")
    assert output.exists()
    encoded = [int(line) for line in log.read_text().split()]
    assert sum(encoded[:5]) == 10, "each once; what costs are measured on comes after"


def test_a_real_full_disk(made: Path, repo_root: Path, tmp_path: Path) -> None:
    log, output, page = tmp_path / "log", tmp_path / "report.json", tmp_path / "page.html"
    lines = [f"model={made / 'one'}", *own(made / "own"), f"features={tmp_path / 'fs'}"]
    for size in (100, 250, 400):
        code, said, _ = _start(repo_root, log, *lines, size=size)
        assert code == 2
        assert "File too large; make room there and start again; what is finished is kept" in said
        assert len(said.splitlines()) == 1
    assert [path.suffix for path in tmp_path.rglob("pictures/*")] == [SUFFIX], "one file goes on"
    assert _start(repo_root, log, *lines)[:2] == (0, "")
    code, said, out = _start(repo_root, log, *lines, f"output={output}", f"page={page}", size=5000)
    assert code == 2
    assert said.splitlines()[0] == "m2-evaluate: 2 problems:"
    assert '"metric": "mean_recall"' in out, "numbers that took long are printed"
    assert not output.exists()
    assert not page.exists()
    assert not list(tmp_path.glob(".*")), "nothing half is left"


def test_ranks_share_the_work_and_find_the_same_numbers(made: Path, repo_root: Path, tmp_path: Path) -> None:
    captioned(tmp_path / "set", 7)  # which neither two nor three divide
    program = tmp_path / "run.py"
    program.write_text("import sys\nfrom m2_encoder.cli.commands import EVALUATE\nsys.exit(EVALUATE())\n")
    found = []
    for world in (1, 2, 3):
        output = tmp_path / f"{world}.json"
        lines = [
            f"model={made / 'one'}",
            *own(tmp_path / "set"),
            f"output={output}",
            f"features={tmp_path / str(world)}",
        ]
        command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={world}", str(program)]
        environment = {**os.environ, "PYTHONPATH": str(repo_root / "src"), "OMP_NUM_THREADS": "1"}
        more = ["device=cpu", "batch_size=2"]
        done = subprocess.run(
            [sys.executable, "-m", *command, *lines, *more],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("numbers: ") == 1
        records = json.loads(output.read_text(encoding="utf-8"))["records"]
        found.append([{key: value for key, value in each.items() if key != "seconds"} for each in records])
    assert found[0] == found[1] == found[2]
