"""Faults of data, one by one: how each is injected, and what a run has to count and list.

Every fault goes into the shard `a/1.tar` of a small set (`write_set`): source a with three shards of twelve samples,
source b with one. Most damage one sample, the victim.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from tests.support.shards import make_image, make_sample, write_tar

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n0 0 20 20 rectfill\n%%EOF\n"
Members = list[tuple[str, bytes]]

PER_SHARD = 12
VICTIM = "000017"
DAMAGED = "1.tar"
_KEYS = tuple(f"{i:06d}" for i in range(PER_SHARD, 2 * PER_SHARD))  # of the damaged shard
_FROM_VICTIM = _KEYS[_KEYS.index(VICTIM) :]


class Fault(NamedTuple):
    """One row of the fault table.

    Attributes:
        name: of the fault, in words.
        entries: what the list of unusable samples must hold, once each: (key, reason), None for the shard itself.
        members: damages the members before the tar is written.
        tar: damages the bytes of the tar.
        during: damages the file after the run has started.
        server: what the server of a remote shard does after the run has started.
        lost: samples that nobody can name, because their headers are gone.
        in_headers: found before anything is drawn; such samples are no part of the order.
        is_kept: the sample of the entry is used nevertheless.
    """

    name: str
    entries: tuple[tuple[str | None, str], ...]
    members: Callable[[Members], Members] = list
    tar: Callable[[bytes], bytes] = bytes
    during: Callable[[Path], object] | None = None
    server: str | None = None
    lost: tuple[str, ...] = ()
    in_headers: bool = False
    is_kept: bool = False

    @property
    def usable(self) -> list[str]:
        """Keys of the damaged shard that the order of samples holds."""
        named = {key for key, _ in self.entries} if self.in_headers and not self.is_kept else set()
        return [key for key in _KEYS if key not in named and key not in self.lost]

    def reason_of(self, key: str) -> str | None:
        """Why a sample of the damaged shard cannot be used when it is drawn; None if it can."""
        if self.in_headers:
            return None
        reasons = dict(self.entries)
        return reasons.get(key, reasons.get(None))


def write_set(folder: Path, fault: Fault | None) -> Path:
    """Sources a and b; the fault, if it is one of content, in the second shard of a."""
    for number, name in enumerate(("a/0.tar", "a/1.tar", "a/2.tar", "b/0.tar")):
        keys = range(number * PER_SHARD, (number + 1) * PER_SHARD)
        members = [member for i in keys for member in make_sample(f"{i:06d}", i)]
        is_damaged = fault is not None and name == f"a/{DAMAGED}"
        path = write_tar(folder / name, fault.members(members) if fault and is_damaged else members)
        if fault and is_damaged:
            path.write_bytes(fault.tar(path.read_bytes()))
    return folder


@cache
def faults() -> tuple[Fault, ...]:
    """All faults that a run survives."""
    return (*_cut_tars(), *_no_tars(), *_incomplete_samples(), *_bad_images(), *_bad_captions(), *_in_the_run())


def _cut_tars() -> list[Fault]:
    shard = (None, "truncated_shard")
    own = (VICTIM, "truncated_shard")
    after = tuple(key for key in _FROM_VICTIM if key != VICTIM)
    cut = partial(Fault, in_headers=True)
    return [
        cut("tar cut in a header", (own, shard), tar=_cut(f"{VICTIM}.json", "offset", 100), lost=after),
        cut("tar cut in an image", (own, shard), tar=_cut(f"{VICTIM}.png", "offset_data", 50), lost=after),
        cut("tar cut in a caption", (own, shard), tar=_cut(f"{VICTIM}.json", "offset_data", 9), lost=after),
        cut("tar cut between image and caption", (own, shard), tar=_cut(f"{VICTIM}.json", "offset", 0), lost=after),
        cut("tar cut between samples", (shard,), tar=_cut(f"{VICTIM}.png", "offset", 0), lost=_FROM_VICTIM),
        cut("tar without its end marker", (shard,), tar=_cut("", "offset", 0)),
        cut("tar with a damaged header", (own, shard), tar=_scribble, lost=after),
    ]


def _no_tars() -> list[Fault]:
    noise = np.random.default_rng(1).bytes(20_000)
    no_tar = partial(Fault, entries=((None, "not_a_tar"),), lost=_KEYS, in_headers=True)
    return [
        no_tar("random bytes instead of a tar", tar=lambda _: noise),
        no_tar("tar of no bytes", tar=lambda _: b""),
        no_tar("tar packed with gzip", tar=gzip.compress),
        no_tar("HTML page instead of a tar", tar=lambda _: b"<html><body>Sign in</body></html>" * 99),
    ]


def _incomplete_samples() -> list[Fault]:
    def broken(name: str, reason: str, *edits: Callable[[Members], Members], is_kept: bool = False) -> Fault:
        def apply(members: Members) -> Members:
            for each in edits:
                members = each(members)
            return members

        return Fault(name, ((VICTIM, reason),), members=apply, in_headers=True, is_kept=is_kept)

    return [
        broken("image of no bytes", "empty_member", _edit(png=b"")),
        broken("JSON of no bytes", "empty_member", _edit(json=b"")),
        broken("caption of no bytes", "empty_member", _edit(json=None, txt=b"")),
        broken("sample without a caption", "missing_caption", _edit(json=None)),
        broken("sample without an image", "missing_image", _edit(png=None)),
        broken("caption named .png.txt", "missing_caption", _edit(json=None, **{"png.txt": b"a dog"})),
        Fault("image that is a link to nowhere", ((VICTIM, "missing_image"),), tar=_dangling, in_headers=True),
        broken("image named .jpeg2", "missing_image", _edit(png=None, jpeg2=make_image(17))),
        broken(
            "the same key twice", "duplicate_key", lambda members: [*members, *make_sample(VICTIM, 99)], is_kept=True
        ),
    ]


def _bad_images() -> list[Fault]:
    def bad(name: str, reason: str, **changes: bytes | None) -> Fault:
        return Fault(name, ((VICTIM, reason),), members=_edit(**{"png": None, **changes}))

    def half(kind: str) -> bytes:
        content = make_image(17, side=64, kind=kind)
        return content[: len(content) // 2]

    wide = io.BytesIO()
    Image.new("L", (20_000, 1)).save(wide, "PNG")
    return [
        bad("JPEG cut in half", "undecodable_image", jpg=half("JPEG")),
        bad("PNG cut in half", "undecodable_image", png=half("PNG")),
        bad("WebP cut in half", "undecodable_image", webp=half("WEBP")),
        Fault("flipped bits in twelve JPEGs", _undecodable(flip_bits), members=flip_bits),
        bad("HTML page named .jpg", "undecodable_image", jpg=b"<html>404</html>"),
        bad("EPS named .jpg", "undecodable_image", jpg=EPS),
        bad("progressive JPEG of 200 scans", "undecodable_image", jpg=make_scans(200)),
        bad("bomb: PNG of 30,000 x 30,000 pixels", "too_many_pixels", png=make_bomb()),
        bad("PNG header of 2,147,483,647 x 2,147,483,647", "too_many_pixels", png=_png(2**31 - 1, 2**31 - 1, b"")),
        bad("image of 1 x 1 pixels", "too_small", png=make_image(17, side=1)),
        bad("image of 20,000 x 1 pixels", "absurd_shape", png=wide.getvalue()),
    ]


def _bad_captions() -> list[Fault]:
    def bad(name: str, reason: str, content: object, *, extension: str = "json") -> Fault:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        return Fault(name, ((VICTIM, reason),), members=_edit(**{"json": None, extension: raw}))

    return [
        bad("caption that is not UTF-8", "not_utf8", "一张图片".encode("gbk"), extension="txt"),
        bad("JSON that is not UTF-8", "not_utf8", b'{"caption": "caf\xe9"}'),
        bad("half a character in JSON", "not_utf8", b'{"caption": "\\ud83d"}'),
        bad("JSON that breaks off", "bad_json", b'{"caption": "a dog'),
        bad("JSON that is a list", "bad_json", ["a dog"]),
        bad("JSON nested 100,000 deep", "bad_json", b"[" * 100_000),
        bad("null as captions", "missing_caption", {"captions": None}),
        bad("a number as caption", "wrong_type", {"caption": 7}),
        bad("numbers as captions", "wrong_type", {"captions": {"en": [1, 2]}}),
        bad("caption under the unknown key desc", "missing_caption", {"desc": "a dog"}),
        bad("captions in another language", "missing_caption", {"captions": {"fr": ["un chien"]}}),
        bad("Japanese caption", "missing_caption", "猫がいます".encode(), extension="txt"),
        bad("caption of characters that nobody sees", "missing_caption", {"caption": "\u200b\ufeff"}),
        bad("caption of blanks", "missing_caption", b" \n", extension="txt"),
    ]


def _in_the_run() -> list[Fault]:
    def changed(name: str, during: Callable[[Path], object], reason: str = "shard_changed") -> Fault:
        return Fault(name, ((None, reason),), during=during)

    def remote(name: str, reason: str, server: str) -> Fault:
        return Fault(name, ((None, reason),), server=server)

    def replace_by_pipe(path: Path) -> None:
        path.unlink()
        os.mkfifo(path)

    return [
        changed("shard removed in the run", Path.unlink, "shard_missing"),
        changed("shard replaced in the run, same size", _replace_alike),
        changed("shard replaced in the run, other size", lambda path: write_tar(path, make_sample("new", 1))),
        changed("shard cut in the run", lambda path: os.truncate(path, path.stat().st_size // 2)),
        changed("shard replaced by a pipe in the run", replace_by_pipe),
        remote("remote that times out", "remote_timeout", "hang"),
        remote("remote that never answers", "remote_timeout", "silent"),
        remote("remote that serves half a file", "remote_incomplete", "half"),
        remote("remote that has lost the file", "shard_missing", "missing"),
        remote("remote that sends an HTML page", "shard_changed", "page"),
    ]


def _edit(**changes: bytes | None) -> Callable[[Members], Members]:
    """Change members of the victim by extension: new bytes, or None to leave it out; they stay where they were."""

    def apply(members: Members) -> Members:
        first = next(i for i, (name, _) in enumerate(members) if name.startswith(f"{VICTIM}."))
        own = {name.partition(".")[2]: content for name, content in members if name.startswith(f"{VICTIM}.")}
        kept = {extension: content for extension, content in {**own, **changes}.items() if content is not None}
        others = [member for member in members if not member[0].startswith(f"{VICTIM}.")]
        return [*others[:first], *((f"{VICTIM}.{name}", content) for name, content in kept.items()), *others[first:]]

    return apply


def _cut(name: str, place: str, plus: int) -> Callable[[bytes], bytes]:
    """Cut a tar at a place of a member, or behind the last one's blocks."""

    def apply(content: bytes) -> bytes:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            places = {info.name: getattr(info, place) for info in tar}
            return content[: places[name] + plus if name else tar.offset]

    return apply


def _scribble(content: bytes) -> bytes:
    """Noise instead of the header of the victim's JSON."""
    cut = len(_cut(f"{VICTIM}.json", "offset", 0)(content))
    return content[:cut] + np.random.default_rng(2).bytes(tarfile.BLOCKSIZE) + content[cut + tarfile.BLOCKSIZE :]


def _dangling(content: bytes) -> bytes:
    """A link to an absolute path instead of the victim's image."""
    changed = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(content)) as old, tarfile.open(fileobj=changed, mode="w") as new:
        for info in old:
            file = old.extractfile(info)
            if info.name == f"{VICTIM}.png":
                info.type, info.linkname, info.size, file = tarfile.SYMTYPE, "/data/17.png", 0, None
            new.addfile(info, file)
    return changed.getvalue()


def make_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (10, 200, 30)).save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    return content[:-2] + content[content.rfind(b"\xff\xda") : -2] * count + content[-2:]


def _replace_alike(path: Path) -> None:
    """Another tar of the same size, under the same name."""
    content = bytearray(path.read_bytes())
    content[tarfile.BLOCKSIZE + 60] ^= 1  # in the first image
    other = path.with_suffix(".new")
    other.write_bytes(content)
    os.utime(other, ns=(1, 1))
    other.replace(path)


def flip_bits(members: Members) -> Members:
    """JPEGs instead of all images, with four flipped bits in each, anywhere."""
    rng = np.random.default_rng(5)
    flipped = []
    for number, (name, content) in enumerate(members):
        if name.endswith(".png"):
            jpeg = bytearray(make_image(number, side=32, kind="JPEG"))
            for place in rng.integers(0, len(jpeg), 4).tolist():
                jpeg[place] ^= 1 << int(rng.integers(8))
            flipped.append((name.replace(".png", ".jpg"), bytes(jpeg)))
        else:
            flipped.append((name, content))
    return flipped


def _undecodable(damage: Callable[[Members], Members]) -> tuple[tuple[str | None, str], ...]:
    """Those images of the damaged shard that Pillow cannot read."""
    entries: list[tuple[str | None, str]] = []
    for name, content in damage([member for key in _KEYS for member in make_sample(key, int(key))]):
        if not name.endswith(".json"):
            try:
                Image.open(io.BytesIO(content)).convert("RGB")
            except Exception:
                # Not too broad: whatever Pillow raises on damaged bytes makes the image unusable.
                entries.append((name.partition(".")[0], "undecodable_image"))
    return tuple(entries)


@cache
def make_bomb() -> bytes:
    """A whole PNG of 900 million white pixels in 110 KB."""
    side = 30_000
    packer = zlib.compressobj(1)
    row = bytes([0]) + bytes([255]) * (side // 8)
    return _png(side, side, b"".join([packer.compress(row) for _ in range(side)]) + packer.flush())


def _png(width: int, height: int, data: bytes) -> bytes:
    """Black and white, with one bit per pixel."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
