"""Sweeps as processes: killed, begun twice, and continued. Their jobs only wait."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

_TOOL = """\
import os, sys, time
from pathlib import Path
from m2_encoder.config.command import Command
from m2_encoder.config.paths import default_run_folder
from m2_encoder.errors import UserError

def work(cfg):
    print("works", cfg["size"])
    with open("begun.txt", "a") as file:
        file.write(f"{cfg['size']} {os.getpid()}\\n")
    while cfg["size"] == 2 and not Path("go").exists():
        time.sleep(0.02)
    if cfg["size"] == 3:
        raise UserError("it is no good", key="size", value=3)
    (default_run_folder(cfg) / "done").touch()

def is_done(cfg):
    return (default_run_folder(cfg) / "done").exists()

TOOL = Command(
    name="m2-tool", config_name="tool", summary="", examples=(), check=lambda cfg: [], run=work,
    run_folder=default_run_folder, is_done=is_done, module="tool_of_a_test",
)
if __name__ == "__main__":
    sys.exit(TOOL())
"""

Begin = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """Starts a sweep of three jobs, of which the second waits for a file `go`, and the third is refused."""
    (tmp_path / "tool_of_a_test.py").write_text(_TOOL, encoding="utf-8")
    (tmp_path / "conf").mkdir()
    place = f"run: {{name: try, folder: '{tmp_path / 'outputs'}', resume: never}}\n"
    (tmp_path / "conf" / "tool.yaml").write_text(f"size: 1\n{place}", encoding="utf-8")
    started: list[subprocess.Popen[str]] = []

    def start(*more: str) -> subprocess.Popen[str]:
        words = ["-m", "tool_of_a_test", "--config-path", "conf", "--config-name", "tool", "-m", "size=1,2,3", *more]
        path = os.pathsep.join([str(tmp_path), *sys.path])
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _await_second(tmp_path: Path, times: int = 1) -> int:
    """The number of the process of the second job, when it has begun."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        path = tmp_path / "begun.txt"
        lines = [line for line in path.read_text().splitlines() if line.startswith("2 ")] if path.exists() else []
        if len(lines) >= times:
            return int(lines[-1].split()[1])
        time.sleep(0.05)
    raise AssertionError("the second job did not begin")


def _ends(pid: int) -> bool:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGKILL, -9, id="kill"),
        pytest.param(signal.SIGTERM, 143, id="term", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, id="int", marks=pytest.mark.slow),
    ],
)
def test_jobs_end_with_their_sweep_which_goes_on(begin: Begin, tmp_path: Path, number: int, code: int) -> None:
    first = begin()
    job = _await_second(tmp_path)
    first.send_signal(number)  # to this process alone
    assert first.wait(60) == code
    assert _ends(job)
    (tmp_path / "go").touch()
    again = begin()
    _, err = again.communicate(timeout=120)
    assert again.returncode == 1
    assert "m2-tool: 1/3 try-size=1: has finished before" in err
    assert "m2-tool: 2/3 try-size=2: finished; 1 left, " in err
    assert "m2-tool: 3/3 try-size=3: refused (size=3: it is no good); 0 left" in err
    assert "m2-tool: 3 jobs: 1 finished before, 1 finished, 1 refused" in err
    begun = [line.split()[0] for line in (tmp_path / "begun.txt").read_text().splitlines()]
    assert begun == ["1", "2", "2", "3"]
    record = json.loads((tmp_path / "outputs" / "multirun" / "try" / "jobs" / "try-size=2.json").read_text())
    assert (record["state"], record["swept"], len(record["begun"])) == ("finished", ["size=2"], 2)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill", "int"])
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_launchers_do_the_same(begin: Begin, tmp_path: Path, launcher: str, number: int) -> None:
    line = (f"hydra/launcher={launcher}", *(["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []))
    first = begin(*line)
    job = _await_second(tmp_path)
    first.send_signal(number)
    assert first.wait(60) != 0
    assert _ends(job)
    (tmp_path / "go").touch()
    again = begin(*line)
    _, err = again.communicate(timeout=240)
    assert again.returncode == 1
    log = tmp_path / "outputs" / "multirun" / "try" / "jobs" / "try-size=3.log"
    assert f"m2-tool: 3/3 try-size=3: refused (size=3: it is no good; see {log}); " in err
    assert "m2-tool: 2/3 try-size=2: finished; " in err
    assert "m2-tool: 3 jobs: " in err
    assert "m2-tool: size=3: it is no good" in log.read_text(encoding="utf-8")
    assert (tmp_path / "begun.txt").read_text().count("1 ") <= 2


def test_one_at_a_time(begin: Begin, tmp_path: Path) -> None:
    first = begin()
    _await_second(tmp_path)
    second = begin()
    _, err = second.communicate(timeout=120)
    assert second.returncode == 2
    assert err.startswith(f"m2-tool: {tmp_path / 'outputs' / 'multirun' / 'try'}: this sweep is at work (")
    assert err.count("\n") == 1
    assert first.poll() is None
