"""Split WebDataset tars into two sides that share no picture, caption or identity.

Every tar gives one tar of the same name on each side, if that has samples of it: names that begin anew in every tar
stay apart, and a tar is written by one process alone. Each appears by a rename, and the folder by another at the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from m2_encoder.curation.images import measure_image
from m2_encoder.curation.split_groups import (
    By,
    GlueOptions,
    Groups,
    SplitSample,
    choose_sides,
    group_samples,
)
from m2_encoder.data.samples.captions import caption_form
from m2_encoder.data.samples.parse import SampleProblem, name_content, parse_sample_text
from m2_encoder.data.shards.index import open_index, scan_samples
from m2_encoder.data.shards.reader import OpenShard
from m2_encoder.data.shards.tar_scan import UNREADABLE
from m2_encoder.data.worker_pool import map_in_processes
from m2_encoder.errors import UserError
from m2_encoder.files import atomic_file, write_json

RECORD_FILE: Final = "split.json"
"""In a finished split: its settings and counts."""

FAILURES_FILE: Final = "failures.jsonl"
"""One line for what cannot be used and is on neither side: shard, key, reason, detail."""

GIANT: Final = 0.2
"""Share of all samples, above which a group is worth a warning."""

_LAYOUT_VERSION: Final = 1  # raise it when the same tars give other bytes
_DIGEST_BYTES: Final = 16


class SplitOptions(NamedTuple):
    """How tars are split."""

    share: float = 0.1  # of the samples, on the second side
    by: By = "identity"
    seed: int = 0
    names: tuple[str, str] = ("train", "val")  # folders of the two sides
    glue: GlueOptions = GlueOptions()
    language: str | None = None  # of captions without one; None: by the script
    max_pixels: int = 89_478_485  # larger pictures are not decoded


class SplitResult(NamedTuple):
    """What became of it."""

    record: dict[str, Any]  # the content of `RECORD_FILE`
    was_finished: bool  # whether an earlier run had done it all


class _Shard(NamedTuple):
    path: str
    name: str  # in the output
    size: int
    written: int


class _SurveyTask(NamedTuple):
    number: int
    shard: _Shard
    options: SplitOptions


class _WriteTask(NamedTuple):
    shard: _Shard
    sides: tuple[tuple[str, tuple[int, ...]], ...]  # path of a new tar, and which samples it gets


_Failure = tuple[str, str, str, str]  # shard, key, reason, detail


def split(
    paths: Sequence[str],
    output: Path,
    options: SplitOptions,
    *,
    workers: int,
    overwrite: bool = False,
    report: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> SplitResult:
    """Split tars; goes on where an earlier run of the same tars and options was stopped.

    Holds about half a kilobyte per sample in memory.

    Args:
        paths: of the tars.
        output: a new folder.
        options: how.
        workers: processes; 0 works in this one. Does not change the bytes.
        overwrite: replace another split there.
        report: called with the stage, and how many tars of how many are done.

    Raises:
        UserError: if the tars cannot be split so, the output holds something else or is in use, or the disk refuses.
    """
    output = Path(os.path.abspath(output))
    try:
        shards = _list_shards(paths)
        fingerprint = _fingerprint(shards, options)
        finished = _find_finished(output, fingerprint, overwrite)
        if finished is not None:
            return SplitResult(finished, True)
        with _work_folder(output, fingerprint) as work:
            record = _run(shards, work, options, workers, report) | {"fingerprint": fingerprint}
            write_json(work / RECORD_FILE, record)
            _publish(work, output)
    except OSError as error:
        raise _refused(output, error.strerror or str(error)) from error
    return SplitResult(record, False)


def _run(
    shards: Sequence[_Shard],
    work: Path,
    options: SplitOptions,
    workers: int,
    report: Callable[[str, int, int], None],
) -> dict[str, Any]:
    samples: list[SplitSample] = []
    failures: list[_Failure] = []
    tasks = [_SurveyTask(number, shard, options) for number, shard in enumerate(shards)]
    for done, (found, failed) in enumerate(
        map_in_processes(_survey, tasks, workers=workers, preload=__name__), start=1
    ):
        samples += found
        failures += failed
        report("reading", done, len(shards))
    if options.by == "folder" and not any(sample.folder for sample in samples):
        rule = "no sample has a folder in the `key` of its JSON, or in its name; choose identity or hash"
        raise UserError(rule, key="by", value=options.by)
    glue = options.glue._replace(by_folder=options.by == "folder", by_picture=options.by == "picture")
    groups = group_samples(samples, glue)
    held = choose_sides(samples, groups, share=options.share, by=options.by, seed=options.seed)
    _refuse_empty(samples, groups, held, options)
    sides = [
        (work / name, [place for place, is_held in enumerate(held) if is_held == wanted])
        for name, wanted in zip(options.names, (False, True), strict=True)
    ]
    writing = list(_plan(shards, samples, sides))
    for done, _ in enumerate(map_in_processes(_write, writing, workers=workers, preload=__name__), start=1):
        report("writing", done, len(writing))
    with atomic_file(work / FAILURES_FILE) as partial, partial.open("w", encoding="utf-8") as file:
        for shard, key, reason, detail in failures:
            item = {"shard": shard, "key": key, "reason": reason, "detail": detail}
            file.write(json.dumps(item, ensure_ascii=True) + "\n")
    return {
        **_settings(options),
        "samples": len(samples),
        "groups": len(groups.members),
        "largest_group": groups.largest,
        "largest_group_shares": None if groups.cause is None else groups.cause._asdict(),
        "glued": groups.glued,
        "unusable": dict(sorted(Counter(reason for _, _, reason, _ in failures).items())),
        "sides": {folder.name: _describe_side(folder, samples, places) for folder, places in sides},
        "on_both_sides": _find_shared(samples, sides[0][1], sides[1][1]),
    }


def _refuse_empty(samples: Sequence[SplitSample], groups: Groups, held: Sequence[bool], options: SplitOptions) -> None:
    if any(held) and not all(held):
        return
    if not samples:
        raise UserError("there is no usable sample in these tars; m2-data check says why", key="source")
    if len(samples) == 1:
        raise UserError("one usable sample cannot be split; pack more pictures", key="source")
    largest = describe_largest(groups.largest, len(samples), None if groups.cause is None else groups.cause._asdict())
    if len(groups.members) == 1:
        raise UserError(f"no share splits one group: {largest}", key="val", value=options.share)
    side = options.names[int(not any(held))]
    text = f"{side} would be empty: {len(samples):,} samples are {len(groups.members):,} groups that stay together"
    text += f"; {largest}" if groups.largest > GIANT * len(samples) else ""
    raise UserError(f"{text}; give another share", key="val", value=options.share)


def describe_largest(largest: int, samples: int, cause: dict[str, Any] | None) -> str:
    """One sentence on the largest group, and how to make it smaller."""
    text = f"the largest group holds {largest:,} of {samples:,} samples"
    if cause is None:
        return text
    kind, value, count = cause["kind"], str(cause["value"]), cause["samples"]
    text += f"; {count:,} of them share {'a picture' if kind == 'picture' else f'the {kind} {value[:60]!r}'}"
    if kind == "caption":
        text += (
            f"; with max_repeats={max(1, count // 10)}, captions of more samples than that keep nothing together: they "
            "are then on both sides"
        )
    if kind == "identity":
        text += "; with by=picture, as for classes, pictures of one identity are on both sides"
    return text


def _survey(task: _SurveyTask) -> tuple[list[SplitSample], list[_Failure]]:
    """Look at the samples of a shard."""
    shard, options = task.shard, task.options
    samples: list[SplitSample] = []
    failures: list[_Failure] = []
    try:
        tar = OpenShard(shard.path, size=shard.size, written=shard.written, write_index=False)
    except SampleProblem as problem:
        raise UserError(f"{shard.path}: {problem}; start again") from problem
    with contextlib.closing(tar):
        failures += [(shard.path, fault.key or "", fault.reason, fault.detail) for fault in tar.index.faults]
        for number in range(len(tar.index)):
            raw = tar.read(number)
            try:
                text = parse_sample_text(raw.json, raw.text, language=options.language)
                image = measure_image(raw.image, max_pixels=options.max_pixels)
            except SampleProblem as problem:
                failures.append((shard.path, raw.key, problem.reason, problem.detail))
                continue
            captions = (*text.captions, *text.left_out)
            original = str(text.metadata.get("key", ""))
            samples.append(
                SplitSample(
                    shard=task.number,
                    number=number,
                    image=image.image_hash[:_DIGEST_BYTES],
                    look=image.perceptual_hash,
                    color=image.mean_color,
                    captions=frozenset(caption_form(caption.text) for caption in captions),
                    identity=name_content(text, key=raw.key, shard=shard.path, source=""),
                    folder=(original if "/" in original else raw.key).rpartition("/")[0],
                    languages=tuple(caption.language for caption in captions),
                )
            )
    return samples, failures


def _plan(
    shards: Sequence[_Shard], samples: Sequence[SplitSample], sides: Sequence[tuple[Path, list[int]]]
) -> Iterator[_WriteTask]:
    by_shard: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
    for folder, places in sides:
        numbers: dict[int, list[int]] = {}
        for place in places:
            numbers.setdefault(samples[place].shard, []).append(samples[place].number)
        for shard, own in numbers.items():
            by_shard.setdefault(shard, []).append((str(folder / shards[shard].name), tuple(own)))
    for shard, found in sorted(by_shard.items()):
        yield _WriteTask(shards[shard], tuple(found))


def _write(task: _WriteTask) -> None:
    """Copy samples to new tars, all of their files byte for byte; a tar that is there is whole."""
    shard = task.shard
    waiting = [(Path(path), numbers) for path, numbers in task.sides if not Path(path).exists()]
    if not waiting:
        return
    members = scan_samples(shard.path)[1]
    with open(shard.path, "rb") as file:
        status = os.fstat(file.fileno())
        if (status.st_size, status.st_mtime_ns) != (shard.size, shard.written):
            raise UserError(f"{shard.path}: was replaced during the split; start again")
        for path, numbers in waiting:
            path.parent.mkdir(exist_ok=True)
            with atomic_file(path) as partial, tarfile.open(partial, "w", format=tarfile.GNU_FORMAT) as archive:
                for number in numbers:
                    for member in sorted(members[number].values(), key=lambda each: each.offset):
                        if member.size == UNREADABLE:
                            continue
                        content = os.pread(file.fileno(), member.size, member.offset)
                        info = tarfile.TarInfo(member.name)  # no time and no owner: bytes depend on samples alone
                        info.size = len(content)
                        archive.addfile(info, io.BytesIO(content))
            open_index(path)  # writes the index, so that training need not


def _describe_side(folder: Path, samples: Sequence[SplitSample], places: Sequence[int]) -> dict[str, Any]:
    own = [samples[place] for place in places]
    return {
        "samples": len(own),
        "share": len(own) / len(samples),
        "tars": len(list(folder.glob("*.tar"))),
        "captions": dict(sorted(Counter(language for each in own for language in each.languages).items())),
        "samples_with": dict(sorted(Counter(language for each in own for language in set(each.languages)).items())),
    }


def _find_shared(samples: Sequence[SplitSample], first: Sequence[int], second: Sequence[int]) -> dict[str, int]:
    """How much is on both sides all the same, counted anew."""

    def distinct(places: Sequence[int]) -> tuple[set[Any], set[Any], set[Any]]:
        own = [samples[place] for place in places]
        captions = {caption for each in own for caption in each.captions}
        return {each.image for each in own}, captions, {each.identity for each in own}

    counts = [len(a & b) for a, b in zip(distinct(first), distinct(second), strict=True)]
    return dict(zip(("pictures", "captions", "identities"), counts, strict=True))


def _list_shards(paths: Sequence[str]) -> list[_Shard]:
    names = [os.path.basename(path) for path in paths]
    if len(set(names)) < len(names):  # a/0.tar and b/0.tar
        names = ["-".join(Path(os.path.abspath(path)).parts[-2:]) for path in paths]
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise UserError(f"several tars are called {twice.replace('-', '/', 1)}; rename one", key="source")
    shards = []
    for path, name in zip(paths, names, strict=True):
        try:
            status = os.stat(path)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}", key="source") from error
        shards.append(_Shard(os.path.abspath(path), name, status.st_size, status.st_mtime_ns))
    return shards


def _settings(options: SplitOptions) -> dict[str, Any]:
    values = options._asdict()
    glue = options.glue._asdict()
    del values["glue"], glue["by_folder"], glue["by_picture"]
    return {**values, "names": list(options.names), **glue}


def _fingerprint(shards: Sequence[_Shard], options: SplitOptions) -> str:
    value = [_LAYOUT_VERSION, _settings(options), [shard[1:] for shard in shards]]
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _find_finished(output: Path, fingerprint: str, overwrite: bool) -> dict[str, Any] | None:
    """The record of the same split, finished; None if it is to be made."""
    if not output.exists():
        return None
    try:
        record = json.loads((output / RECORD_FILE).read_bytes())
        found = record["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        if output.is_dir() and not any(output.iterdir()):
            return None
        raise UserError("holds something else; give a new folder", key="output", value=output) from None
    if found == fingerprint:
        assert isinstance(record, dict), "it has a fingerprint"
        return record
    if not overwrite:
        rule = "holds a split of other tars or settings; give a new folder, or replace it with overwrite=true"
        raise UserError(rule, key="output", value=output)
    return None


@contextlib.contextmanager
def _work_folder(output: Path, fingerprint: str) -> Iterator[Path]:
    """A folder beside the output, for this process alone; what the same split left there stays."""
    work = output.with_name(f".{output.name}.partial")
    work.mkdir(parents=True, exist_ok=True)
    lock = work.with_name(f"{work.name}.lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError("another m2-data split writes there; wait for it", key="output", value=output) from error
        marker = work / "fingerprint"
        if not marker.is_file() or marker.read_text(encoding="ascii") != fingerprint:
            shutil.rmtree(work)
            work.mkdir()
            marker.write_text(fingerprint, encoding="ascii")
        for path in work.rglob(".*.tmp"):  # of a process that was killed
            path.unlink()
        try:
            yield work
        except UserError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            raise _refused(output, error.__cause__.strerror or str(error.__cause__)) from error
        lock.unlink(missing_ok=True)


def _refused(output: Path, why: str) -> UserError:
    text = f"cannot be written ({why}); mend that and start again: tars that are done stay"
    return UserError(text, key="output", value=output)


def _publish(work: Path, output: Path) -> None:
    (work / "fingerprint").unlink()
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    work.rename(output)
    shutil.rmtree(old, ignore_errors=True)
