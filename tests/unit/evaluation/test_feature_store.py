"""Features on disk: what is there after kills, full disks, damage, and with two processes at once."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m2_encoder.errors import UserError
from m2_encoder.evaluation.feature_store import FeatureStore, picture_key, text_key
from tests.support.ranks import fork_context

WIDTH, FINGERPRINT = 300, "f" * 64


def key_of(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def feature_of(number: int) -> Tensor:
    return torch.arange(WIDTH, dtype=torch.float32) * 0.5 + number


def open_store(folder: Path) -> FeatureStore:
    return FeatureStore(folder, FINGERPRINT, "pictures", width=WIDTH)


def add(store: FeatureStore, numbers: range) -> None:
    store.add([key_of(number) for number in numbers], torch.stack([feature_of(number) for number in numbers]))


def check(store: FeatureStore, numbers: range) -> None:
    for number in numbers:
        found = store.get(key_of(number))
        assert found is not None, number
        assert torch.equal(found, feature_of(number)), number


def test_features_come_back_exactly(tmp_path: Path) -> None:
    values = torch.tensor([[1e-42, -0.0, 3.4e38], [0.1, 1 / 3, -7.0]])
    keys = [text_key("猫\ud800"), picture_key(b"")]
    with FeatureStore(tmp_path, "a" * 64, "texts", width=3) as store:
        assert store.get(keys[0]) is None
        store.add(keys, values)
        store.add(keys[:1], values[1:])  # what is there stays
        assert len(store) == 2
    with FeatureStore(tmp_path, "a" * 64, "texts", width=3) as store:
        for key, value in zip(keys, values, strict=True):
            found = store.get(key)
            assert found is not None
            assert torch.equal(found.view(torch.int32), value.view(torch.int32))
    for other, kind in (("b" * 64, "texts"), ("a" * 64, "pictures")):
        with FeatureStore(tmp_path, other, kind, width=3) as store:  # type: ignore[arg-type]
            assert len(store) == 0


def test_cut_off_tail_is_cut_and_the_file_goes_on(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        add(store, range(5))
    (path,) = store.folder.iterdir()
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) - 4 * WIDTH, 11, 1, 0):
        path.write_bytes(whole[:length])
        with open_store(tmp_path) as store:
            number = max(0, (length - 12) // (4 * WIDTH + 36))
            assert len(store) == number
            check(store, range(number))
            add(store, range(5))
        assert [*store.folder.iterdir()] == [path]
        assert sorted(path.read_bytes()) == sorted(whole)
        with open_store(tmp_path) as store:
            check(store, range(5))


def test_damaged_record_is_encoded_again_and_foreign_file_is_refused(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        add(store, range(3))
    (path,) = store.folder.iterdir()
    content = bytearray(path.read_bytes())
    content[12 + (4 * WIDTH + 36) + 100] ^= 1  # in the second record
    path.write_bytes(content)
    for _ in range(2):
        with open_store(tmp_path) as store:
            assert store.get(key_of(0)) is not None
            add(store, range(3))
            check(store, range(3))
    with pytest.raises(UserError, match=r"holds features of 300 numbers, not 7; it was not written for this model"):
        FeatureStore(tmp_path, FINGERPRINT, "pictures", width=7)
    path.write_bytes(b"something of somebody else")
    with pytest.raises(UserError, match="holds something else"):
        open_store(tmp_path)


def write_on(folder: Path, start: int, said: Any) -> None:
    with open_store(folder) as store:
        for number in range(start, start + 100_000, 3):
            add(store, range(number, number + 3))
            said.value = number + 3


def start_writer(folder: Path, start: int) -> tuple[Any, Any]:
    context = fork_context()
    said = context.Value("l", start, lock=False)  # a killed process would keep it
    process = context.Process(target=write_on, args=(folder, start, said))
    process.start()
    return process, said


def wait_for(process: Any, said: Any, number: int) -> None:
    deadline = time.monotonic() + 120
    while said.value < number:
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_killed_process_leaves_whole_records(tmp_path: Path) -> None:
    rng, start = random.Random(0), 0
    for _ in range(3):
        process, said = start_writer(tmp_path, start)
        wait_for(process, said, start + 30)
        time.sleep(rng.random() * 0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        start = said.value
        with open_store(tmp_path) as store:
            check(store, range(start))  # all that it had said to be there
            assert len(store) in range(start, start + 4)
            more = len(store)
            check(store, range(more))
    assert len([*store.folder.iterdir()]) == 1  # each goes on with the file of the one before


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    writers = [start_writer(tmp_path, start) for start in (0, 60)]  # the second half of the first's are the second's
    with open_store(tmp_path) as mine:
        for process, said in writers:
            wait_for(process, said, 120)
        add(mine, range(-3, 0))
        for process, _ in writers:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
    with open_store(tmp_path) as store:
        check(store, range(-3, 120))
        assert len([*store.folder.iterdir()]) <= 3
        add(store, range(-9, -3))


def test_full_disk_is_one_error_and_what_is_there_stays(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_store(tmp_path) as store:
        add(store, range(4))
        (path,) = store.folder.iterdir()
        size = path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 2000, before[1]))  # room for a record and a half
        try:
            with pytest.raises(UserError, match=r"cannot write features to .*\.features: File too large; make room"):
                add(store, range(4, 9))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert path.stat().st_size == size
        check(store, range(4))
        add(store, range(4, 9))  # there is room again
    with open_store(tmp_path) as store:
        check(store, range(9))


def test_folder_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write features to .*: Not a directory"):
        open_store(tmp_path / "file")
