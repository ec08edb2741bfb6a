"""Faults that end a run: `m2-train` itself, in this process, on data that it must refuse or give up in one line."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from m2_encoder.cli import train
from m2_encoder.data.shards.index import open_index
from tests.support.fault_runs import BATCH, STEPS
from tests.support.faults import DAMAGED, Fault, faults, write_set
from tests.support.shard_server import serve_shards
from tests.support.shards import make_sample, write_tar

RUN = "run"
_FLAGS = (
    "data=webdataset",
    "+experiment=smoke",
    "~data.sources.main",
    f"run.name={RUN}",
    "run.export=false",
    "seed=5",
    "scheduler.warmup_steps=1",
    "data.lanes=4",
    "data.window=16",
    f"data.global_batch_size={BATCH}",
    "trainer.log_every_n_steps=5",  # no divisor of the steps, so that counts must not depend on it
)


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


class Fatal(NamedTuple):
    """A fault that ends a run.

    Attributes:
        name: of the fault, in words.
        message: pattern of what the command must say, in one line.
        injected: damages a set in a folder, and what happens while the command runs; gives its further arguments.
    """

    name: str
    message: str
    injected: Callable[[Path], Any]


def arguments(folder: Path, *more: str, max_steps: int = STEPS) -> list[str]:
    """Of `m2-train` on sources a and b of a folder's set, with its outputs in `folder/outputs`."""
    line = [*_FLAGS, f"trainer.max_steps={max_steps}", f"run.folder={folder}/outputs"]
    given = {argument.partition("=")[0] for argument in more}
    for name, weight in (("a", 2), ("b", 1)):
        if f"+data.sources.{name}.shards" not in given:
            line.append(f"+data.sources.{name}.shards={folder}/{name}/*.tar")
        line.append(f"+data.sources.{name}.weight={weight}")
    return [*line, *more]


def run_train(folder: Path, *more: str, max_steps: int = STEPS) -> Ended:
    """`m2-train` with `arguments`, in this process."""
    line = ["m2-train", *arguments(folder, *more, max_steps=max_steps)]
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", line), redirect_stdout(out), redirect_stderr(err):
        code = train.main()
    return Ended(code, out.getvalue(), err.getvalue())


def end(fatal: Fatal, folder: Path) -> Ended:
    """Run the command over a fault."""
    with fatal.injected(folder) as more:
        return run_train(folder, *more, max_steps=500)


def fatals() -> tuple[Fatal, ...]:
    """All faults that end a run."""
    return (
        Fatal("shard that is not there", r"data\.sources\.a\.shards=.*9\.tar: no such file", _missing),
        Fatal("pipe instead of a shard", r"shards cannot be read: .*pipe\.tar \(not an ordinary file\)", _pipe),
        Fatal("source with unknown caption keys only", r"data\.sources\.a: .*wanted captions", partial(_all, "desc")),
        Fatal("source with cut images only", r"data\.sources\.a: .*undecodable_image", partial(_all, "images")),
        Fatal(
            "source of cut images, without the check at the start",
            r"undecodable_image .*32 samples in a row are unusable; mend the shards of this source",
            lambda folder: _all("images", folder, "data.check=null"),
        ),
        Fatal("more bad samples than allowed", r"1 unusable samples are listed, .*max_bad_samples=0.*jsonl", _budget),
        Fatal("limit of bad samples spent at the start", r"missing_caption .*max_bad_samples=0: missing_c", _at_start),
        Fatal("validation with a cut image", r"0\.tar:000005: .*cannot be decoded", _validation),
        Fatal(
            "remote that lacks a shard at the start",
            r"1 of 3 shards cannot be read: .*1\.tar \(FileNotFound",
            _remote("missing"),
        ),
        Fatal("remote that never answers at the start", r"1 of 3 shards .*1\.tar \(no byte for 2 s", _remote("silent")),
        Fatal("remote with HTML pages only", r"data\.sources\.a: no usable samples", _remote("page", all_of_it=True)),
        Fatal("full disk under the copies", r"takes no copy \(No space left on device\); make room", _full_disk),
        Fatal("too little room for copies", r"cache\.max_bytes=50,000: the 4 lanes .* 122,880 bytes", _small_cache),
        Fatal("worker killed by the system", r"a worker of the data loader died", _killed),
        Fatal("read that never ends", r"data stands still for 1 s: waiting for worker 0 reading .*\.tar", _hanging),
        Fatal("read that never ends, of an index", r"shards stands still for 1 s: .*a/0\.tar", _hanging_index),
        Fatal("read that never ends, in the check", r"still for 1 s: .* the check of source a, which", _hanging_check),
    )


def _fault(name: str) -> Fault:
    return next(fault for fault in faults() if fault.name == name)


@contextmanager
def _missing(folder: Path) -> Iterator[list[str]]:
    write_set(folder, None)
    yield [f"+data.sources.a.shards=[{folder}/a/0.tar,{folder}/a/9.tar]"]


@contextmanager
def _pipe(folder: Path) -> Iterator[list[str]]:
    write_set(folder, None)
    os.mkfifo(folder / "a" / "pipe.tar")
    yield []


@contextmanager
def _all(what: str, folder: Path, *more: str) -> Iterator[list[str]]:
    write_set(folder, None)
    for number in range(3):
        members = [member for i in range(12) for member in make_sample(f"{i:06d}", i, metadata=_metadata(what))]
        write_tar(
            folder / "a" / f"{number}.tar", [(n, c[:60] if what == "images" and "png" in n else c) for n, c in members]
        )
    yield list(more)


def _metadata(what: str) -> dict[str, str]:
    return {"desc": "a dog"} if what == "desc" else {"caption": "a dog"}


@contextmanager
def _budget(folder: Path) -> Iterator[list[str]]:
    write_set(folder, _fault("JPEG cut in half"))
    yield ["data.max_bad_samples=0", "data.check=null"]


@contextmanager
def _at_start(folder: Path) -> Iterator[list[str]]:
    write_set(folder, _fault("sample without a caption"))
    yield ["data.max_bad_samples=0", "data.check=null"]


@contextmanager
def _validation(folder: Path) -> Iterator[list[str]]:
    write_set(folder, None)
    members = [member for i in range(9) for member in make_sample(f"{i:06d}", i)]
    write_tar(folder / "v" / "0.tar", [(n, c[:90] if n == "000005.png" else c) for n, c in members])
    yield [f"+data.validation.v={folder}/v"]


def _cache(folder: Path, *, max_bytes: float = 1e9) -> str:
    return f"data.cache={{folder: {folder}/copies, max_bytes: {max_bytes}, timeout_s: 2, attempts: 1}}"


def _remote(what: str, *, all_of_it: bool = False) -> Callable[[Path], Any]:
    @contextmanager
    def injected(folder: Path) -> Iterator[list[str]]:
        write_set(folder, None)
        with serve_shards(folder / "a") as server:
            names = [path.name for path in (folder / "a").glob("*.tar")] if all_of_it else [DAMAGED]
            server.always = dict.fromkeys(names, what)
            yield [f"+data.sources.a.shards={server.url('{0..2}.tar')}", _cache(folder)]

    return injected


@contextmanager
def _full_disk(folder: Path) -> Iterator[list[str]]:
    write_set(folder, None)
    real = Path.open

    def open_file(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.suffix == ".partial":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, *args, **kwargs)

    with serve_shards(folder / "a") as server, mock.patch.object(Path, "open", open_file):
        yield [f"+data.sources.a.shards={server.url('{0..2}.tar')}", _cache(folder)]


@contextmanager
def _small_cache(folder: Path) -> Iterator[list[str]]:
    write_set(folder, None)
    for path in (folder / "a").glob("*.tar"):
        open_index(path)
    with serve_shards(folder / "a") as server:
        yield [
            f"+data.sources.a.shards={server.url('{0..2}.tar')}",
            _cache(folder, max_bytes=50_000),
            "data.check=null",
        ]


@contextmanager
def _once_it_trains(folder: Path, act: Callable[[], None]) -> Iterator[None]:
    """Do something when the first metrics are written."""
    is_over = threading.Event()

    def wait() -> None:
        while not is_over.wait(0.02):
            if (folder / "outputs" / RUN / "metrics.jsonl").is_file():
                act()
                return

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@contextmanager
def _killed(folder: Path) -> Iterator[list[str]]:
    write_set(folder, None)
    others = multiprocessing.active_children()  # pools that something earlier has left

    def kill() -> None:
        workers = [child for child in multiprocessing.active_children() if child not in others]
        os.kill(workers[0].pid or 0, signal.SIGKILL)

    with _once_it_trains(folder, kill):
        yield ["data.num_workers=2"]


@contextmanager
def _hanging(folder: Path) -> Iterator[list[str]]:
    write_set(folder, None)
    with _pread_that_hangs() as hangs, _once_it_trains(folder, hangs.set):
        yield ["data.num_workers=0", "data.stall_timeout_s=1"]


@contextmanager
def _hanging_index(folder: Path) -> Iterator[list[str]]:
    write_set(folder, None)
    with _pread_that_hangs() as hangs:
        hangs.set()
        yield ["data.stall_timeout_s=1"]


@contextmanager
def _hanging_check(folder: Path) -> Iterator[list[str]]:
    write_set(folder, None)
    for path in folder.rglob("*.tar"):
        open_index(path)
    with _pread_that_hangs() as hangs:
        hangs.set()
        yield ["data.stall_timeout_s=1"]


@contextmanager
def _pread_that_hangs() -> Iterator[threading.Event]:
    """From when the event is set on."""
    real = os.pread
    hangs, woken = threading.Event(), threading.Event()

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        if hangs.is_set():
            woken.wait(20)
        return real(descriptor, size, offset)

    try:
        with mock.patch.object(os, "pread", pread):
            yield hangs
    finally:
        woken.set()
