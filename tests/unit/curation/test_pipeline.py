from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import signal
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from m2_encoder.curation.executors import LocalExecutor
from m2_encoder.curation.output_folder import OutputFolder
from m2_encoder.curation.pipeline import Curation, curate, make_chunks
from m2_encoder.curation.settings import CurationSettings
from m2_encoder.curation.sources import list_shards
from m2_encoder.errors import UserError
from tests.support.curation import (
    SETTINGS,
    count_reasons,
    decide_plainly,
    decided,
    draw,
    encode,
    file_hashes,
    read_decisions,
    write_corpus,
)
from tests.support.shards import write_tar


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "web")


def run(corpus: Path, output: Path, settings: CurationSettings = SETTINGS, **options: Any) -> Curation:
    options.setdefault("executor", LocalExecutor(0))
    return curate(list_shards({"web": str(corpus)}), output, settings, **options)


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "out"
    run(corpus, output)
    return output


@pytest.mark.parametrize(("seed", "images"), [(0, "drop"), (1, "drop"), (2, "drop"), (0, "mark"), (1, "keep")])
def test_decisions_are_those_of_a_plain_loop(tmp_path: Path, seed: int, images: str) -> None:
    folder = write_corpus(tmp_path / "web", seed=seed)
    settings = dataclasses.replace(SETTINGS, duplicate_images=images)
    run(folder, tmp_path / "out", settings)
    tables = read_decisions(tmp_path / "out")
    expected = decide_plainly(tables, settings)
    assert decided(tables) == expected
    reasons = count_reasons(expected)
    wanted = {"kept", "duplicate_pair", "near_duplicate_image", "repeated_caption", "too_short"}
    wanted |= {"duplicate_image"} if images == "drop" else set()
    wanted |= {"absurd_shape", "too_small", "other_language", "undecodable_image", "missing_caption"}
    assert wanted <= set(reasons), f"the corpus tests too little: {reasons}"


@pytest.mark.parametrize(
    "change",
    [
        {"duplicate_pairs": False, "near_images": None},
        {"duplicate_images": "keep"},
        {"near_images": 8, "near_color": 255, "max_repeats": 1},
        {"partition_rows": 7},
    ],
)
def test_settings_change_what_they_say(corpus: Path, finished: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    settings = dataclasses.replace(SETTINGS, **change)
    run(corpus, tmp_path / "out", settings)
    reasons = count_reasons(decided(read_decisions(tmp_path / "out")))
    usual = count_reasons(decided(read_decisions(finished)))
    switched_off = {"duplicate_pairs": "duplicate_pair", "duplicate_images": "duplicate_image"}
    for key, reason in switched_off.items():
        assert (reason in reasons) == (key not in change)
    assert ("near_duplicate_image" in reasons) == (settings.near_images is not None)
    if "partition_rows" in change:
        assert reasons == usual, "how the work is cut must not matter"
    else:
        assert reasons != usual


def test_written_shards_hold_the_kept_pairs(corpus: Path, finished: Path) -> None:
    tables = read_decisions(finished)
    kept = [
        (row["image_hash"], row["language"], row["text"])
        for table in tables
        for row in table.to_pylist()
        if row["keep"]
    ]
    written, sizes = [], []
    for path in sorted((finished / "web").glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
        assert len(members) == len(set(members))
        sizes.append(len(members) // 2)
        for name, content in members.items():
            if name.endswith(".json"):
                image = next(members[other] for other in members if other.startswith(name[:-4]) and other != name)
                digest = hashlib.sha256(image).digest()
                for language, texts in json.loads(content)["captions"].items():
                    written += [(digest, language, text) for text in texts]
    assert sorted(written) == sorted(kept)
    assert sizes[:-1] == [SETTINGS.samples_per_shard] * (len(sizes) - 1), "only the last shard may be smaller"
    report = json.loads((finished / "report.json").read_text())
    assert report["total"]["kept_pairs"] == len(kept)
    assert report["total"]["kept_samples"] == sum(sizes)
    assert sum(report["total"]["reasons"].values()) + len(kept) == report["total"]["pairs"]
    assert [fault["reason"].partition(":")[0] for fault in report["sources"]["web"]["faults"]] == ["truncated_shard"]
    assert not (finished / ".work").exists()


def test_metadata_and_roles_are_kept(corpus: Path, finished: Path) -> None:
    found = []
    for path in sorted((finished / "web").glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [json.load(tar.extractfile(i)) for i in tar if i.name.endswith(".json")]  # type: ignore[arg-type]
    with_roles = [sample for sample in found if "caption_roles" in sample]
    assert any("keyword" in roles for sample in with_roles for roles in sample["caption_roles"].values())
    for sample in with_roles:
        assert {k: len(v) for k, v in sample["captions"].items()} == {
            k: len(v) for k, v in sample["caption_roles"].items()
        }
    assert any("url" in sample for sample in found)


@pytest.mark.parametrize("near", [None, 2])
def test_marked_copies_share_an_identity(corpus: Path, tmp_path: Path, near: int | None) -> None:
    run(corpus, tmp_path / "out", dataclasses.replace(SETTINGS, duplicate_images="mark", near_images=near))
    copies: Counter[bytes] = Counter()
    identities: dict[bytes, set[str]] = {}
    for path in sorted((tmp_path / "out" / "web").glob("*.tar")):
        with tarfile.open(path) as tar:
            members = [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
        for (_, image), (_, metadata) in zip(members[::2], members[1::2], strict=True):
            identities.setdefault(image, set()).add(json.loads(metadata).get("identity"))
            copies[image] += 1
    assert max(copies.values()) > 1, "copies are marked, not dropped"
    assert all(len(names) == 1 for names in identities.values())
    assert all(None not in names for image, names in identities.items() if copies[image] > 1)
    identities = {image: names for image, names in identities.items() if None not in names}
    assert len({name for names in identities.values() for name in names}) == len(identities)


def test_marks_respect_what_samples_say(tmp_path: Path) -> None:
    said = [{"key": "a"}, {"key": "b", "identity": "c"}, {}, {"key": "other"}]
    members = []
    for number, metadata in enumerate(said):
        members.append((f"{number}.png", encode(draw(1 if number < 3 else 2))))
        members.append((f"{number}.json", json.dumps({**metadata, "caption": f"a red cat {number}"}).encode()))
    write_tar(tmp_path / "web" / "0.tar", members)
    run(tmp_path / "web", tmp_path / "out", dataclasses.replace(SETTINGS, duplicate_images="mark"))
    with tarfile.open(tmp_path / "out" / "web" / "000000.tar") as tar:
        found = [json.load(tar.extractfile(i)) for i in tar if i.name.endswith(".json")]  # type: ignore[arg-type]
    digest = hashlib.sha256(encode(draw(1))).hexdigest()[:24]
    assert [sample.get("identity") for sample in found] == [digest, "c", digest, None]


class Stopped(Exception):
    pass


class StoppingExecutor(LocalExecutor):
    """Stops after a number of tasks, after the one or before it is noted."""

    def __init__(self, after: int) -> None:
        super().__init__(0)
        self.left = after

    def run(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[int]:
        for peak in super().run(function, tasks):
            if self.left <= 0:
                raise Stopped
            self.left -= 1
            yield peak


def test_stopped_at_any_task_it_goes_on(corpus: Path, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    stops = 0
    while True:
        try:
            run(corpus, output, executor=StoppingExecutor(2))
            break
        except Stopped:
            stops += 1
            # What a killed process may leave behind.
            (output / ".work" / f".left-{stops}.tmp").write_bytes(b"half a file")
    assert stops > 10
    assert file_hashes(output) == file_hashes(finished)


def test_workers_do_not_change_a_byte(corpus: Path, finished: Path, tmp_path: Path) -> None:
    executor = LocalExecutor(2)
    run(corpus, tmp_path / "out", executor=executor)
    executor.close()
    assert file_hashes(tmp_path / "out") == file_hashes(finished)


def kill_worker(_task: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_dead_worker_is_said(corpus: Path) -> None:
    executor = LocalExecutor(1)
    with pytest.raises(UserError, match="start again to go on"):
        list(executor.run(kill_worker, [1, 2]))
    executor.close()


@pytest.mark.parametrize("keep_work", [False, True])
def test_killed_between_the_report_and_tidying_up(
    corpus: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_work: bool
) -> None:
    output = tmp_path / "out"

    def stop(*_: object) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "remove_work", stop)
        if keep_work:
            run(corpus, output, keep_work=True)
        else:
            with pytest.raises(Stopped):
                run(corpus, output)
    assert (output / ".work").is_dir()
    assert run(corpus, output).stages == (), "it was finished already"
    assert (output / ".work").is_dir() == keep_work, "what was to be kept is kept, anything else is removed"
    if not keep_work:
        assert file_hashes(output) == file_hashes(finished)


def test_interrupted_run_with_other_settings_leaves_nothing(corpus: Path, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(Stopped):
        run(corpus, output, dataclasses.replace(SETTINGS, samples_per_shard=1), executor=StoppingExecutor(100))
    assert len(list((output / "web").glob("*.tar"))) > len(list((finished / "web").glob("*.tar")))
    run(corpus, output)
    assert file_hashes(output) == file_hashes(finished)


def test_finished_run_is_not_repeated(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = run(corpus, output, keep_work=True)
    assert run(corpus, output) == Curation(report=first.report, stages=())
    other = dataclasses.replace(SETTINGS, max_repeats=1)
    with pytest.raises(UserError, match="overwrite=true"):
        run(corpus, output, other)
    again = run(corpus, output, other, overwrite=True)
    done = {stage.stage: stage.done_before for stage in again.stages}
    assert done["measure"] == 4, "other thresholds need not read the shards again"
    assert done["rules"] == 0
    assert again.report.total["kept_pairs"] < first.report.total["kept_pairs"]


def test_foreign_folder_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        run(corpus, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_input_inside_output_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "out" / "web", shards=1, samples=2)
    with pytest.raises(UserError, match="give another folder"):
        run(tmp_path / "out" / "web", tmp_path / "out")


def test_changed_shard_is_noticed(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "web", shards=2, samples=5)
    shards = list_shards({"web": str(folder)})
    write_corpus(folder, shards=2, samples=6)
    with pytest.raises(UserError, match="shard_changed"):
        curate(shards, tmp_path / "out", SETTINGS, executor=LocalExecutor(0))


def test_garbage_and_empty_shards(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "web", shards=1, samples=8)
    (folder / "garbage.tar").write_bytes(b"no tar at all" * 100)
    with tarfile.open(folder / "empty.tar", "w"):
        pass
    report = run(folder, tmp_path / "out").report
    assert any(fault["reason"].startswith("not_a_tar") for fault in report.content["sources"]["web"]["faults"])
    assert report.total["samples"] >= 6


def test_a_full_disk_is_one_line_and_it_goes_on(
    corpus: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(_path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("m2_encoder.curation.writer.open_index", fill)
        with pytest.raises(UserError, match="No space left on device; mend that and start again: what is done stays"):
            run(corpus, tmp_path / "out")
    run(corpus, tmp_path / "out")
    assert (tmp_path / "out" / "report.json").read_bytes() == (finished / "report.json").read_bytes()


def test_nothing_left_is_a_report_not_a_crash(corpus: Path, tmp_path: Path) -> None:
    report = run(corpus, tmp_path / "out", dataclasses.replace(SETTINGS, min_side_px=10_000)).report
    assert report.total["kept_pairs"] == 0
    assert not list((tmp_path / "out").glob("*/*.tar"))


@pytest.mark.parametrize(
    ("rows", "most", "firsts"),
    [([5, 5, 5], 10, [0, 2]), ([50, 1, 1], 10, [0, 1]), ([0, 0], 10, [0]), ([10, 10], 10, [0, 1])],
)
def test_chunks(rows: list[int], most: int, firsts: list[int]) -> None:
    chunks = make_chunks([Path(f"{i}") for i in range(len(rows))], rows, most)
    assert [chunk.first for chunk in chunks] == firsts
    assert [path for chunk in chunks for path in chunk.paths] == [f"{i}" for i in range(len(rows))]
