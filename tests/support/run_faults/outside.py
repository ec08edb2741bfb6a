"""Faults of what a command depends on: files of others, servers, the disk, W&B."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from m2_encoder.runs import loggers
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
        RunFault("server that does not answer", "refused", _nobody, kept=kept),
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
        RunFault("W&B cannot start", "W&B: not available", _wandb_fails("init"), 0, whole),
        RunFault("W&B stops in the run", "W&B: stopped", _wandb_fails("log"), 0, whole),
    )


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n0 0 20 20 rectfill\n%%EOF\n"


def _pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe.jpg")
    (folder / "pipe.txt").write_text("a pipe")


def _endless(folder: Path) -> None:
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "zero.txt").write_text("nothing")


def _eps(folder: Path) -> None:
    (folder / "eps.jpg").write_bytes(EPS)
    (folder / "eps.txt").write_text("a square")


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
    if [path.suffix for path in left] == [".part"]:
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
        def report(*_: object, **__: object) -> dict[str, float]:
            server.hangs.set()
            return {}

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

        run = mock.MagicMock(log=fail)
        with mock.patch("wandb.init", fail if call == "init" else lambda **_: run), mock.patch("wandb.run", None):
            ended = place.train("run.name=new", "logger=wandb")
        return Told(ended.code, f"{ended.out}\n{ended.err}", _whole(place))

    return act
