"""A job of a sweep as a process of its own."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from m2_encoder.config.job_process import run_process

_JOB = """\
import os, signal, sys, time
what = sys.argv[1]
print("m2-tool: said", what, file=sys.stderr, flush=True)
print("\\nSet the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace.", file=sys.stderr, flush=True)
if what == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
elif what == "wait":
    signal.signal(signal.SIGTERM, lambda *_: (open("saved", "w").close(), sys.exit(143)))
    open("ready", "w").close()
    time.sleep(60)
sys.exit(int(what) if what.isdigit() else 0)
"""


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job_of_a_test.py").write_text(_JOB, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("what", "code"), [("fine", 0), ("2", 2), ("1", 1), ("kill", 137)])
def test_its_end_and_its_last_words(what: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_process("job_of_a_test", [what]) == (code, f"m2-tool: said {what}")
    assert capsys.readouterr().err.startswith(f"m2-tool: said {what}\n")


def test_sigterm_reaches_it_and_its_end_is_waited_for(tmp_path: Path) -> None:
    def end() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end, daemon=True).start()
    with pytest.raises(SystemExit) as ended:
        run_process("job_of_a_test", ["wait"])
    assert ended.value.code == 143
    assert (tmp_path / "saved").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
