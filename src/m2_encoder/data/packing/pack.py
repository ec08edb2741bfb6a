"""Pack a source into WebDataset tars: in parallel, restartable, with the same bytes for any number of workers."""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from m2_encoder.data.packing.download import DownloadOptions
from m2_encoder.data.packing.encoding import ImageOptions
from m2_encoder.data.packing.listed import hash_json
from m2_encoder.data.packing.shards import MARKER_FOLDER, ShardResult, ShardTask, read_marker, write_shard
from m2_encoder.data.packing.sources import Source
from m2_encoder.data.worker_pool import map_in_processes
from m2_encoder.errors import UserError
from m2_encoder.files import atomic_file, write_json

SUMMARY_FILE = "pack.json"
"""File with the shards of a finished output and their sample counts."""

FAILURES_FILE = "failures.jsonl"
"""One line for each record that is missing from a finished output: name, reason, detail."""

_LAYOUT_VERSION = 4  # raise it when the same records give other bytes
_PATTERN = re.compile(r"[^/%]*%0[1-9]d[^/%]*\.tar")
_REMOTE_REASONS = frozenset({"remote_timeout", "remote_incomplete"})


class PackOptions(NamedTuple):
    """How a source is packed.

    Attributes:
        samples_per_shard: records of a tar at most; failures leave it smaller, so that each shard depends on its own
            records alone.
        pattern: name of a tar, with its number as in "%06d.tar".
        images: what is done to images.
        downloads: how they are fetched; changes no bytes.
        retry_remote: pack shards again in which downloads failed.
        joins_captions: samples without an identity get one from their captions: equal ones show the same.
    """

    samples_per_shard: int = 1000
    pattern: str = "%06d.tar"
    images: ImageOptions = ImageOptions()
    downloads: DownloadOptions = DownloadOptions()
    retry_remote: bool = False
    joins_captions: bool = False


class PackSummary(NamedTuple):
    """What an output holds."""

    shards: int
    samples: int  # pairs
    num_bytes: int  # of all tars
    changed_images: int  # reduced or encoded again
    captions: dict[str, int]  # number by language
    left_out: dict[str, int]  # captions that are neither Chinese nor English, by language
    failed: dict[str, int]  # number of records by reason
    reused: int  # shards that an earlier run had done


def pack(
    source: Source,
    folder: Path,
    options: PackOptions,
    *,
    workers: int,
    overwrite: bool = False,
    report: Callable[[ShardResult], None] = lambda _: None,
) -> PackSummary:
    """Pack a source; goes on where an earlier run of the same source and options was stopped, however it ended.

    Args:
        source: what to pack; its files may not change meanwhile. Shards whose images or captions were written again
            since they were packed are packed again; other names or rows are another source.
        folder: of the tars; made if missing. It may hold nothing else.
        options: how.
        workers: processes; 0 packs in this one. Does not change the bytes.
        overwrite: remove what an earlier run with another source or other options left there.
        report: called with each shard, in order.

    Raises:
        UserError: if the folder holds something else or is in use, the source has no usable record, or the disk
            refuses.
    """
    check_pattern(options.pattern)
    try:
        with _exclusive(folder) as markers:
            _claim(folder, markers, _settings(options), overwrite)
            with contextlib.suppress(FileNotFoundError):
                (folder / SUMMARY_FILE).unlink()  # it says that the output is complete
            results, reused = _run(source, folder, options, workers, overwrite, report)
            known = {result.name for result in results}
            for path in markers.glob("*.tar.json"):
                if path.name.removesuffix(".json") not in known:
                    _refuse_other(folder, path.name.removesuffix(".json"), overwrite)
                    _remove_shard(path)
            is_plain = source.format == "folder" and source.classes is None
            hint = "; if its folders are classes, add classes=folders" if is_plain else ""
            return _finish(folder, results, reused, hint)
    except OSError as error:  # of the disk, or of a source that went away
        raise UserError(f"{error}; mend that and start again, done shards stay", key="output", value=folder) from error


def check_pattern(pattern: str) -> None:
    """Raise a `UserError` if the pattern does not name one tar for each number."""
    if not _PATTERN.fullmatch(pattern) or pattern.startswith("."):
        raise UserError(
            "must be a file name with one %06d and .tar, such as wukong-%06d.tar", key="pattern", value=pattern
        )


def _run(
    source: Source,
    folder: Path,
    options: PackOptions,
    workers: int,
    overwrite: bool,
    report: Callable[[ShardResult], None],
) -> tuple[list[ShardResult], int]:
    finished: dict[str, ShardResult] = {}
    order: list[str] = []

    def unfinished() -> Iterator[ShardTask]:
        for task in _tasks(source, folder, options):
            order.append(task.name)
            done = read_marker(task.marker)
            if done is not None and done.fingerprint != task.fingerprint:
                _refuse_other(folder, task.name, overwrite)
                _remove_shard(task.marker)
                done = None
            elif done is not None and done.stamp != task.records.stamp():
                done = None  # an image or a caption was written again: so is the shard, if that changes it
            if done is None or (options.retry_remote and any(item.reason in _REMOTE_REASONS for item in done.failures)):
                yield task
            else:
                finished[task.name] = done
                report(done)

    packed = 0
    for result in map_in_processes(write_shard, unfinished(), workers=workers, preload=write_shard.__module__):
        packed += 1
        finished[result.name] = result
        report(result)
    return [finished[name] for name in order], len(order) - packed


def _tasks(source: Source, folder: Path, options: PackOptions) -> Iterator[ShardTask]:
    settings = _settings(options)
    first = 0
    for index, records in enumerate(source.slices(options.samples_per_shard)):
        yield ShardTask(
            records=records,
            first=first,
            name=options.pattern % index,
            folder=str(folder),
            fingerprint=hash_json([settings, first, records.fingerprint()]),
            images=options.images,
            downloads=options.downloads,
            joins_captions=options.joins_captions,
        )
        first += len(records)


def _settings(options: PackOptions) -> dict[str, Any]:
    """All that changes bytes."""
    images = options.images._asdict() | {"limits": options.images.limits._asdict()}
    return {
        "layout": _LAYOUT_VERSION,
        "samples_per_shard": options.samples_per_shard,
        "pattern": options.pattern,
        "images": images,
        **({"identity": "captions"} if options.joins_captions else {}),
    }


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[Path]:
    """The folder of markers, for this process alone; the lock ends with the process, however it ends."""
    markers = folder / MARKER_FOLDER
    try:
        if folder.is_dir() and not markers.is_dir() and any(folder.iterdir()):
            names = ", ".join(sorted(path.name for path in folder.iterdir())[:5])
            raise UserError(f"holds other files ({names}); give an empty or new folder", key="output", value=folder)
        markers.mkdir(parents=True, exist_ok=True)
        lock = (markers / "lock").open("w")
    except OSError as error:
        raise UserError(
            f"cannot be written: {error.strerror}; give another folder", key="output", value=folder
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError("another m2-data pack writes there; wait for it", key="output", value=folder) from error
        for path in (*folder.glob(".*.partial"), *folder.glob(".*.tmp"), *markers.glob(".*.tmp")):
            path.unlink(missing_ok=True)
        yield markers


def _claim(folder: Path, markers: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Make sure that what is there was made with the same options."""
    path = markers / "settings.json"
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        found = None
    except (OSError, ValueError):
        found = {}
    if found is not None and found != settings:
        if not overwrite:
            changed = ", ".join(
                key
                for key in (settings | found if isinstance(found, dict) else settings)
                if not isinstance(found, dict) or found.get(key) != settings.get(key)
            )
            raise UserError(
                f"output={folder}: holds shards packed with other options ({changed}); give a new folder, or replace "
                "them with overwrite=true"
            )
        for marker in markers.glob("*.tar.json"):
            _remove_shard(marker)
    write_json(path, settings)


def _refuse_other(folder: Path, name: str, overwrite: bool) -> None:
    if not overwrite:
        raise UserError(
            f"output={folder}: {name} was packed from other records; the source has changed: give a new folder, or "
            "replace what differs with overwrite=true"
        )


def _remove_shard(marker: Path) -> None:
    marker.unlink(
        missing_ok=True
    )  # first: neither a marker without its tar nor a tar without its marker counts as done
    tar = marker.parent.parent / marker.name.removesuffix(".json")
    for path in (tar, tar.with_name(f"{tar.name}.index")):
        path.unlink(missing_ok=True)


def _finish(folder: Path, results: list[ShardResult], reused: int, hint: str) -> PackSummary:
    """The summary, written; `hint` is what helps where no picture has a caption."""
    failed: Counter[str] = Counter()
    captions: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    with atomic_file(folder / FAILURES_FILE) as partial, partial.open("w", encoding="utf-8") as file:
        for result in results:
            captions.update(result.captions)
            left_out.update(result.left_out)
            for failure in result.failures:
                failed[failure.reason] += 1
                said = {name: value for name, value in failure._asdict().items() if value != ()}
                file.write(json.dumps(said, ensure_ascii=True) + "\n")
    written = [result for result in results if result.samples]
    summary = PackSummary(
        shards=len(written),
        samples=sum(result.samples for result in written),
        num_bytes=sum(result.num_bytes for result in written),
        changed_images=sum(result.changed_images for result in written),
        captions=dict(sorted(captions.items())),
        left_out=dict(sorted(left_out.items())),
        failed=dict(sorted(failed.items())),
        reused=reused,
    )
    if not summary.samples:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in failed.most_common()) or "there are no records"
        first = next((item for result in results for item in result.failures), None)
        example = "" if first is None else f"; the first is {first.name}: {first.detail}"
        hint = hint if set(failed) == {"missing_caption"} else ""
        raise UserError(f"nothing could be packed: {reasons}{example}; see {folder / FAILURES_FILE}{hint}")
    shards = [{"name": result.name, "samples": result.samples, "bytes": result.num_bytes} for result in written]
    totals = {key: value for key, value in summary._asdict().items() if key not in ("reused", "shards")}
    write_json(folder / SUMMARY_FILE, {**totals, "shards": shards})
    return summary
