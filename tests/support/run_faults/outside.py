"""Faults of what a command depends on: files of others, servers, the disk, W&B."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from m2_encoder.runs import loggers
from m2_encoder.runs.ending import Results
from tests.support.faults import EPS
from tests.support.file_server import serve
from tests.support.run_faults.case import Place, RunFault, Told
from tests.support.shards import make_image
from tests.support.wandb_server import serve_wandb

Act = Callable[[Place], Told]


def files() -> tuple[RunFault, ...]:
    """Of folders to pack and to embed."""
    good = "1 of 1 sound pictures"
    return (
        RunFault("pipe in a folder to pack", "pipe", _pack(_pipe), 1, good),
        RunFault("link to /dev/zero in a folder to pack", "zero", _pack(_endless), 1, good),
        RunFault("EPS named .jpg in a folder to pack", "EPS", _pack(_eps), 1, good),
        RunFault("pipe in a folder to embed", "pipe", _embed(_pipe), 1, good),
        RunFault("EPS named .jpg in a folder to embed", "EPS", _embed(_eps), 1, good),
        RunFault(
            "folder to embed without a picture", "no image", _embed(lambda _: None, sound=0), 2, "0 of 0 sound pictures"
        ),
    )


def people() -> tuple[RunFault, ...]:
    """Of names and tables as other systems write them; all of it is packed."""
    packed = "samples in"
    return (
        RunFault("names with dots that share their first part", packed, _pack_files(_dotted), 0, "3 samples"),
        RunFault("names in GBK", packed, _pack_files(_gbk_names), 0, "2 samples"),
        RunFault("what macOS and Windows leave behind", packed, _pack_files(_clutter), 0, "1 sample"),
        RunFault("caption named .jpg.txt", "nothing could be packed", _pack_files(_double_suffix), 2, "0 samples"),
        RunFault("suffixes in capitals", packed, _pack_files(_capitals), 0, "1 sample"),
        RunFault("PNG of 16-bit grey", packed, _pack_files(_grey), 0, "1 sample"),
        RunFault("table in GB18030", "is read as gb18030", _pack_files(_gbk_table, "t.csv"), 0, "2 samples"),
        RunFault("table in UTF-16", packed, _pack_files(_utf16_table, "t.csv"), 0, "2 samples"),
        RunFault("table in Latin-1", "encoding=", _pack_files(_latin_table, "t.csv"), 1, "1 sample"),
    )


def servers() -> tuple[RunFault, ...]:
    """Of weights behind an address."""
    kept = "nothing stays in the cache"
    return (
        RunFault(
            "page of HTML served as weights, with 200",
            "not a checkpoint",
            _download(b"<html>Log in</html>" * 99),
            kept=kept,
        ),
        RunFault(
            "weights without an end",
            "sent more than 1,048,576 bytes",
            _download(bytes(3 << 20), with_length=False),
            kept=kept,
        ),
        RunFault("address without weights", "the server says 404", _download(b"x", status=404), kept=kept),
        RunFault(
            "weights that break off",
            "run it again",
            _download(bytes(1 << 20), stop_after=1000),
            kept="what came is kept",
        ),
        RunFault(
            "weights that are not those of the digest",
            "its sha256 is",
            _download(b"x" * 99, fragment=f"#sha256={'0' * 64}"),
            kept=kept,
        ),
        RunFault("address where nobody listens", "refused", _nobody, kept=kept),
    )


def wandb() -> tuple[RunFault, ...]:
    """Of W&B; its limits are 2 s here."""
    whole = "metrics, checkpoints and export are whole"
    return (
        RunFault(
            "W&B's server hangs at the start",
            "its server cannot be used",
            _wandb(at="start"),
            0,
            f"{whole}, an offline copy",
            60,
            True,
        ),
        RunFault(
            "W&B's server hangs at the end", "wandb sync", _wandb(at="end"), 0, f"{whole}, a copy to sync", 60, True
        ),
        RunFault("W&B cannot start", "W&B: not available", _wandb_fails("init"), 0, whole, is_slow=True),
        RunFault("W&B stops in the run", "W&B: stopped", _wandb_fails("log"), 0, whole, is_slow=True),
    )


def _pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe.jpg")
    (folder / "pipe.txt").write_text("a pipe")


def _endless(folder: Path) -> None:
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "zero.txt").write_text("nothing")


def _eps(folder: Path) -> None:
    (folder / "eps.jpg").write_bytes(EPS)
    (folder / "eps.txt").write_text("a square")


def _fill(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        is_picture = path.suffix.lower() in (".jpg", ".png")
        path.write_bytes(make_image(number) if is_picture else f"text {name}".encode())


def _dotted(folder: Path) -> None:
    _fill(folder, *(f"shop.{name}.{kind}" for name in ("a", "b", "b.c") for kind in ("png", "txt")))


def _gbk_names(folder: Path) -> None:
    for animal in "猫狗":
        for suffix, content in ((".png", make_image(ord(animal))), (".txt", animal.encode())):
            with open(os.path.join(os.fsencode(folder), f"{animal}{suffix}".encode("gbk")), "wb") as file:
                file.write(content)


def _clutter(folder: Path) -> None:
    _fill(folder, "a.jpg", "a.txt", "._a.jpg", "._a.txt", "__MACOSX/a.jpg", "__MACOSX/a.txt", "b/.DS_Store")
    _fill(folder, "Thumbs.db", "desktop.ini")


def _double_suffix(folder: Path) -> None:
    _fill(folder, "a.jpg", "a.jpg.txt")


def _capitals(folder: Path) -> None:
    _fill(folder, "A.JPG", "A.TXT")


def _grey(folder: Path) -> None:
    Image.fromarray(np.full((8, 8), 4096, dtype=np.uint16)).save(folder / "a.png")
    _fill(folder, "a.txt")


def _table(encoding: str, caption: str) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        _fill(folder, "a.png", "b.png")
        (folder / "t.csv").write_bytes(f"image,caption\r\na.png,{caption}\r\nb.png,two dogs\r\n".encode(encoding))

    return write


_gbk_table = _table("gb18030", "一只猫坐在草地上")
_utf16_table = _table("utf-16", "一只猫坐在草地上")
_latin_table = _table("cp1252", "caf\u00e9 \u2019")


def _pack_files(write: Callable[[Path], object], name: str = "") -> Act:
    def act(place: Place) -> Told:
        source, target = place.folder / "pictures", place.folder / "tars"
        source.mkdir()
        write(source)
        ended = place.data("pack", str(source / name), f"output={target}", "workers=0")
        failures = target / "failures.jsonl"
        listed = failures.read_text() if failures.is_file() else ""
        keys = set()
        for path in target.glob("*.tar"):
            with tarfile.open(path) as tar:
                keys.update(member.rpartition(".")[0] for member in tar.getnames() if member.endswith(".json"))
        return Told(ended.code, f"{ended.err}\n{ended.out}\n{listed}", f"{len(keys)} sample{'s' * (len(keys) != 1)}")

    return act


def _pictures(place: Place, add: Callable[[Path], object], sound: int) -> Path:
    folder = place.folder / "pictures"
    folder.mkdir()
    for number in range(sound):
        (folder / f"good{number}.png").write_bytes(make_image(number))
        (folder / f"good{number}.txt").write_text("a cat")
    add(folder)
    return folder


@contextlib.contextmanager
def _watched_programs(place: Place) -> Iterator[Path]:
    """Ghostscript leaves a mark."""
    (place.folder / "bin").mkdir()
    program = place.folder / "bin" / "gs"
    program.write_text(f"#!/bin/sh\ntouch {place.folder}/mark\n")
    program.chmod(0o755)
    with mock.patch.dict(os.environ, {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}):
        yield place.folder / "mark"


def _pack(add: Callable[[Path], object], *, sound: int = 1) -> Act:
    def act(place: Place) -> Told:
        source, target = _pictures(place, add, sound), place.folder / "tars"
        with _watched_programs(place) as mark:
            ended = place.data("pack", str(source), f"output={target}", "workers=0")
        content = b"".join(path.read_bytes() for path in sorted(target.glob("*.tar")))
        failures = map(json.loads, (target / "failures.jsonl").read_text().splitlines())
        listed = [f"{each.get('name')}: {each['reason']} ({each['detail']})" for each in failures]
        kept = sum(f"good{number}".encode() in content for number in range(sound))
        more = ", A PROGRAM WAS STARTED" if mark.exists() else ""
        return Told(ended.code, "\n".join([*listed, ended.out, ended.err]), f"{kept} of {sound} sound pictures{more}")

    return act


def _embed(add: Callable[[Path], object], *, sound: int = 1) -> Act:
    def act(place: Place) -> Told:
        source, target = _pictures(place, add, sound), place.folder / "f.safetensors"
        with _watched_programs(place) as mark:
            ended = place.embed(f"images={source}", f"output={target}", "num_workers=0")
        content = target.read_bytes() if target.is_file() else b""
        kept = sum(f"good{number}".encode() in content for number in range(sound))
        more = ", A PROGRAM WAS STARTED" if mark.exists() else ""
        return Told(ended.code, f"{ended.out}\n{ended.err}", f"{kept} of {sound} sound pictures{more}")

    return act


def _download(content: bytes, *, fragment: str = "", **faults: Any) -> Act:
    def act(place: Place) -> Told:
        with serve(content) as server:
            for name, value in faults.items():
                setattr(server, name, value)
            return _start_from(place, f"{server.url()}{fragment}")

    return act


def _nobody(place: Place) -> Told:
    with serve(b"") as server:
        url = server.url()
    return _start_from(place, url)


def _start_from(place: Place, url: str) -> Told:
    cache = place.folder / "cache"
    with (
        mock.patch.dict(os.environ, {"M2_ENCODER_CACHE": str(cache)}),
        mock.patch("m2_encoder.checkpoints.download._MAX_BYTES", 1 << 20),
    ):
        ended = place.train(f'model.weights="{url}"')
    left = [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]
    kept = "nothing stays in the cache" if not left else f"{left}"
    if {path.suffix for path in left} == {".part", ".tag"}:
        kept = "what came is kept"
    return Told(ended.code, f"{ended.out}\n{ended.err}", kept)


def _whole(place: Place) -> str:
    run = place.folder / "new"
    found = [
        name
        for name in ("metrics.jsonl", "checkpoints/last.ckpt", "export/model.safetensors")
        if (run / name).is_file()
    ]
    return "metrics, checkpoints and export are whole" if len(found) == 3 else f"{found}"


@contextlib.contextmanager
def _account(**variables: str) -> Iterator[None]:
    import wandb

    wandb.teardown()  # a run of an earlier test leaves its service, which knows another server
    kept = {name: value for name, value in os.environ.items() if name not in ("WANDB_MODE", "WANDB_BASE_URL")}
    with mock.patch.dict(os.environ, {**kept, "WANDB_API_KEY": "k" * 40, **variables}, clear=True):
        yield
    wandb.teardown()


def _wandb(*, at: str) -> Act:
    def act(place: Place) -> Told:
        def report(*_: object, **__: object) -> Results:
            server.hangs.set()
            return Results({}, (), place.folder / "new", 1)

        with (
            serve_wandb(hangs=at == "start") as server,
            _account(WANDB_BASE_URL=server.url),
            mock.patch.object(loggers, "_INIT_TIMEOUT_S", 2.0 if at == "start" else 15.0),
            mock.patch("m2_encoder.runs.run.report_run", report),
        ):
            ended = place.train("run.name=new", "logger=wandb", "logger.finish_timeout_s=2")
        folders = [path.name for path in (place.folder / "new" / "wandb").glob("*run-*")]
        copy = (
            "an offline copy"
            if any("offline" in name for name in folders)
            else "a copy to sync"
            if folders
            else "NOTHING"
        )
        return Told(ended.code, f"{ended.out}\n{ended.err}", f"{_whole(place)}, {copy}")

    return act


def _wandb_fails(call: str) -> Act:
    def act(place: Place) -> Told:
        def fail(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        run = mock.MagicMock(log=fail, id="x", dir=str(place.folder / "files"), starting_step=0, step=0)
        with mock.patch("wandb.init", fail if call == "init" else lambda **_: run), mock.patch("wandb.run", None):
            ended = place.train("run.name=new", "logger=wandb")
        return Told(ended.code, f"{ended.out}\n{ended.err}", _whole(place))

    return act
