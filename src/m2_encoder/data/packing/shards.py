"""One slice of a source becomes one tar: read, fetch, check, write, mark as done."""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from m2_encoder.data.images.opening import read_picture_file
from m2_encoder.data.packing.download import DownloadOptions, fetch
from m2_encoder.data.packing.encoding import ImageOptions, PreparedImage, prepare_image
from m2_encoder.data.packing.records import URL_SCHEMES, Failure, Record, Slice
from m2_encoder.data.samples.captions import name_captions
from m2_encoder.data.samples.parse import CaptionText, SampleProblem
from m2_encoder.data.shards.index import open_index
from m2_encoder.errors import ImageError, UserError
from m2_encoder.files import write_json

MARKER_FOLDER = ".pack"
"""Folder inside the output that says which shards are done."""

_KEY_DIGITS = 9


class ShardTask(NamedTuple):
    """One shard to pack."""

    records: Slice
    first: int  # number of the first record in the whole source
    name: str
    folder: str
    fingerprint: str  # of the records and of all options that change bytes
    images: ImageOptions
    downloads: DownloadOptions
    joins_captions: bool = False  # whether equal captions are equal identities, where the record has none

    @property
    def marker(self) -> Path:
        """File that says that the shard is done."""
        return Path(self.folder, MARKER_FOLDER, f"{self.name}.json")


class ShardResult(NamedTuple):
    """The result of packing a slice, as its marker stores it."""

    name: str
    fingerprint: str
    stamp: str  # of the records' files, taken before they were read
    samples: int  # pairs in the tar
    num_bytes: int  # size of the tar; 0 without samples
    changed_images: int  # images that were reduced or encoded again
    captions: dict[str, int]  # number by language
    failures: tuple[Failure, ...]  # what is missing, in the order of the source
    left_out: dict[str, int]  # captions that are neither Chinese nor English, by language


def write_shard(task: ShardTask) -> ShardResult:
    """Pack one slice: the tar appears by one rename, then its index, then its marker.

    The bytes depend on the records and options alone: times, owners and places are fixed.

    Raises:
        UserError: if the disk refuses, or the source cannot be read any more.
    """
    target = Path(task.folder, task.name)
    partial = target.with_name(f".{task.name}.{os.getpid()}.partial")
    try:
        result = _write_tar(task, partial, task.records.stamp())
        if not result.samples:
            target.unlink(missing_ok=True)
        elif not (target.is_file() and filecmp.cmp(partial, target, shallow=False)):
            _sync(partial)
            partial.replace(target)  # unless nothing changed: readers would take the tar for another one
        if result.samples:
            open_index(target)  # training need not scan the tar
        write_json(task.marker, result._replace(failures=())._asdict() | {"failures": list(map(list, result.failures))})
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"output={task.folder}: {task.name} cannot be packed: {error}; mend that and start again, done shards stay"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return result


def read_marker(path: Path) -> ShardResult | None:
    """What a finished shard's marker says; None if there is none, or its tar is not as it was."""
    try:
        values = json.loads(path.read_bytes())
        failures = [Failure(name, reason, detail, tuple(said)) for name, reason, detail, said in values["failures"]]
        result = ShardResult(**(values | {"failures": tuple(failures)}))
        tar = path.parent.parent / result.name
        size = tar.stat().st_size if result.samples else 0
    except (OSError, ValueError, LookupError, TypeError):  # absent, or damaged by whoever
        return None
    return result if size == result.num_bytes else None


def _write_tar(task: ShardTask, path: Path, stamp: str) -> ShardResult:
    import webdataset  # slow to import, and only who writes tars needs it

    failures: list[Failure] = []
    captions: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    samples = changed = 0
    # A fixed time and owner make the bytes a function of the samples alone.
    with webdataset.TarWriter(str(path), encoder=False, mtime=0, user="", group="", mode=0o644) as writer:
        for number, (record, image) in enumerate(fetch_images(task.records.read(), task.downloads), start=task.first):
            if isinstance(record, Failure) or isinstance(image, SampleProblem):
                failures.append(_failure(record, image))
                continue
            try:
                prepared = prepare_image(image, task.images)
            except SampleProblem as problem:
                failures.append(Failure(record.name, problem.reason, problem.detail))
                continue
            if task.joins_captions and record.identity is None:
                record = record._replace(identity=name_captions(record.captions))
            key = f"{number:0{_KEY_DIGITS}d}"
            description = _describe(record, prepared, key)
            writer.write({"__key__": key, prepared.extension: prepared.content, "json": description})
            samples += 1
            changed += prepared.is_changed
            captions.update(caption.language for caption in record.captions)
            left_out.update(caption.language for caption in record.left_out)
    num_bytes = path.stat().st_size if samples else 0
    left_out.update(language for failure in failures for language in failure.languages)
    return ShardResult(
        name=task.name,
        fingerprint=task.fingerprint,
        stamp=stamp,
        samples=samples,
        num_bytes=num_bytes,
        changed_images=changed,
        captions=dict(sorted(captions.items())),
        failures=tuple(failures),
        left_out=dict(sorted(left_out.items())),
    )


def _failure(record: Record | Failure, image: bytes | SampleProblem) -> Failure:
    if isinstance(record, Failure):
        return record
    assert isinstance(image, SampleProblem), "a record fails here only by its image"
    return Failure(record.name, image.reason, image.detail)


def fetch_images(
    records: Iterable[Record | Failure], downloads: DownloadOptions
) -> Iterator[tuple[Record | Failure, bytes | SampleProblem]]:
    """Records with their images, in order; downloads run ahead, a bounded number of them."""
    waiting: deque[tuple[Record | Failure, Future[bytes] | None]] = deque()
    with ThreadPoolExecutor(downloads.threads) as pool, contextlib.ExitStack() as stack:
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        for record in records:
            is_remote = isinstance(record, Record) and isinstance(record.image, str) and _is_url(record.image)
            future = pool.submit(fetch, record.image, downloads) if is_remote else None  # type: ignore[union-attr, arg-type]
            waiting.append((record, future))
            while len(waiting) > 2 * downloads.threads or (waiting and waiting[0][1] is None):
                yield _with_image(*waiting.popleft())
        while waiting:
            yield _with_image(*waiting.popleft())


def _with_image(
    record: Record | Failure, future: Future[bytes] | None
) -> tuple[Record | Failure, bytes | SampleProblem]:
    if isinstance(record, Failure):
        return record, b""
    try:
        if future is not None:
            return record, future.result()
        return record, record.image if isinstance(record.image, bytes) else _read_file(record.image)
    except SampleProblem as problem:
        return record, problem


def _read_file(name: str) -> bytes:
    try:
        return read_picture_file(name)
    except ImageError as error:
        raise SampleProblem("missing_image", f"{name}: {error.text}") from error


def _is_url(image: str) -> bool:
    return image.startswith(URL_SCHEMES)


def _describe(record: Record, image: PreparedImage, tar_key: str) -> bytes:
    captions: dict[str, list[Any]] = {}
    for caption in record.captions:
        captions.setdefault(caption.language, []).append(_stored(caption))
    value: Mapping[str, Any] = {
        **record.extra,
        "key": tar_key if record.key is None else record.key,
        **({} if record.identity is None else {"identity": record.identity}),
        "captions": captions,
        "width": image.width,
        "height": image.height,
    }
    # `default`: a column that is kept may hold times or other values that JSON cannot.
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str).encode("utf-8", "replace")


def _stored(caption: CaptionText) -> Any:
    return caption.text if caption.role is None else {"text": caption.text, "role": caption.role}


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
