"""Locks: one process at a time; nothing of a dead one is in the way."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from m2_encoder import files
from m2_encoder.files import Holder, LockedError, find_holder, hold_lock
from tests.support.locks import held_elsewhere

ME = socket.gethostname()


def test_a_second_process_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    path = tmp_path / "run" / "lock"
    with held_elsewhere(path) as pid:
        for _ in range(2):
            with (
                pytest.raises(LockedError, match=rf"is held by pid {pid} on {ME}, since 20") as refused,
                hold_lock(path),
            ):
                pass
        assert refused.value.holder is not None
        assert find_holder(path) == refused.value.holder
        assert (refused.value.holder.pid, refused.value.holder.host) == (pid, ME)


def test_a_stopped_process_lives(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path / "lock") as pid:
        os.kill(pid, signal.SIGSTOP)
        assert find_holder(tmp_path / "lock") is not None


def test_a_killed_process_is_not_in_the_way(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with held_elsewhere(path) as pid:
        pass
    assert path.is_file(), "it was killed"
    assert find_holder(path) is None
    with hold_lock(path) as left:
        assert left is not None
        assert left.pid == pid
        assert json.loads(path.read_bytes())["pid"] == os.getpid()
    assert not path.exists()


def test_a_forked_process_does_not_go_on_holding_it(tmp_path: Path) -> None:
    # Workers of a data loader outlive a killed trainer for some seconds.
    path = tmp_path / "lock"
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        context = hold_lock(path)
        context.__enter__()
        if (worker := os.fork()) == 0:
            time.sleep(60)
            os._exit(0)
        os.write(write, worker.to_bytes(4, "little"))
        os._exit(0)
    worker = int.from_bytes(os.read(read, 4), "little")
    os.waitpid(pid, 0)
    try:
        assert find_holder(path) is None
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(read)
        os.close(write)


def test_what_holds_nothing(tmp_path: Path) -> None:
    assert find_holder(tmp_path / "no" / "lock") is None
    for content in ("", "{", "[]", '{"host": 1}'):
        (tmp_path / "lock").write_text(content)
        assert find_holder(tmp_path / "lock") is None
        with hold_lock(tmp_path / "lock") as left:
            assert left is None


@pytest.mark.parametrize(("host", "pid", "lives"), [(ME, os.getppid(), True), (ME, 2**22 + 1, False), ("b", 1, False)])
def test_without_locks_of_the_disk_the_file_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, pid: int, lives: bool
) -> None:
    def no_locks(*_arguments: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", no_locks)
    path = tmp_path / "lock"
    written = Holder(host, pid, "2026-01-01 00:00:00")
    path.write_text(json.dumps(written._asdict()))
    assert find_holder(path) == (written if lives else None)
    if lives:
        with pytest.raises(LockedError), hold_lock(path):
            pass
    else:
        with hold_lock(path) as left:
            assert left == written
